"""The verbs of `vgm-delta` that are tools, one a file: `add_verb` declares the flags cheaply, `run` does the work.

`table` and `bytes_in_words` are how all of them print.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgm_peft.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from vgm_peft.delta import Delta
    from vgm_peft.tools.checkpoint import Checkpoint

Verbs = Any
"""What `add_subparsers` returns, which argparse does not export."""


def checkpoint(name: str | None) -> "Checkpoint | None":
    """Open the base that a flag names, if it names one."""
    from vgm_peft.tools.checkpoint import Checkpoint

    return None if name is None else Checkpoint(name)


def output(args: argparse.Namespace, inputs: Iterable[Path]) -> Path:
    """The file that `--output` names. Raises `ConfigError` when it is none that other tools find, or one of those read."""
    path: Path = args.output
    if path.suffix != ".safetensors":
        raise ConfigError(f"--output {path}", expected="a name that ends in .safetensors, by which other tools find it")
    if any(path.resolve() == file.resolve() for file in inputs):
        raise ConfigError(f"--output {path} is a file that is read", fix="choose another name")
    return path


def write(delta: "Delta", path: Path, like: Path, tool: str | None) -> Path:
    """Write a delta for a tool, or in the spelling and the dtype of the file `like`."""
    from vgm_peft import formats

    form = formats.sniff(like) if tool is None else formats.format_named(tool).name
    foreign = form != "native" and formats.sniff(like) != "native"
    return formats.write(delta, path, form, dtype=_dtype(like) if foreign else None)


def _dtype(file: Path) -> "torch.dtype | None":
    """The dtype that most values of a file are stored in."""
    from math import prod

    from vgm_peft.formats import file_of, open_header
    from vgm_peft.formats.canonical import DTYPES

    counts: dict[str, int] = {}
    for entry in open_header(file_of(file)).tensors.values():
        counts[entry.dtype] = counts.get(entry.dtype, 0) + prod(entry.shape)
    return DTYPES[max(counts, key=counts.__getitem__)] if counts else None


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


def shown(text: str) -> str:
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
