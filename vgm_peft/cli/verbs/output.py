"""Where a verb writes and for which tool, checked before the work begins; what came of it, told after it.

Every delta that a verb makes is written through `export`, so that none writes what a tool would not load rightly.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vgm_peft.cli.verbs import bytes_in_words, table
from vgm_peft.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from vgm_peft.delta import Delta
    from vgm_peft.formats.export import Exported
    from vgm_peft.formats.plan import Plan

DTYPES = ("float32", "float16", "bfloat16")
WORST = 8


@dataclass(frozen=True)
class Output:
    """A file, or a folder for peft, to be written for a tool."""

    path: Path
    tool: str
    dtype: "torch.dtype | None" = None

    def write(self, delta: "Delta") -> str:
        """Export a delta, print what became of its layers, and return its size in words. Raises as `formats.export` does."""
        from vgm_peft.formats.export import Wishes, export

        made = export(delta, self.path, self.tool, wishes=Wishes(dtype=self.dtype))
        print(told(made), end="")
        return bytes_in_words(sum(file.stat().st_size for file in made.files))


def asked_for(args: argparse.Namespace, inputs: Sequence[Path]) -> Output:
    """Read `--output` and `--for`; where no tool is named, that is the spelling and the dtype of the first file read.

    Raises `ConfigError` for a tool that is not known, a name that it would not find, or a file that is read.
    """
    from vgm_peft import formats
    from vgm_peft.formats.targets import TARGETS, target_named

    spelled = [formats.sniff(file) for file in inputs[:1]]
    tool: str = args.target or spelled[0]
    if not args.target and tool not in TARGETS:
        raise ConfigError(f"{inputs[0]}: files of its layout are read, not written", fix="name a tool with --for")
    rounded = spelled and "native" not in (target_named(tool).name, spelled[0])
    return Output(checked(args.output, inputs, tool), tool, _dtype(inputs[0]) if rounded else None)


def checked(path: Path, inputs: Iterable[Path], tool: str) -> Path:
    """Return a path that a tool's file can have. Raises `ConfigError` for one that it would not find, or that is read."""
    from vgm_peft.formats.export import file_name

    if file_name(tool).endswith(".safetensors") and path.suffix != ".safetensors":
        raise ConfigError(f"--output {path}", expected="a name that ends in .safetensors, by which other tools find it")
    if any(path.resolve() == file.resolve() for file in inputs):
        raise ConfigError(f"--output {path} is a file that is read", fix="choose another name")
    return path


def dtype_named(name: str | None) -> "torch.dtype | None":
    """Read `--dtype`. Raises `ConfigError` for one that files do not come in."""
    import torch

    if name is None:
        return None
    if name not in DTYPES:
        raise ConfigError(f"--dtype {name}", expected="one of " + ", ".join(DTYPES))
    return getattr(torch, name)


def _dtype(file: Path) -> "torch.dtype | None":
    """The dtype that most values of a file are stored in."""
    from math import prod

    from vgm_peft.formats import files_of, open_header
    from vgm_peft.formats.canonical import DTYPES

    counts: Counter[str] = Counter()
    for entry in (entry for part in files_of(file) for entry in open_header(part).tensors.values()):
        counts[entry.dtype] += prod(entry.shape)
    return DTYPES[max(counts, key=counts.__getitem__)] if counts else None


def told(made: "Exported") -> str:
    """What became of the layers, the errors of what is only near, what to know of the tool; nothing if all went as it is."""
    plan = made.plan
    ways = Counter(plan.ways.values())
    lines = [] if set(ways) <= {"as it is"} else [", ".join(f"{count} layers {way}" for way, count in ways.items())]
    if plan.losses:
        lines += [f"approximated: {plan.loss:.2%} of the change is lost in all (Frobenius norm)", _losses(plan)]
    lines += [f"note: {remark}" for remark in plan.remarks]
    return "".join(f"  {line}\n" for line in lines)


def _losses(plan: "Plan") -> str:
    worst = sorted(plan.losses.items(), key=lambda item: -item[1].share)
    rows: list[Sequence[str]] = [(name, str(loss.rank), f"{loss.share:.2%}") for name, loss in worst[:WORST]]
    more = [] if len(worst) <= WORST else [(f"and {len(worst) - WORST} layers that lose less", "", "")]
    return table(("layer", "rank", "lost"), [*rows, *more], "    ").lstrip()
