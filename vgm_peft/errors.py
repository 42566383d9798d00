"""The few errors of the package: each says what was wrong (value and place), what was expected and what to do.

Commands print `str(error)` as one line and leave with status 2; nothing else is caught on the way, so a traceback always
means a fault of ours and never one of the user's.
"""


class VgmError(Exception):
    """Something the user can mend.

    `what` names the value and the place, `expected` what would have been right, `fix` what to do now. The text of the
    error is the three in one line.
    """

    def __init__(self, what: str, *, expected: str = "", fix: str = "") -> None:
        self.what, self.expected, self.fix = what, expected, fix
        parts = [what.rstrip(". ")]
        if expected:
            parts.append(f"expected {expected.rstrip('. ')}")
        if fix:
            parts.append(fix.rstrip(". "))
        super().__init__("; ".join(parts))


class ConfigError(VgmError):
    """A flag, recipe or option that is unknown, of the wrong type, out of range, or contradicts another."""


class DataError(VgmError):
    """A picture, caption or folder that cannot be used as it is."""


class DeltaError(VgmError):
    """A delta that does not fit: file damaged, tensors left over, another family, an impossible rank or factor.

    What a stranger's file says of itself may stand in it, so it is one line of printable letters whatever it is given.
    """

    def __init__(self, what: str, *, expected: str = "", fix: str = "") -> None:
        super().__init__(_printable(what), expected=_printable(expected), fix=_printable(fix))


class BaseModelError(VgmError):
    """A base model that cannot be found, read or recognised."""


class SaveError(VgmError):
    """A file that could not be written; whatever stood there before is unharmed."""


class TrainError(VgmError):
    """A run that went wrong: not finite, nothing learned, a folder already in use, a checkpoint that does not belong."""


def _printable(text: str) -> str:
    """Return a text with line feeds, control characters, reversed writing and half letters spelled out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def nearest(name: str, known: "list[str] | tuple[str, ...]") -> str:
    """Return `did you mean "x"?` with the known name nearest to `name`, or the list of known names when none is near."""
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f'did you mean "{close[0]}"?'
    return "known: " + ", ".join(sorted(known)[:40])
