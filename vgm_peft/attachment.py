"""Putting deltas on live modules and taking them off again without a trace.

Two ways, same sum: *live* (forward hooks: trainable, strength may change at any time) and *fused* (dW added in place, the
originals kept: nothing to pay per step). The base module's class and state-dict keys never change, and `remove` gives
back bit-identical weights. Everything attached to one module meets in one `_Socket`, so the order of attaching and
removing never matters: each patch sees the layer's own input and the original weight, fused or not.

A patch follows its layer's input to another device at the next forward; its dtype stays (float32 patches train on a
bfloat16 base), the products run in the input's dtype. A deep copy of a module carries independent copies of what is
attached to it; `attachments` finds them, to take them off.
"""

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vgm_peft.delta import Delta, Patch
from vgm_peft.errors import DeltaError
from vgm_peft.site import Site, locate

_SOCKET = "_vgm_peft_socket"
"""Where a layer's `__dict__` holds its socket while it has one: no attribute of the module system, so no state-dict key."""

Parts = Mapping[str, nn.Module]


class _Socket:
    """All that is attached to one module: the live patches with their owners, the fused ones, and the fused originals."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.live: list[tuple[Patch, Attachment]] = []
        self.fused: list[tuple[Patch, float, Fusion]] = []
        self.originals: dict[str, Tensor] = {}
        self.device: torch.device | None = None
        self.hook: RemovableHandle | None = None
        layer.__dict__[_SOCKET] = self

    @staticmethod
    def on(layer: nn.Module) -> "_Socket":
        """Return the layer's socket, made if there is none."""
        return _socket_of(layer) or _Socket(layer)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add every live patch to the layer's output (the forward hook)."""
        x = cast(Tensor, args[0] if args else next(iter(kwargs.values())))
        if x.device != self.device:
            self._follow(x.device)
        for patch, owner in self.live:
            strength = owner.strength_of(patch.site)
            if strength != 0.0:
                output = patch.add_to(output, x, layer, self.base(patch), strength)
        return output

    def base(self, patch: Patch) -> Tensor:
        """Return the untouched tensor at a patch's site; a constant to those that compute with it."""
        name = patch.site.tensor
        tensor = self.originals[name] if name in self.originals else cast(Tensor, getattr(self.layer, name))
        return tensor if patch.base_free else tensor.detach().to(self.device)

    def _follow(self, device: torch.device) -> None:
        for patch, _ in self.live:
            patch.to(device)
        self.device = device

    def plug(self, patch: Patch, owner: "Attachment") -> None:
        """Make a patch live."""
        if self.hook is None:
            self.hook = self.layer.register_forward_hook(cast(Any, self), with_kwargs=True)
        self.live.append((patch, owner))
        self.device = None  # the newcomer may be elsewhere

    def settle(self) -> None:
        """Make every fused tensor its original plus the sum of its changes; with no change left, the original bit for bit."""
        changes: dict[str, list[tuple[Patch, float]]] = {}
        for patch, strength, _ in self.fused:
            changes.setdefault(patch.site.tensor, []).append((patch, strength))
        for name in sorted(self.originals.keys() | changes.keys()):
            tensor = cast(Tensor, getattr(self.layer, name))
            with _exact(tensor):
                original = self.originals.get(name)
                if original is None:
                    original = self.originals[name] = tensor.detach().clone()
                if name in changes:
                    tensor.copy_(_changed(original, changes[name]))
                else:
                    tensor.copy_(original)
                    del self.originals[name]

    def leave(self, owner: "Attachment | Fusion") -> None:
        """Take off everything of one owner; an empty socket leaves the layer as if it had never been there."""
        self.live = [entry for entry in self.live if entry[1] is not owner]
        if any(entry[2] is owner for entry in self.fused):
            self.fused = [entry for entry in self.fused if entry[2] is not owner]
            self.settle()
        if not self.live and self.hook is not None:
            self.hook.remove()
            self.hook = None
        if not self.live and not self.fused and not self.originals:
            self.layer.__dict__.pop(_SOCKET, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Socket":
        """Copy along with the layer, and tell the copied owners where they are."""
        copy = memo[id(self)] = object.__new__(_Socket)
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        for owner in copy.owners():
            owner.sockets.append(copy)
        return copy

    def owners(self) -> "list[Attachment | Fusion]":
        """Return whose patches are here, each once, live before fused."""
        return list(dict.fromkeys([entry[1] for entry in self.live] + [entry[2] for entry in self.fused]))


def _socket_of(layer: nn.Module) -> _Socket | None:
    return cast("_Socket | None", layer.__dict__.get(_SOCKET))


@contextmanager
def _exact(tensor: Tensor) -> Generator[None]:
    """Change a weight in place whatever the caller is in the middle of: no graph, no autocast, no inference tensors made."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
        yield


def _changed(original: Tensor, changes: list[tuple[Patch, float]]) -> Tensor:
    """Return the original plus strength * dW of every patch, computed on its device in float32 or wider."""
    dtype = torch.promote_types(original.dtype, torch.float32)
    wide = original.to(dtype)
    total = wide.clone()
    for patch, strength in changes:
        # A copy, so that fusing neither moves nor rounds the caller's delta.
        total.add_(deepcopy(patch).to(original.device, dtype).change(wide), alpha=strength)
    return total


class _Owner:
    """What `Attachment` and `Fusion` share: the sockets they are in, and how to leave them."""

    def __init__(self) -> None:
        self.sockets: list[_Socket] = []

    def remove(self) -> None:
        """Take it off; calling it again does nothing."""
        while self.sockets:
            self.sockets[-1].leave(cast("Attachment | Fusion", self))
            self.sockets.pop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy all but the places: the copied sockets enter themselves, and only those of the modules being copied."""
        copy = memo[id(self)] = object.__new__(type(self))
        copy.__dict__.update({k: [] if k == "sockets" else deepcopy(v, memo) for k, v in self.__dict__.items()})
        return copy


class Attachment(_Owner):
    """One delta, live on the parts of a base model. A context manager; `remove` (idempotent) takes it off.

    `strength` scales every patch; `strengths` (part or site name -> factor) multiplies it for some. Both may be changed
    at any time and take effect at the next forward. At strength 0 the output is that of the base, bit for bit.
    """

    def __init__(self, parts: Parts, delta: Delta, strength: float = 1.0) -> None:
        """Attach; all sites are checked before the first is touched. Raises `DeltaError` when any does not fit."""
        super().__init__()
        self.delta, self.strength, self.strengths = delta, strength, cast(dict[str, float], {})
        places = [(locate(parts, patch.site), patch) for patch in delta]
        try:
            for layer, patch in places:
                self.sockets.append(_Socket.on(layer))
                self.sockets[-1].plug(patch, self)
        except BaseException:
            self.remove()
            raise

    def strength_of(self, site: Site) -> float:
        """The effective strength at one of the delta's sites."""
        if not self.strengths:
            return self.strength
        return self.strength * self.strengths.get(site.part, 1.0) * self.strengths.get(site.name, 1.0)


class Fusion(_Owner):
    """Several deltas added into the base's weights in place, the originals kept (on their device) for exact restoration.

    dW of every patch is computed from the *original* weight in float32 and summed before one rounding to the base's
    dtype, so neither order nor the number of deltas costs accuracy; several fusions on one base may come and go in any
    order. A context manager; `remove` restores bit for bit.
    """

    def __init__(self, parts: Parts, deltas: Iterable[tuple[Delta, float]]) -> None:
        """Fuse; all sites are checked before the first is touched. Raises `DeltaError` for weights that cannot be changed."""
        super().__init__()
        entries = [(patch, strength) for delta, strength in deltas if strength != 0.0 for patch in delta]
        places = [(locate(parts, patch.site), patch, strength) for patch, strength in entries]
        tied = _tied(parts)
        for layer, patch, _ in places:
            _check_fusible(cast(Tensor, getattr(layer, patch.site.tensor)), patch.site, tied)
        try:
            for layer, patch, strength in places:
                socket = _Socket.on(layer)
                if socket not in self.sockets:
                    self.sockets.append(socket)
                socket.fused.append((patch, strength, self))
            for socket in self.sockets:
                socket.settle()
        except BaseException:
            self.remove()
            raise


def _tied(parts: Parts) -> set[int]:
    """Return the ids of parameters that more than one module of the base holds."""
    seen: set[int] = set()
    tied: set[int] = set()
    for module in dict.fromkeys(m for root in parts.values() for m in root.modules()):
        for parameter in module.parameters(recurse=False):
            (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied


def _check_fusible(tensor: Tensor, site: Site, tied: set[int]) -> None:
    if id(tensor) in tied:
        raise DeltaError(f"{site}: this tensor is shared with another layer", fix="attach live instead of fusing")
    if tensor.is_meta:
        raise DeltaError(f"{site}: its values are not in memory (offloaded)", fix="attach live instead of fusing")
    if not tensor.is_floating_point():
        raise DeltaError(f"{site}: its values are quantised ({tensor.dtype})", fix="attach live instead of fusing")


def attachments(parts: Parts) -> list[Attachment | Fusion]:
    """Return everything that is on the parts, live or fused, each once."""
    sockets = (_socket_of(module) for root in parts.values() for module in root.modules())
    return list(dict.fromkeys(owner for socket in sockets if socket is not None for owner in socket.owners()))


def attached(layer: nn.Module) -> int:
    """Return the number of patches live on one module."""
    socket = _socket_of(layer)
    return 0 if socket is None else len(socket.live)
