"""Putting a whole `Stack` on a base and taking it off again, exact in both directions.

Constant strengths are fused: the dW of every patch is computed from the original weight in float32, summed, and rounded
once (`attachment.Fusion`), so neither the order nor the number of deltas matters and sampling pays nothing for them.
"""

from collections.abc import Mapping
from typing import Protocol, Self

from torch import nn

from vgm_peft.attachment import Attachment, Fusion
from vgm_peft.delta import Delta
from vgm_peft.errors import BaseModelError, DeltaError
from vgm_peft.family import Base
from vgm_peft.stack import handle as one
from vgm_peft.stack.controls import Controls
from vgm_peft.stack.recipe import Stack


class Applied:
    """A stack on a base. A context manager; `remove` (idempotent) gives the base back bit for bit.

    The base's own stock pipeline then draws what the stack says, once `controls` were shown the size; `deltas` are the
    deltas by their names in the stack.
    """

    def __init__(self, base: Base, stack: Stack, *, given: Mapping[str, Delta] | None = None, fuse: bool = True) -> None:
        """Put everything on; all of it is read and checked before the first weight is touched."""
        _check_base(base, stack)
        self.base, self.stack = base, stack
        self._undo: list[_Removable] = []
        # Sorted: float addition does not commute to the last bit, the same stack in another order should.
        uses = sorted((use.file, use.strength) for use in stack.deltas if use.strength != 0.0)
        self.deltas = {file: self._read(file, given or {}) for file, _ in uses}
        self.notices: list[str] = []
        """What the user should know."""
        self.controls = Controls(base, stack)
        self._undo.append(self.controls)
        try:
            self._put_on(uses, fuse)
            self._put_words(self.controls.networks)
            self.controls.put_on()
        except BaseException:
            self.remove()
            raise

    def _read(self, file: str, given: Mapping[str, Delta]) -> Delta:
        delta = given[file] if file in given else one.read_delta(self.stack.path(file), self.base)
        one.fits(self.base, delta, file)
        return delta

    def _put_on(self, uses: list[tuple[str, float]], fuse: bool) -> None:
        base = self.base
        if not (fuse and self._fuse(uses)):
            for file, strength in uses:
                self._undo.append(Attachment(base.parts, one.ready(self.deltas[file], base), strength))

    def _put_words(self, beside: list[nn.Module]) -> None:
        """Put the words on in the stack's own order, by which the later of two with one token gets another."""
        from vgm_peft.words import WordAttachment

        files = [use.file for use in self.stack.deltas if use.file in self.deltas]
        brought = [(file, word) for file in files for word in self.deltas[file].words.values()]
        if not brought:
            return
        attachment = WordAttachment(self.base.pipe, [word for _, word in brought], rename=True, beside=beside)
        self._undo.append(attachment)
        for (file, word), token in zip(brought, attachment.rows, strict=True):
            if token != word.token:
                self.notices.append(one.renamed(file, word.token, token))

    def _fuse(self, uses: list[tuple[str, float]]) -> bool:
        try:
            self._undo.append(Fusion(self.base.parts, [(self.deltas[file], strength) for file, strength in uses]))
        except DeltaError:  # quantised, offloaded or shared weights: live works, or says in its turn what does not fit
            return False
        return True

    def remove(self) -> None:
        """Take everything off, the last that was put on first."""
        while self._undo:
            self._undo.pop().remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


class _Removable(Protocol):
    def remove(self) -> None: ...


def _check_base(base: Base, stack: Stack) -> None:
    if stack.base_digest and base.digest and stack.base_digest != base.digest:
        raise BaseModelError(
            f"{base.source}: its weights are not those the stack was made with (SHA-256 {base.digest[:12]}...)",
            expected=f"{stack.base_digest[:12]}...",
            fix="use that base, or delete base_digest from the stack",
        )
