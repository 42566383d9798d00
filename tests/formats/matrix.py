"""What every target can have of every kind, found by exporting: the table in docs/formats.md.

    .venv/bin/python -m tests.formats.matrix

writes the table of what is found into the page; the tests compare the page with it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tests.formats.ground import difference, shake
from vgm_peft import formats
from vgm_peft.delta import Delta
from vgm_peft.deltas import TABLE
from vgm_peft.errors import DeltaError
from vgm_peft.family import Base
from vgm_peft.formats.export import Exported, Wishes, export
from vgm_peft.formats.targets import TOOLS
from vgm_peft.site import Op, choose, locate

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
BEGIN, END = "<!-- matrix: begin (.venv/bin/python -m tests.formats.matrix writes it) -->", "<!-- matrix: end -->"
FAMILIES = ("sd15", "sdxl")
SITES = (
    "unet.mid_block.resnets.0.conv1",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "unet.mid_block.attentions.0.norm",
)
"""A layer of every sort, and where they have one its bias."""
OPTIONS: dict[str, dict[str, Any]] = {
    "krona": {"a1": 4, "a2": 2},
    "lora": {"rank": 2, "alpha": 1.0},
    "dora, by output": {"rank": 2},
    "dora, by input": {"rank": 2, "axis": "input"},
    "pissa": {"rank": 2},
    "dylora": {"rank": 4},
    "tlora": {"rank": 2},
    "lokr": {"rank": 1},
    "loha": {"rank": 2},
    "oft": {"block": 2},
    "oft, linear by input": {"block": 2, "side": "input"},
    "boft": {},
    "boft, linear by input": {"side": "input", "factors": 1},
    "hra": {"rank": 4},
    "glora": {"rank": 2},
    "ia3": {},
    "ia3, linear by input": {"on_input": True},
    "diff, weights": {},
    "diff, norms and biases": {},
    "bitfit": {},
    "norm": {},
    "difffit": {},
    "svdiff, weights": {},
    "vera": {"rank": 4},
    "fourierft": {"frequencies": 200},
    "fourierft, linear": {"frequencies": 200},
    "c3a": {},
    "c3a, linear": {},
}
"""Row -> options of the kind that it begins with: such as have on tiny layers the place that the usual ones have on large."""
EVERY: tuple[Op, ...] = ("linear", "conv", "norm", "bias")
ONLY: dict[str, tuple[Op, ...]] = {
    "weights": ("linear", "conv"),
    "linear": ("linear",),
    "linear by input": ("linear",),
    "norms and biases": ("norm", "bias"),
}
"""What a row's name says of its layers -> the sorts of them."""
WORDS = {"as it is": "exact", "as a LoRA": "exact, as LoRA", "densely": "exact, as diff", "nearly": "approximate"}
"""How patches went -> what the table says, the worst last."""


@dataclass(frozen=True)
class Cell:
    """What a target can have of a kind."""

    word: str
    remarks: tuple[str, ...] = ()


def trained(base: Base, row: str) -> Delta:
    """A delta of a row's kind with random values, on a layer of every sort."""
    name, _, only = row.partition(", ")
    method, ops = TABLE[name], TABLE[name].ops & {*ONLY.get(only, EVERY)}
    sites = [site for site in choose(base.sites, SITES, {}, EVERY) if site.op in ops]
    delta = Delta.fit(base.family.name, method, sites, method.Options(**OPTIONS[row])).start(base.parts).train(False)
    return shake(delta, size=0.2)


def found(base: Base, delta: Delta, tool: str, folder: Path) -> Cell:
    """Export a delta, see for ourselves that the files mean the same, and say how it went."""
    try:
        made = export(delta, folder / "x.safetensors", tool, base)
        check_exact(made, delta, base)
    except DeltaError:
        try:
            made = export(delta, folder / "y.safetensors", tool, base, Wishes(approximate=1))
        except DeltaError:
            return Cell("refused")
    ways = set(made.plan.ways.values())
    return Cell([word for way, word in WORDS.items() if way in ways][-1], tuple(made.plan.remarks))


@torch.no_grad()
def check_exact(made: Exported, delta: Delta, base: Base, bound: float = 1e-5) -> None:
    """Assert that the files, read as anyone's, change the base's tensors by the same dW, and no others."""
    read: dict[str, Any] = {}
    for file in made.files:
        read |= formats.read(file, base).patches
    for name in {*read, *delta.patches}:
        site = (delta.patches.get(name) or read[name]).site
        weight = getattr(locate(base.parts, site), site.tensor)
        ours, theirs = (patches[name].change(weight) if name in patches else None for patches in (delta.patches, read))
        if ours is None or theirs is None:
            alone = theirs if ours is None else ours
            assert alone is None or not bool(alone.any()), f"{name} is only on one side"
        else:
            assert difference(theirs, ours) <= bound, name


def rows(base: Base) -> Iterator[tuple[str, dict[str, Cell]]]:
    """Every row for one family: its name and, by tool, its cell."""
    for row in OPTIONS:
        delta = trained(base, row)
        with TemporaryDirectory() as folder:
            yield row, {tool: found(base, delta, tool, Path(folder) / tool) for tool in TOOLS}


def table(tables: dict[str, dict[str, dict[str, Cell]]]) -> str:
    """The table of what was found: family -> row -> tool -> cell; families that agree share a line."""
    head = ["kind", "family", *TOOLS]
    lines, notes = [" | ".join(head), "|".join(["---"] * len(head))], dict[str, int]()
    for row in OPTIONS:
        said = {family: [_said(cell, notes) for cell in cells[row].values()] for family, cells in tables.items()}
        alike = len({tuple(words) for words in said.values()}) == 1
        for family, words in list(said.items())[: 1 if alike else None]:
            lines.append(" | ".join([row, ", ".join(said) if alike else family, *words]))
    foot = "\n".join(f"{number}. {note}" for note, number in notes.items())
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines) + f"\n\n{foot}\n"


def _said(cell: Cell, notes: dict[str, int]) -> str:
    marks = [notes.setdefault(remark, len(notes) + 1) for remark in cell.remarks]
    return cell.word + "".join(f" [{mark}]" for mark in sorted(marks))


def written(page: str) -> str:
    """The table that a page has."""
    return page.partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    """Find the table and write it into the page."""
    from vgm_peft.families import family_named

    families = {name: family_named(name) for name in FAMILIES}
    bases = {name: Base(family.tiny(), family, f"tiny {name}").freeze() for name, family in families.items()}
    page = PAGE.read_text(encoding="utf-8")
    new = table({name: dict(rows(base)) for name, base in bases.items()})
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{new}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
