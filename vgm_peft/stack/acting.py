"""Which of a stack's live deltas act: in which branches of a call of the denoiser, and at which places of the picture."""

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from vgm_peft.attachment import Attachment
from vgm_peft.rows import Rows

NONE, EVERY = slice(0, 0), slice(None)


@dataclass(frozen=True)
class Branch:
    """One of the forwards that a call of the denoiser is made of; they go through the network together, as rows of a batch."""

    deltas: tuple[str, ...]
    """The live deltas that act in it, by their names in the stack."""
    places: tuple[int, ...]
    """The places of the picture that its answer is for; it reads the prompt of the first, regional attention the others'."""


class Acting:
    """The live deltas of a stack by name, and the rows of a call that each acts on."""

    def __init__(self, attachments: Mapping[str, Attachment], homes: Mapping[str, int]) -> None:
        """Begin with all of them everywhere. `homes` are the places of those that act in one alone, from 1."""
        self._attachments, self._homes = attachments, homes
        self._rows: dict[str, Rows | None] = dict.fromkeys(attachments)

    def is_at(self, name: str, place: int) -> bool:
        """Whether a delta acts at a place."""
        return self._homes.get(name, place) == place

    def is_awake(self, name: str) -> bool:
        """Whether a delta has any strength now."""
        return self._attachments[name].strength != 0.0

    def divide(self, branches: Sequence[Branch], rows: int) -> None:
        """Have each act in its branches of a call that had so many rows: every row of it is one for each branch, in turn."""
        for name in self._attachments:
            mine = [number for number, branch in enumerate(branches) if name in branch.deltas]
            if not mine:
                self._rows[name] = NONE
            elif len(mine) == len(branches):
                # Rows, though they are all: what acts on all may act before the layer runs, where `at` comes too late.
                self._rows[name] = EVERY if name in self._homes and len(branches[0].places) > 1 else None
            elif len(mine) == 1:
                self._rows[name] = slice(mine[0], None, len(branches))
            else:
                self._rows[name] = torch.arange(rows * len(branches)).view(rows, len(branches))[:, mine].flatten()
        self._settle()

    def _settle(self) -> None:
        for name, attachment in self._attachments.items():
            attachment.rows = self._rows[name]

    def at(self, place: int | None) -> None:
        """Have those rest whose home is another place; without one, nobody."""
        for name in self._homes.keys() & self._attachments.keys():
            self._attachments[name].rows = self._rows[name] if place is None or self.is_at(name, place) else NONE

    def rest(self) -> None:
        """Have each act on all rows of whatever is called, as if nothing divided them."""
        self._rows = dict.fromkeys(self._attachments)
        self._settle()

    @contextmanager
    def only(self, names: Collection[str]) -> Generator[None]:
        """Have no others act for a while."""
        try:
            for name, attachment in self._attachments.items():
                attachment.rows = None if name in names else NONE
            yield
        finally:
            self.rest()
