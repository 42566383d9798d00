"""What patches derive from their parameters alone, derived for all patches of a part at once.

A rotation of OFT is a dozen operations on a handful of values; on 128 layers these cost more than all that is done with the
result. So before a part runs its forward, the parameters of all its patches of a sort go through `Deriving.derive` together,
and every patch takes its share when its layer is called. Shares are autograd's as anything else: one `split` and one `cat`
stand between a patch and its parameters. A patch whose layer a forward leaves out has gradients of zeros from it, not None.
Where layers are so small that dW joins their weights (`Patch.joins`), patches may go on to make that together too.

No share outlives what it was derived for: it serves while the part's forward lasts, and in the backward pass to activation
checkpointing, which runs layers again and must find the tensors that the first run saw. It does not serve where gradients are
recorded though it was derived without them, or the other way round (checkpointing in its reentrant form), nor after its
parameters were written to or moved. A patch that nothing serves derives its own, by the same function.
"""

from abc import abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vgm_peft.delta import Patch
from vgm_peft.site import Site


@dataclass(frozen=True)
class Source:
    """What one patch has to derive something from."""

    sort: Any
    """Settings of `derive`, hashable; patches of one class, sort, dtype, device and inner shape go through it together."""
    values: Tensor
    """(N, ...): what is derived has rows in proportion, and no row depends on those of other patches."""


class Deriving(Patch):
    """A patch that makes something of its parameters in many small operations before it acts."""

    makes_changes: ClassVar[bool] = False
    """Whether `changes` makes dW too, of all patches whose dW joins the weight."""

    def __init__(self, site: Site, options: Any, generator: torch.Generator | None = None) -> None:
        """Begin without a share."""
        super().__init__(site, options, generator)
        self.shares = _Held()
        """The last one that was derived with gradients recorded, and the last without."""

    @abstractmethod
    def source(self) -> Source:
        """Return what `derive` makes something of."""

    @classmethod
    @abstractmethod
    def derive(cls, sort: Any, values: Tensor) -> tuple[Tensor, ...]:
        """Return what follows from the values of one or many patches, the rows of one patch beside those of the next."""

    @classmethod
    def changes(cls, patches: "Sequence[Deriving]", derived: tuple[Tensor, ...], bases: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return dW of patches that were derived for together, on bases of one shape."""
        raise NotImplementedError(f"{cls.__name__} leaves dW to each patch")

    def derived(self) -> tuple[Tensor, ...]:
        """Return what `derive` makes of the patch's own parameters: its share of the forward under way, or made just now."""
        share = self._share()
        if share is not None and share.change is None:
            return share.tensors
        source = self.source()
        return self.derive(source.sort, source.values)

    def shared_change(self) -> Tensor | None:
        """Return dW where it was made together with others for the forward under way; the base cannot have changed since."""
        share = self._share()
        return None if share is None else share.change

    def _share(self) -> "Share | None":
        """Return the share that serves now, if one does."""
        share = self.shares.get(torch.is_grad_enabled())
        if share is not None and share.serves(self):
            return share
        # What does not serve the first run of a layer must not serve the second.
        self.shares = _Held({records: share for records, share in self.shares.items() if not share.is_due})
        return None

    def stamp(self) -> list[tuple[int, int]]:
        """Return where the parameters are and how often they were written to (which inference tensors do not tell)."""
        own = (p for p in self._parameters.values() if p is not None)
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in own]


class Shares:
    """The shares of some patches of one part: `deal` before its forward, `close` after it."""

    def __init__(self) -> None:
        self.forward: object | None = None
        """Stands for the forward under way, if there is one."""

    def deal(self, entries: Iterable[tuple[Deriving, Tensor | None]]) -> None:
        """Derive for patches together, and give to each its own; beside a patch, its base where dW is going to join it."""
        self.forward = object()
        groups: dict[Hashable, list[tuple[Deriving, Source, Tensor | None]]] = {}
        for patch, base in entries:
            source = patch.source()
            values, shape = source.values, None if base is None else (base.shape, base.dtype, base.device)
            key = (type(patch), source.sort, values.shape[1:], values.dtype, values.device, shape)
            groups.setdefault(key, []).append((patch, source, base))
        for members in groups.values():
            patches, sources, bases = zip(*members, strict=True)
            counts = [len(source.values) for source in sources]
            total = sum(counts)
            whole = patches[0].derive(sources[0].sort, torch.cat([source.values for source in sources]))
            if bases[0] is None:
                cut = [tensor.split([len(tensor) * count // total for count in counts]) for tensor in whole]
                each = [Share(self, *own) for own in zip(patches, zip(*cut, strict=True), strict=True)]
            else:
                changes = patches[0].changes(patches, whole, bases)
                each = [Share(self, patch, (), change) for patch, change in zip(patches, changes, strict=True)]
            for patch, share in zip(patches, each, strict=True):
                patch.shares[torch.is_grad_enabled()] = share

    def close(self) -> None:
        """The forward is over."""
        self.forward = None


class Share:
    """What was derived for one patch, or made of that its dW, and the means to know whether it still holds."""

    def __init__(self, shares: Shares, patch: Deriving, tensors: tuple[Tensor, ...], change: Tensor | None = None) -> None:
        self.shares, self.forward, self.tensors, self.change = shares, shares.forward, tensors, change
        self.stamp = patch.stamp()

    @property
    def is_due(self) -> bool:
        """Whether the forward that it was derived for is under way."""
        return self.shares.forward is self.forward

    def serves(self, patch: Deriving) -> bool:
        """Whether the patch may use it now."""
        # In a backward pass a layer runs because checkpointing runs it again.
        again = torch._C._current_graph_task_id() != -1  # pyright: ignore[reportPrivateUsage]
        return (self.is_due or again) and patch.stamp() == self.stamp


class _Held(dict[bool, Share]):
    """What a patch holds, and no copy of it: that has to derive its own."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Held":
        return _Held()
