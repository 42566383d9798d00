"""Putting deltas on live modules and taking them off again without a trace.

Two ways, same sum: *live* (forward hooks: trainable, strength may change at any time) and *fused* (dW added in place, the
originals kept: nothing to pay per step). The base module's class and state-dict keys never change, and `remove` gives
back bit-identical weights. Everything attached to one module shares one `_Socket`, so the order of attaching never
matters: each patch sees the layer's own input and the base weight.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Self, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vgm_peft.delta import Delta, Patch
from vgm_peft.errors import DeltaError
from vgm_peft.site import locate

_sockets: "WeakKeyDictionary[nn.Module, _Socket]" = WeakKeyDictionary()


class _Socket:
    """All that is attached to one module: the live patches with their owners, and the fused originals."""

    def __init__(self, layer: nn.Module) -> None:
        self.live: list[tuple[Patch, Attachment]] = []
        self.hook: RemovableHandle = layer.register_forward_hook(self._forward)

    def _forward(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = cast(Tensor, args[0])
        for patch, owner in self.live:
            strength = owner.strength_of(patch)
            if strength != 0.0:
                output = patch.add_to(output, x, layer, strength)
        return output


class Attachment:
    """One delta, live on the parts of a base model. A context manager; `remove` (idempotent) takes it off.

    `strength` scales every patch; `strengths` (part or site name -> factor) multiplies it for some. Both may be changed
    at any time and take effect at the next forward. At strength 0 the output is that of the base, bit for bit.
    """

    def __init__(self, parts: Mapping[str, nn.Module], delta: Delta, strength: float = 1.0) -> None:
        """Attach; all sites are checked before the first is touched. Raises `DeltaError` when any does not fit."""
        self.delta, self.strength, self.strengths = delta, strength, cast(dict[str, float], {})
        self._places = [(locate(parts, patch.site), patch) for patch in delta]
        for layer, patch in self._places:
            socket = _sockets.get(layer)
            if socket is None:
                socket = _sockets[layer] = _Socket(layer)
            socket.live.append((patch, self))

    def strength_of(self, patch: Patch) -> float:
        """The effective strength of one of the delta's patches."""
        if not self.strengths:
            return self.strength
        site = patch.site
        return self.strength * self.strengths.get(site.part, 1.0) * self.strengths.get(site.name, 1.0)

    def remove(self) -> None:
        """Take the delta off; sockets that become empty leave no hook behind."""
        for layer, _ in self._places:
            socket = _sockets.get(layer)
            if socket is None:
                continue
            socket.live = [(p, owner) for p, owner in socket.live if owner is not self]
            if not socket.live:
                socket.hook.remove()
                del _sockets[layer]
        self._places = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


class Fusion:
    """Several deltas added into the base's weights in place, the originals kept (on their device) for exact restoration.

    dW of every patch is computed from the *original* weight in float32 and summed before one rounding to the base's
    dtype, so neither order nor the number of deltas costs accuracy. A context manager; `remove` restores bit for bit.
    """

    def __init__(self, parts: Mapping[str, nn.Module], deltas: Iterable[tuple[Delta, float]]) -> None:
        """Fuse; all sites are checked before the first is touched."""
        sums: dict[tuple[nn.Module, str], list[tuple[Patch, float]]] = {}
        for delta, strength in deltas:
            for patch in delta:
                sums.setdefault((locate(parts, patch.site), patch.site.tensor), []).append((patch, strength))
        self._originals: list[tuple[Tensor, Tensor]] = []
        try:
            for (layer, name), patches in sums.items():
                self._fuse(layer, name, [(p, s) for p, s in patches if s != 0.0])
        except BaseException:
            self.remove()
            raise

    @torch.no_grad()
    def _fuse(self, layer: nn.Module, name: str, patches: list[tuple[Patch, float]]) -> None:
        if not patches:
            return
        tensor = cast(Tensor, getattr(layer, name))
        if any(tensor is taken for taken, _ in self._originals):
            raise DeltaError(
                f"{patches[0][0].site}: this tensor is shared with another layer", fix="attach live instead of fusing"
            )
        total = tensor.detach().to(torch.float32)
        total = total.clone() if total is tensor else total
        for patch, strength in patches:
            total += strength * patch.to(tensor.device).change(tensor).to(torch.float32)
        self._originals.append((tensor, tensor.detach().clone()))
        tensor.copy_(total)

    @torch.no_grad()
    def remove(self) -> None:
        """Restore the base bit for bit."""
        for tensor, original in self._originals:
            tensor.copy_(original)
        self._originals = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def attached(layer: nn.Module) -> int:
    """Number of patches live on one module."""
    socket = _sockets.get(layer)
    return 0 if socket is None else len(socket.live)
