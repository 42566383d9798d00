"""Putting a whole `Stack` on a base, changing it in place, and taking it off again, exact in all directions.

What is constant is fused: the dW of every patch is computed from the original weight in float32, summed, and rounded once
(`attachment.Fusion`), so neither the order nor the number of deltas matters and sampling pays nothing for them. What changes
from step to step, or acts in a part of the picture alone, acts live (`live`).
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from torch import Tensor

from vgm_peft.attachment import Fusion, Strength
from vgm_peft.delta import Delta
from vgm_peft.errors import BaseModelError
from vgm_peft.family import Base
from vgm_peft.stack.controls import Controls, uses_of
from vgm_peft.stack.handle import renamed
from vgm_peft.stack.held import Held, hold
from vgm_peft.stack.live import Live, Pace, strengths
from vgm_peft.stack.mixing import Mixture
from vgm_peft.stack.recipe import Stack
from vgm_peft.stack.regions import Places
from vgm_peft.stack.uses import DeltaUse
from vgm_peft.word import Word

if TYPE_CHECKING:
    from vgm_peft.words import WordAttachment

Use = tuple[DeltaUse, Delta]


class Applied:
    """A stack on a base. A context manager; `remove` (idempotent) gives the base back bit for bit.

    The base's own stock pipelines then draw what the stack says, once `controls` were shown the size and they are told
    `prompting()`. `deltas` are the deltas by their names in the stack, `live` those of them that are not fused.
    """

    def __init__(self, base: Base, stack: Stack, *, given: Mapping[str, Delta] | None = None, fuse: bool = True) -> None:
        """Put everything on; all of it is read and checked before the first weight is touched."""
        self.base, self.stack, self._fuses = base, Stack(), fuse
        self.deltas: dict[str, Delta] = {}
        self.live: list[Live] = []
        self._renamed: list[str] = []
        self.controls = Controls(base, self.stack)
        self._held: dict[str, Held] = {}
        self._fusion, self._fused = Fusion(base.parts, ()), list[tuple[Delta, Strength]]()
        self._words: WordAttachment | None = None
        self._brought: list[tuple[str, Word]] = []
        self._pace: Pace | None = None
        self._mixture: Mixture | None = None
        self.change(stack, given=given)

    @property
    def notices(self) -> list[str]:
        """What the user should know."""
        return [*self._renamed, *([] if self._mixture is None else self._mixture.notices)]

    def change(self, stack: Stack, *, given: Mapping[str, Delta] | None = None) -> int:
        """Have another stack be on instead, touching only what differs, and return how many modules were fused anew.

        The base is then as if this stack had been put on it plain, bit for bit. Files are read again only if their bytes
        changed; deltas in memory (`given`) must be what they were. What does not fit is refused, and what was on stays on; an
        error later than that (memory that runs out) takes everything off.
        """
        _check_base(self.base, stack)
        held = hold(self.base, stack, given or {}, self._held)
        # In one order, that of their bytes: float addition does not commute to the last bit, but the same stack in another
        # order should draw the same, and so should its files in other places.
        present = (use for use in stack.deltas if use.strength != 0.0)
        uses = sorted(present, key=lambda use: (use.digest or held[use.file].digest, use.file, use.region))
        fused: list[tuple[Delta, Strength]] = []
        live: list[Use] = []
        for use in uses:
            delta, by_site = held[use.file].delta, strengths(use, held[use.file].delta)
            if self._fuses and use.constant and stack.combine == "sum" and held[use.file].fusible:
                fused.append((delta, by_site))
            else:
                live.append((use, delta))
        Places(stack)  # reads the masks
        same = uses_of(stack) == self.controls.uses
        controls = self.controls if same else Controls(self.base, stack, self.controls, self._plain)
        try:
            self.stack, self._held, self.deltas = stack, held, {use.file: held[use.file].delta for use in uses}
            touched = self._fusion.become(fused)
            self._fused = fused
            self._put_on(live, controls)
        except BaseException:
            self.remove()
            raise
        return touched

    @contextmanager
    def _plain(self) -> Generator[None]:
        """Have the base's weights be its own for a while."""
        self._fusion.become(())
        try:
            yield
        finally:
            self._fusion.become(self._fused)

    def _put_on(self, wanted: Sequence[Use], controls: Controls) -> None:
        """Put on what stands above the weights: live deltas, words, side networks, and what mixes them, in this order.

        Hooks act in the order in which they came, so from the first that is another on all are put on anew.
        """
        brought = self._words_of_all()
        kept = _alike([live.delta for live in self.live], [delta for _, delta in wanted])
        stays = kept == len(self.live) == len(wanted) and controls is self.controls
        stays = stays and _alike([w for _, w in brought], [w for _, w in self._brought]) == len(brought) == len(self._brought)
        self._take_off(kept, above=not stays)
        for use, delta in wanted[kept:]:
            self.live.append(Live(self.base, use, delta))
        for live, (use, _) in zip(self.live, wanted, strict=True):
            live.follow(use)
        if not stays:
            self._put_words(brought, controls)
            self.controls = controls
            controls.put_on()
        if self.stack.regions or self.stack.combine != "sum":
            attachments = {live.use.name: live.attachment for live in self.live}
            self._mixture = Mixture(self.base, self.stack, attachments, self.deltas, controls.networks)
        if any(not live.steady for live in self.live):
            self._pace = Pace(self.base, self.live)

    def _words_of_all(self) -> list[tuple[str, Word]]:
        """Return the words of the deltas that act everywhere, in the stack's own order."""
        files = dict.fromkeys(use.file for use in self.stack.deltas if use.file in self.deltas and not use.region)
        return [(file, word) for file in files for word in self.deltas[file].words.values()]

    def _put_words(self, brought: list[tuple[str, Word]], controls: Controls) -> None:
        """Put words on; the later of two with one token gets another."""
        from vgm_peft.words import WordAttachment

        self._renamed, self._brought = [], brought
        if brought:
            words = [word for _, word in brought]
            self._words = WordAttachment(self.base.pipe, words, rename=True, beside=controls.networks)
            for (file, word), token in zip(brought, self._words.rows, strict=True):
                if token != word.token:
                    self._renamed.append(renamed(file, word.token, token))

    def prompting(self) -> dict[str, Tensor]:
        """Read the prompts and return how a call of a stock pipeline is told them; to be asked before every drawing."""
        if self._mixture is None:
            return self.base.family.prompting(self.base, self.stack.prompt, self.stack.negative)
        told = self._mixture.tell()
        if self._pace is not None:
            self._pace.hook()  # before the mixture, which asks who has any strength now
        return told

    def _take_off(self, kept: int, above: bool) -> None:
        """Take off, the last first, what is not to stay: all but some live deltas, and what is above all of these."""
        if self._pace is not None:
            self._pace.remove()
        if self._mixture is not None:
            self._mixture.remove()
        self._pace = self._mixture = None
        if above:
            self.controls.remove()
            if self._words is not None:
                self._words.remove()
            self._words, self._brought = None, []
        while len(self.live) > kept:
            self.live.pop().attachment.remove()

    def remove(self) -> None:
        """Take everything off, the last that was put on first."""
        self._take_off(0, above=True)
        self._fusion.remove()
        self._fused = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def _alike(old: Sequence[object], new: Sequence[object]) -> int:
    """Return how many from the first on are the same objects."""
    pairs = zip(old, new, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a is not b), min(len(old), len(new)))


def _check_base(base: Base, stack: Stack) -> None:
    if stack.base_digest and base.digest and stack.base_digest != base.digest:
        raise BaseModelError(
            f"{base.source}: its weights are not those the stack was made with (SHA-256 {base.digest[:12]}...)",
            expected=f"{stack.base_digest[:12]}...",
            fix="use that base, or delete base_digest from the stack",
        )
