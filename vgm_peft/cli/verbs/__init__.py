"""The verbs of `vgm-delta` that are tools, one a file: `add_verb` declares the flags cheaply, `run` does the work.

Those that make a delta write it through `output`; `table` and `bytes_in_words` are how all of them print.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgm_peft.errors import ConfigError

if TYPE_CHECKING:
    from vgm_peft.tools.checkpoint import Checkpoint

Verbs = Any
"""What `add_subparsers` returns, which argparse does not export."""


def checkpoint(name: str | None) -> "Checkpoint | None":
    """Open the base that a flag names, if it names one."""
    from vgm_peft.tools.checkpoint import Checkpoint

    return None if name is None else Checkpoint(name)


def weighted(text: str) -> tuple[Path, float]:
    """Read `FILE:WEIGHT`, or `FILE` for a weight of 1. Raises `ConfigError` for a weight that is no number."""
    file, colon, number = text.rpartition(":")
    if not colon or "/" in number or number.endswith(".safetensors"):
        return Path(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = float("nan")
    if not abs(weight) < 1e6:
        raise ConfigError(f'{text}: the weight "{number}"', expected="a number, as in me.safetensors:0.8")
    return Path(file), weight


def table(head: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Lay rows out in columns, the first to the left and the others to the right."""
    wide = [max(len(row[n]) for row in (head, *rows)) for n in range(len(head))]
    lines: list[str] = []
    for row in (head, *rows):
        cells = [cell.rjust(w) if n else cell.ljust(w) for n, (cell, w) in enumerate(zip(row, wide, strict=True))]
        lines.append(indent + "  ".join(cells).rstrip())
    return "\n".join(lines)


def on_one_line(text: str) -> str:
    """Text from a stranger's file on one line: control characters escaped, at most 100 letters."""
    plain = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:200])
    return plain if len(plain) <= 100 else plain[:97] + "..."


def bytes_in_words(size: float) -> str:
    """Return `4.2 MiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{size:.0f} bytes"
        size /= 1024
    return f"{size:.3g} GiB"
