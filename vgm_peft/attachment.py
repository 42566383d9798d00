"""Putting deltas on live modules and taking them off again without a trace.

Two ways, same sum: *live* (forward hooks: trainable, strength may change at any time) and *fused* (dW added in place, the
originals kept: nothing to pay per step). The base module's class and state-dict keys never change, and `remove` gives
back bit-identical weights. Everything attached to one module meets in one `Socket`, so the order of attaching and
removing never matters: each patch sees the layer's own input and the original weight, fused or not.

A patch follows its layer's input to another device at the next forward; its dtype stays (float32 patches train on a
bfloat16 base), the products run in the input's dtype. A deep copy of a module carries independent copies of what is
attached to it; `attachments` finds them, to take them off.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from functools import partial
from inspect import signature
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vgm_peft.delta import Delta, Patch
from vgm_peft.errors import DeltaError
from vgm_peft.rows import Rows, Selection
from vgm_peft.shares import Deriving, Shares
from vgm_peft.site import Site, locate
from vgm_peft.socket import Socket, socket_of
from vgm_peft.sums import Vector, add

Parts = Mapping[str, nn.Module]
Strength = float | Mapping[str, float]
"""One for all sites of a delta, or that of each by its name."""


class _Owner:
    """What `Attachment` and `Fusion` share: the parts they are on, the sockets they are in, and how to leave them."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.sockets = dict(parts), list[Socket]()

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
        copy.sockets, copy.parts = [], {part: memo[id(root)] for part, root in self.parts.items() if id(root) in memo}
        own = {k: v for k, v in self.__dict__.items() if k not in copy.__dict__}
        copy.__dict__.update({k: deepcopy(v, memo) for k, v in own.items()})
        return copy


class Attachment(_Owner):
    """One delta, live on the parts of a base model. A context manager; `remove` (idempotent) takes it off.

    `strength` scales every patch; `strengths` (part or site name -> factor) multiplies it for some. Both may be changed
    at any time and take effect at the next forward. At strength 0 the output is that of the base, bit for bit. `rows` are
    those of each call's batch that the delta acts on, None for all: what comes of the others is as if it were not there.
    """

    def __init__(self, parts: Parts, delta: Delta, strength: float = 1.0) -> None:
        """Attach; all sites are checked before the first is touched. Raises `DeltaError` when any does not fit."""
        super().__init__({part: parts[part] for part in delta.parts if part in parts})
        self.delta, self.strength, self.strengths = delta, strength, cast(dict[str, float], {})
        self.clocks: list[RemovableHandle] = []
        self.selection: Selection | None = None
        self._counters: list[RemovableHandle] = []
        places = [(locate(parts, patch.site), patch) for patch in delta]
        try:
            for layer, patch in places:
                self.sockets.append(Socket.on(layer))
                self.sockets[-1].plug(patch, self)
            for part in sorted({patch.site.part for patch in delta if patch.timed}):
                self.clocks.append(parts[part].register_forward_pre_hook(partial(self._tell_time, part), with_kwargs=True))
            for part in sorted({patch.site.part for patch in delta if isinstance(patch, Deriving)}):
                shares = Shares()
                self.clocks.append(parts[part].register_forward_pre_hook(partial(self._deal, part, shares)))
                self.clocks.append(parts[part].register_forward_hook(partial(_close, shares), always_call=True))
            for part in sorted({patch.site.part for patch in delta if isinstance(patch, Vector)}):
                self.clocks.append(parts[part].register_forward_pre_hook(partial(self._place, part)))
                self.clocks.append(parts[part].register_forward_hook(partial(self._lift, part), always_call=True))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take it off; calling it again does nothing."""
        super().remove()
        self.rows = None
        while self.clocks:
            self.clocks.pop().remove()

    @property
    def rows(self) -> Rows | None:
        """The rows of each call's batch that the delta acts on; None: all."""
        return None if self.selection is None else self.selection.rows

    @rows.setter
    def rows(self, rows: Rows | None) -> None:
        selection = None if rows is None else Selection(rows)
        while self._counters:
            self._counters.pop().remove()
        if selection is not None:
            for part, root in self.parts.items():
                self._counters.append(root.register_forward_pre_hook(partial(selection.note, part), with_kwargs=True))
        self.selection = selection

    def _tell_time(self, part: str, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell timed patches of a part the timestep, an argument of that name of every denoiser (a forward pre-hook).

        Text encoders have none, and their patches are not told.
        """
        given = signature(root.forward).bind_partial(*args, **kwargs).arguments.get("timestep")
        if given is None:
            return
        now = torch.as_tensor(given) if self.selection is None else self.selection.of(torch.as_tensor(given))
        for patch in self.delta:
            if patch.timed and patch.site.part == part:
                patch.at(now)

    def _deal(self, part: str, shares: Shares, *_: object) -> None:
        """Let the patches of a part that act derive together what follows from their parameters (a forward pre-hook)."""
        mine = (
            (patch, socket.joined_base(patch) if patch.makes_changes and self.selection is None else None)
            for socket in self._sockets_of(part)
            for patch, owner in socket.live
            if owner is self and isinstance(patch, Deriving) and self.strength_of(patch.site) != 0.0
        )
        shares.deal(mine)

    def _place(self, part: str, *_: object) -> None:
        """Let sums with vectors stand in the places of parameters of a part (a forward pre-hook)."""
        places = [(socket, terms) for socket in self._sockets_of(part) if (terms := socket.terms(self))]
        made = iter(add([term for _, terms in places for term in terms]))
        for socket, terms in places:
            socket.place({term.name: next(made) for term in terms})

    def _lift(self, part: str, *_: object) -> None:
        """Give the layers of a part their parameters back (a forward hook)."""
        for socket in self._sockets_of(part):
            if socket.placed:
                socket.lift()

    def _sockets_of(self, part: str) -> list[Socket]:
        """Return the sockets on layers of a part, each once."""
        return [socket for socket in dict.fromkeys(self.sockets) if socket.live and socket.live[0][0].site.part == part]

    def strength_of(self, site: Site) -> float:
        """The effective strength at one of the delta's sites."""
        if not self.strengths:
            return self.strength
        return self.strength * self.strengths.get(site.part, 1.0) * self.strengths.get(site.name, 1.0)


def _close(shares: Shares, *_: object) -> None:
    """Let no share serve after the forward of a part (a forward hook)."""
    shares.close()


class Fusion(_Owner):
    """Several deltas added into the base's weights in place, the originals kept (on their device) for exact restoration.

    dW of every patch is computed from the *original* weight in float32 and summed before one rounding to the base's
    dtype, so neither order nor the number of deltas costs accuracy; several fusions on one base may come and go in any
    order. A context manager; `remove` restores bit for bit.
    """

    def __init__(self, parts: Parts, deltas: Iterable[tuple[Delta, Strength]]) -> None:
        """Fuse; all sites are checked before the first is touched. Raises `DeltaError` for weights that cannot be changed."""
        super().__init__(parts)
        try:
            self.become(deltas)
        except BaseException:
            self.remove()
            raise

    def become(self, deltas: Iterable[tuple[Delta, Strength]]) -> int:
        """Fuse these instead, and return how many modules were touched: only those on which something changes.

        The weights are then those of a fusion made afresh, bit for bit. Checks and raises as when it is made.
        """
        plan: dict[nn.Module, list[tuple[Patch, float]]] = {socket.layer: [] for socket in self.sockets}
        for layer, patch, strength in _fusible(self.parts, deltas):
            plan.setdefault(layer, []).append((patch, strength))
        mine, touched = set(self.sockets), 0
        for layer, changes in plan.items():
            socket = Socket.on(layer)
            if changes and socket not in mine:
                self.sockets.append(socket)
            touched += socket.fuse(self, changes)
            if not changes:
                socket.leave(self)
        self.sockets = [socket for socket in self.sockets if plan[socket.layer]]
        return touched


def check_fusible(parts: Parts, delta: Delta) -> None:
    """Raise `DeltaError` for a delta that does not fit or cannot be fused: timed, or on weights that cannot be changed."""
    for _ in _fusible(parts, [(delta, 1.0)]):
        pass


def _fusible(parts: Parts, deltas: Iterable[tuple[Delta, Strength]]) -> list[tuple[nn.Module, Patch, float]]:
    """Return every patch with its module and its strength there, but those at 0; all of them are checked."""
    entries: list[tuple[Patch, float]] = []
    for delta, strength in deltas:
        entries += [(p, strength[p.site.name] if isinstance(strength, Mapping) else strength) for p in delta]
    places = [(locate(parts, patch.site), patch, strength) for patch, strength in entries if strength != 0.0]
    tied = _tied(parts) if places else set[int]()
    for layer, patch, _ in places:
        if patch.timed:
            raise DeltaError(f"{patch.site}: {patch.kind} changes with the timestep", fix="attach live instead of fusing")
        _check_weight(cast(Tensor, getattr(layer, patch.site.tensor)), patch.site, tied)
    return places


def _tied(parts: Parts) -> set[int]:
    """Return the ids of parameters that more than one module of the base holds."""
    seen: set[int] = set()
    tied: set[int] = set()
    for module in dict.fromkeys(m for root in parts.values() for m in root.modules()):
        for parameter in module.parameters(recurse=False):
            (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied


def _check_weight(tensor: Tensor, site: Site, tied: set[int]) -> None:
    if id(tensor) in tied:
        raise DeltaError(f"{site}: this tensor is shared with another layer", fix="attach live instead of fusing")
    if tensor.is_meta:
        raise DeltaError(f"{site}: its values are not in memory (offloaded)", fix="attach live instead of fusing")
    if not tensor.is_floating_point():
        raise DeltaError(f"{site}: its values are quantised ({tensor.dtype})", fix="attach live instead of fusing")


def attachments(parts: Parts) -> list[Attachment | Fusion]:
    """Return everything that is on the parts, live or fused, each once."""
    sockets = (socket_of(module) for root in parts.values() for module in root.modules())
    return list(dict.fromkeys(owner for socket in sockets if socket is not None for owner in socket.owners()))


def attached(layer: nn.Module) -> int:
    """Return the number of patches live on one module."""
    socket = socket_of(layer)
    return 0 if socket is None else len(socket.live)
