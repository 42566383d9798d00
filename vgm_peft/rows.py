"""Which rows of a batch a delta acts on, so that several pictures in one forward may have different deltas.

A patch sees the rows as if they were all there is, and adds to the layer's output there. So it acts alike whatever its kind,
and the other rows are, bit for bit, those of a forward without it.
"""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vgm_peft.delta import Call, Patch
from vgm_peft.errors import DeltaError

Rows = slice | Tensor
"""Rows of a batch: a slice, or their numbers, (N,)."""


class Selection:
    """The rows that one delta acts on, in batches whose size is noted at every call of a part of the base."""

    def __init__(self, rows: Rows) -> None:
        """Raises `DeltaError` for what numbers no rows."""
        if isinstance(rows, Tensor) and (rows.dim() != 1 or rows.dtype not in (torch.int32, torch.int64)):
            raise DeltaError(f"rows of shape {tuple(rows.shape)}, {rows.dtype}", expected="the numbers of rows, (N,)")
        self.rows = rows
        ends = (rows.tolist() if isinstance(rows, Tensor) else [rows.start or 0, (rows.stop or 0) - 1]) or [0]
        self._needed = max(max(ends) + 1, -min(ends) if isinstance(rows, Tensor) else 0)
        self._sizes: dict[str, int] = {}

    def note(self, part: str, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note how many rows a call of a part has, those of its first argument (a forward pre-hook)."""
        given = signature(root.forward).bind_partial(*args, **kwargs).arguments.values()
        self._sizes[part] = next((len(a) for a in given if isinstance(a, Tensor) and a.dim()), 1)

    def size(self, part: str, rows: int) -> int:
        """Return the size of the batch at a layer that has so many rows: one row may serve all of the call's."""
        size = max(self._sizes.get(part, 1), 1) if rows == 1 else rows
        if size < self._needed:
            raise DeltaError(f"a delta on the rows {self.rows} of a call with {size}", expected="rows that the call has")
        return size

    def none_of(self, size: int) -> bool:
        """Whether no row of a batch is chosen."""
        return not (len(self.rows) if isinstance(self.rows, Tensor) else len(range(*self.rows.indices(size))))

    def of(self, values: Tensor) -> Tensor:
        """Return the rows of what has one for each of the batch's; what has one for all of them is left as it is."""
        return values if values.dim() == 0 or len(values) == 1 else values[self.rows]


class Turn(NamedTuple):
    """One patch that acts in a forward: how strongly, and on which rows if not on all."""

    patch: Patch
    strength: float
    selection: Selection | None


def add_to_rows(turns: Sequence[Turn], output: Tensor, call: Call, base_of: Callable[[Patch], Tensor]) -> Tensor:
    """Return a layer's output to which patches have added, each on rows of its own.

    `call` is the layer's; the base in it is nobody's, `base_of` gives each patch its own.
    """
    x, plain = call.x, call.plain
    chosen = [(t.patch, t.strength, t.selection) for t in turns if t.selection is not None]
    size = max(selection.size(patch.site.part, len(x)) for patch, _, selection in chosen)
    if all(selection.none_of(size) for _, _, selection in chosen):
        return output
    if len(x) < size:  # it serves all rows at once, as the embedding of positions does
        x, output = (t.expand(size, *t.shape[1:]) for t in (x, output))
        plain = None if plain is None else plain.expand(size, *plain.shape[1:])
    output = output.clone()
    for patch, strength, selection in chosen:
        if not selection.none_of(size):
            rows = selection.rows
            part = Call(x[rows], call.layer, base_of(patch), None if plain is None else plain[rows])
            output[rows] = patch.add_to(output[rows], part, strength)
    return output
