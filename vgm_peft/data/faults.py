"""What can be wrong with a folder of pictures, gathered so that all of it is told at once.

A fault of a kind below stops a run unless the user allows that kind; what then happens instead stands beside it. A fault
without a kind (two captions that contradict each other, a mask of other proportions) has no sensible instead.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from vgm_peft.errors import ConfigError, DataError, nearest

KINDS: Mapping[str, str] = {
    "unreadable": "such files are left out",
    "tiny": "they are enlarged",
    "transparent": "they are laid on white",
    "animated": "the first frame is trained",
    "duplicate": "each of them is trained",
    "near-duplicate": "each of them is trained",
    "caption": "pictures without one are trained under the common or the empty text",
    "orphan": "captions, masks and controls of no picture play no part",
    "stray": "files that are neither pictures nor captions play no part",
    "mask": "pictures without a mask count whole",
    "profile": "their colours are taken for sRGB",
}
"""Each kind of fault that `--allow` knows, and what happens when it is allowed."""
MOST = 20
"""Names that one message holds; the rest is counted."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong; `kind` is a key of `KINDS`, or empty when it cannot be allowed."""

    error: DataError
    kind: str = ""


@dataclass
class Faults:
    """What was found wrong so far, and which kinds of it the user allows."""

    allow: AbstractSet[str] = frozenset()
    found: list[Fault] = field(default_factory=list[Fault])
    place: str = ""
    """Where it was found, when that is a part of what is looked at."""

    def within(self, place: str) -> "Faults":
        """Return what gathers faults of a part, among all the others."""
        return replace(self, place=place)

    def add(self, what: str, fix: str, *, kind: str = "", expected: str = "") -> None:
        """Note that something is wrong: what, what to do, and what would have been right."""
        self.take(DataError(what, expected=expected, fix=fix), kind)

    def take(self, error: DataError, kind: str = "") -> None:
        """Note an error that was raised elsewhere."""
        if self.place:
            error = DataError(f"{self.place}: {error.what}", expected=error.expected, fix=error.fix)
        self.found.append(Fault(error, kind))

    def settle(self, place: str) -> tuple[str, ...]:
        """Raise one `DataError` with all that is not allowed; return what is, as notes. `place` begins the message."""
        wrong = [fault for fault in self.found if fault.kind not in self.allow]
        if wrong:
            raise _together(place, wrong)
        return tuple(f"allowed ({fault.kind}): {fault.error.what}; {KINDS[fault.kind]}" for fault in self.found)


def check_kinds(kinds: Iterable[str]) -> None:
    """Raise `ConfigError` for a kind of fault that is none, with the nearest name."""
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f'there is no kind of fault "{kind}" to allow', fix=nearest(kind, list(KINDS)))


def names(found: Sequence[str], most: int = MOST) -> str:
    """Names in one line, the rest counted."""
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def _together(place: str, faults: Sequence[Fault]) -> DataError:
    """All faults as one error whose end says which of them can be allowed."""
    kinds = list(dict.fromkeys(fault.kind for fault in faults if fault.kind))
    hint = ""
    if kinds and all(fault.kind for fault in faults):
        hint = f"or go on all the same with --allow {','.join(kinds)} ({'; '.join(KINDS[kind] for kind in kinds)})"
    if len(faults) == 1:
        error = faults[0].error
        return DataError(f"{place}: {error.what}", expected=error.expected, fix=_joined(error.fix.rstrip(". "), hint))
    lines = "\n".join(f"  {fault.error}{f' [{fault.kind}]' if fault.kind else ''}" for fault in faults)
    return DataError(f"{place}: {len(faults)} things are wrong\n{lines}", fix=hint)


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


Tell = Callable[[int, int], None]
"""Called with the number done and the number in all."""
