"""What stands between one layer and all that is attached to it: hooks that let patches act, and the originals of what is
fused. A socket exists only while something is attached; `attachment` makes and empties them.
"""

from copy import deepcopy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vgm_peft.delta import Call, Patch
from vgm_peft.fusing import changed, exact
from vgm_peft.rows import Turn, add_to_rows
from vgm_peft.site import Site
from vgm_peft.sums import Term, Vector

if TYPE_CHECKING:
    from vgm_peft.attachment import Attachment, Fusion

_SOCKET = "_vgm_peft_socket"
"""Where a layer's `__dict__` holds its socket while it has one: no attribute of the module system, so no state-dict key."""

SMALL = 2**15
"""Values of a weight up to which operations count and not arithmetic, so that a dense dW costs least.

Measured on one CPU core, forward and backward, dW joining the weight over acting by itself, for seven methods: 0.2 to 1.0 at
128x128 (64 to 512 tokens), 0.6 to 1.5 at 256x256, 0.5 to 1.9 at 320x320, 1.2 to 3.9 at 640x640. How many tokens there are
matters little: both ways pay for them. Of SD1.5's layers only the first and last convolution are so small."""

WIDE = (torch.float32, torch.float64)


class Socket:
    """All that is attached to one module: the live patches with their owners, the fused ones, and the fused originals."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.live: list[tuple[Patch, Attachment]] = []
        self.fused: list[tuple[Patch, float, Fusion]] = []
        self.originals: dict[str, Tensor] = {}
        self.device: torch.device | None = None
        self.hooks: list[RemovableHandle] = []
        self.done: frozenset[Patch] = frozenset()
        """In a forward: the patches that acted before the layer ran, and its own input `x` where that was changed."""
        self.x: Tensor | None = None
        self.active: list[Turn] | None = None
        """In a forward: the patches that act in it, from when the first hook has drawn them."""
        self.has_vectors = False
        """Whether any of what is live may be a vector that joins its tensor together with those of other layers."""
        self.placed: dict[str, Tensor] = {}
        """In a forward of the part: sums that stand in the parameters' places until `lift`, with all patches in them."""
        layer.__dict__[_SOCKET] = self

    @staticmethod
    def on(layer: nn.Module) -> "Socket":
        """Return the layer's socket, made if there is none."""
        return socket_of(layer) or Socket(layer)

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let patches act on the layer's input or on its weights before it runs (the forward pre-hook).

        Not on both in one forward, nor on the input of a layer with changed weights: the product of two changes would
        come on top of their sum. Then they wait for their turn at the output. Patches that may join the weight do so only
        all together, because who stays at the output may need the untouched layer's own product there. Those that act on some
        rows alone act on the output of these, after all others.
        """
        if self.placed:
            if next(iter(self.placed.values())).requires_grad or not torch.is_grad_enabled():
                return None
            self.lift()
        x = _input(args, kwargs)
        self._follow(x.device)
        self.active = self._drawn()
        active = [turn for turn in self.active if turn.selection is None]
        if all(self._weighs(turn.patch) for turn in active):
            return self._join(active)
        weighing = [turn for turn in active if turn.patch.acts == "weight" and self._wide(turn.patch.site)]
        feeding = [turn for turn in active if turn.patch.acts == "input"]
        if weighing and not feeding:
            return self._join(weighing)
        if feeding and not weighing and not self.originals:
            self.done, self.x, fed = frozenset(turn.patch for turn in feeding), x, x
            for patch, strength, _ in feeding:
                fed = patch.add_feed(fed, x, self.base(patch), strength)
            return ((fed, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): fed})
        return None

    def _drawn(self) -> list[Turn]:
        """Return the patches of this forward with their strengths, drawn once: training may leave some out (strength 0)."""
        entries = ((patch, owner, owner.strength_of(patch.site)) for patch, owner in self.live)
        return [Turn(patch, s * patch.presence(), owner.selection) for patch, owner, s in entries if s != 0.0]

    def _acting(self) -> "list[tuple[Patch, Attachment]]":
        """Return the patches that act on all rows at the strengths of now: the others might as well not be there."""
        return [(p, owner) for p, owner in self.live if owner.selection is None and owner.strength_of(p.site) != 0.0]

    def _join(self, weighing: list[Turn]) -> None:
        """Shadow the layer's parameters by their sums with dense changes, until the forward is over."""
        shadows: dict[str, Tensor] = {}
        for patch, strength, _ in weighing:
            name = patch.site.tensor
            tensor = shadows[name] if name in shadows else cast(Tensor, getattr(self.layer, name))
            shadows[name] = patch.add_change(tensor, self.base(patch), strength)
        self.done = frozenset(turn.patch for turn in weighing)
        self.layer.__dict__.update(shadows)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor | None) -> Any:
        """Add every live patch that has not acted yet to the layer's output (the forward hook); None after a failure."""
        x, fed = (_input(args, kwargs), False) if self.x is None else (self.x, True)
        placed = bool(self.placed)
        active, done = (self._drawn(), frozenset[Patch]()) if placed else self._exit()
        if output is None:
            return None
        self._follow(x.device)
        plain = None if done or placed or self.originals else output
        for patch, strength, _ in () if placed else (turn for turn in active if turn.selection is None):
            if patch not in done:
                output = patch.add_to(output, Call(x, layer, self.base(patch), plain), strength)
            elif fed:
                output = patch.add_rest(output, Call(x, layer, self.base(patch)), strength)
        turns = [turn for turn in active if turn.selection is not None]
        return add_to_rows(turns, output, Call(x, layer, x, plain), self.base) if turns else output

    def _exit(self) -> tuple[list[Turn], frozenset[Patch]]:
        """Forget the forward that is over; return the patches that act in it, and those of them that have acted by now."""
        active, done = self._drawn() if self.active is None else self.active, self.done
        if self.x is None:
            for patch in done:
                self.layer.__dict__.pop(patch.site.tensor, None)
        self.active, self.done, self.x = None, frozenset(), None
        return active, done

    def terms(self, owner: "Attachment") -> list[Term]:
        """Return the sums with vectors that are all that is going to act in the next forward; none if more is.

        None too for what may be elsewhere by then (offloaded, or never called yet), and for a base that is trained.
        """
        acting = self._acting() if self.has_vectors else []
        names = {p.site.tensor for p, other in acting if isinstance(p, Vector) and p.vector and other is owner}
        if len(names) != len(acting) or not self._bias_is_free():
            return []
        sums = [(cast(Vector, p).summand(), cast(Tensor, getattr(self.layer, p.site.tensor)), p.site) for p, _ in acting]
        for vector, tensor, _ in sums:
            if tensor.dtype not in WIDE or tensor.dtype != vector.dtype or tensor.device != self.device or tensor.requires_grad:
                return []
        return [Term(site.tensor, tensor, vector, owner.strength_of(site)) for vector, tensor, site in sums]

    def place(self, sums: dict[str, Tensor]) -> None:
        """Let sums stand in the places of the layer's parameters until `lift`: its hooks have nothing to do meanwhile."""
        self.placed = sums
        self.layer.__dict__.update(sums)

    def lift(self) -> None:
        """Give the layer its parameters back."""
        for name in self.placed:
            self.layer.__dict__.pop(name, None)
        self.placed = {}

    def joined_base(self, patch: Patch) -> Tensor | None:
        """Return the untouched tensor at a patch's site if dW is going to join it in the next forward because it is small.

        None too for what may be elsewhere by then (offloaded, or never called yet).
        """
        if cast(Tensor, getattr(self.layer, patch.site.tensor)).device != self.device:
            return None
        return self.base(patch) if patch.joins and all(self._weighs(other) for other, _ in self._acting()) else None

    def _weighs(self, patch: Patch) -> bool:
        """Whether dW of a patch joins its tensor in this forward, provided that those of all others on the layer do."""
        if patch.acts == "weight":
            return self._wide(patch.site)
        if not patch.joins or patch.drops or not self._wide(patch.site):
            return False
        if patch.site.op == "bias":
            return self._bias_is_free()
        return patch.site.rows * patch.site.columns <= SMALL

    def _bias_is_free(self) -> bool:
        """Whether the gradient of the bias costs nothing: oneDNN makes a convolution's with that of the whole weight."""
        return not isinstance(self.layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))

    def _wide(self, site: Site) -> bool:
        """Whether a change joins the tensor without being rounded away, as it would be in half precision."""
        return cast(Tensor, getattr(self.layer, site.tensor)).dtype in WIDE

    def base(self, patch: Patch) -> Tensor:
        """Return the untouched tensor at a patch's site; a constant to those that compute with it."""
        name = patch.site.tensor
        tensor = self.originals[name] if name in self.originals else self._own(name)
        return tensor if patch.base_free else tensor.detach().to(self.device)

    def _own(self, name: str) -> Tensor:
        """Return a tensor of the layer, whatever stands in its place for a forward."""
        parameter = self.layer._parameters.get(name)  # pyright: ignore[reportPrivateUsage]
        return cast(Tensor, getattr(self.layer, name)) if parameter is None else parameter

    def _follow(self, device: torch.device) -> None:
        """Move the patches to where the layer's input is, when that has changed."""
        if device != self.device:
            for patch, _ in self.live:
                patch.to(device)
            self.device = device

    def plug(self, patch: Patch, owner: "Attachment") -> None:
        """Make a patch live."""
        self.live.append((patch, owner))
        self.device = None  # the newcomer may be elsewhere
        self._rehook()

    def _rehook(self) -> None:
        """Hook into the layer's forward: after it for any live patch, before it only for those that need it."""
        for hook in self.hooks:
            hook.remove()
        self.has_vectors = any(isinstance(patch, Vector) and patch.vector for patch, _ in self.live)
        early = any(patch.acts != "output" or patch.joins for patch, _ in self.live)
        self.hooks = []
        if early:
            self.hooks.append(self.layer.register_forward_pre_hook(self.enter, with_kwargs=True))
        if self.live:
            hook = self.layer.register_forward_hook(cast(Any, self), with_kwargs=True, always_call=early)
            self.hooks.append(hook)

    def fuse(self, owner: "Fusion", changes: list[tuple[Patch, float]]) -> bool:
        """Have these be what an owner has fused here, in this order, and say whether that is anything new."""
        if [(patch, strength) for patch, strength, other in self.fused if other is owner] == changes:
            return False
        place = next((i for i, entry in enumerate(self.fused) if entry[2] is owner), len(self.fused))
        others = [entry for entry in self.fused if entry[2] is not owner]
        self.fused = [*others[:place], *((patch, strength, owner) for patch, strength in changes), *others[place:]]
        self.settle()
        return True

    def settle(self) -> None:
        """Make every fused tensor its original plus the sum of its changes; with no change left, the original bit for bit."""
        changes: dict[str, list[tuple[Patch, float]]] = {}
        for patch, strength, _ in self.fused:
            changes.setdefault(patch.site.tensor, []).append((patch, strength))
        for name in sorted(self.originals.keys() | changes.keys()):
            tensor = cast(Tensor, getattr(self.layer, name))
            with exact(tensor):
                original = self.originals.get(name)
                if original is None:
                    original = self.originals[name] = tensor.detach().clone()
                if name in changes:
                    tensor.copy_(changed(original, changes[name]))
                else:
                    tensor.copy_(original)
                    del self.originals[name]

    def leave(self, owner: "Attachment | Fusion") -> None:
        """Take off everything of one owner; an empty socket leaves the layer as if it had never been there."""
        self.lift()
        self.live = [entry for entry in self.live if entry[1] is not owner]
        self.fuse(cast("Fusion", owner), [])
        self._rehook()
        if not self.live and not self.fused and not self.originals:
            self.layer.__dict__.pop(_SOCKET, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Socket":
        """Copy along with the layer, and tell the copied owners where they are."""
        copy = memo[id(self)] = object.__new__(Socket)
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        for owner in copy.owners():
            owner.sockets.append(copy)
        return copy

    def owners(self) -> "list[Attachment | Fusion]":
        """Return whose patches are here, each once, live before fused."""
        return list(dict.fromkeys([entry[1] for entry in self.live] + [entry[2] for entry in self.fused]))


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return cast(Tensor, args[0] if args else next(iter(kwargs.values())))


def socket_of(layer: nn.Module) -> Socket | None:
    """Return the layer's socket, if it has one."""
    return cast("Socket | None", layer.__dict__.get(_SOCKET))


def untouched(layer: nn.Module, name: str) -> Tensor:
    """Return a tensor of a layer as it is without what is fused into it: what a file that refers to the base means."""
    socket = socket_of(layer)
    return cast(Tensor, getattr(layer, name)) if socket is None or name not in socket.originals else socket.originals[name]
