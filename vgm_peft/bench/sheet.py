"""What a comparison came to: a picture per subject with a column per method and a row per seed, and a table."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vgm_peft.bench.methods import base_record
from vgm_peft.bench.plan import Plan, Record
from vgm_peft.picture import INK, MUTED, PAPER, grid, write_image
from vgm_peft.train.durable import write_text

if TYPE_CHECKING:
    from PIL import Image

SIDE, LINE = 176, 17
"""Pixels: the picture in a cell, a line of numbers under it."""
ACROSS = 8
"""Columns side by side; further ones go below."""
LABELS = (
    ("identity", "likeness to the subject"),
    ("prompt", "class and background as asked"),
    ("drift", "how far pictures of other prompts moved"),
)
SCORES = ("identity", "closed", "prompt", "leak", "class_kept", "drift")
HEAD = (
    "| method | identity | closed | prompt | leak | class kept | drift | trained | step, ms | file |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def write_sheets(plan: Plan, records: Sequence[Record]) -> list[Path]:
    """Write `<subject>.png` for every subject and `methods.md` for all into the plan's folder; return what was written."""
    written: list[Path] = []
    for subject in plan.subjects:
        own = [r for r in records if r["subject"] == subject]
        written.append(write_image(draw(plan, subject, own), plan.output / f"{subject}.png"))
    text = "\n\n".join(tell(plan, subject, [r for r in records if r["subject"] == subject]) for subject in plan.subjects)
    return [*written, write_text(plan.output / "methods.md", text + "\n")]


def tell(plan: Plan, subject: str, records: Sequence[Record]) -> str:
    """Return a Markdown table: mean and, after ±, standard deviation over the seeds."""
    base = _base(plan, subject)["scores"]
    rows = [
        "| (base) | " + " | ".join("0" if k in ("closed", "drift") else f"{base[k]:.3f}" for k in SCORES) + " | | | |",
    ]
    for method in plan.methods:
        own = [r for r in records if r["method"] == method]
        cells = [_spread([r["scores"][key] for r in own]) for key in SCORES]
        cells += [f"{own[0]['trained']:,}", f"{own[0]['step_ms']:.0f}", size(own[0]["file_bytes"])]
        rows.append(f"| {method} | " + " | ".join(cells) + " |")
    steps = sorted({r["steps"] for r in records})
    title = f"Subject {subject}, {plan.seeds} seeds, {', '.join(map(str, steps))} steps, {plan.pictures} pictures each."
    return "\n".join([title, "", HEAD, *rows])


def draw(plan: Plan, subject: str, records: Sequence[Record]) -> "Image.Image":
    """Draw the grid of one subject: the base, then every method; under each picture its run's numbers."""
    base = _base(plan, subject)
    from PIL import Image

    found = {(r["method"], r["seed"]): r for r in records}
    columns = ["the base, no token", *plan.methods]
    sheets: list[Image.Image] = []
    for start in range(0, len(columns), ACROSS):
        part = columns[start : start + ACROSS]
        rows: list[list[Image.Image | None]] = []
        for seed in range(plan.seeds):
            row: list[Image.Image | None] = []
            for name in part:
                record = found.get((name, seed))
                if record is None:  # the base, which has no seeds
                    path = base_record(plan, subject).with_suffix(".png")
                    row.append(_cell(path, _base_lines(base)) if seed == 0 else None)
                else:
                    row.append(_cell(plan.output / "runs" / f"{subject}-{name}-{seed}.png", _lines(record)))
            rows.append(row)
        last = start + ACROSS >= len(columns)
        caption = "; ".join(f"{short}: {long}" for short, long in LABELS) + "; step: all methods in turns on one machine"
        sheets.append(grid(rows, part, [f"seed {s}" for s in range(plan.seeds)], caption if last else ""))
    return _stacked(sheets)


def _base(plan: Plan, subject: str) -> Record:
    return json.loads(base_record(plan, subject).read_text(encoding="utf-8"))


def _lines(record: Record) -> list[str]:
    s = record["scores"]
    return [
        f"identity {s['identity']:.2f}   prompt {s['prompt']:.2f}",
        f"drift {s['drift']:.3f}   {record['step_ms']:.0f} ms a step",
        f"{record['trained']:,} values   {size(record['file_bytes'])}",
    ]


def _base_lines(base: Record) -> list[str]:
    s = base["scores"]
    return [f"identity {s['identity']:.2f}   prompt {s['prompt']:.2f}", "drift 0", ""]


def _cell(path: Path, lines: Sequence[str]) -> "Image.Image":
    """A picture with its numbers below, at the size that `grid` leaves as it is."""
    from PIL import Image, ImageDraw, ImageFont

    cell = Image.new("RGB", (SIDE, SIDE + LINE * len(lines) + 8), PAPER)
    with Image.open(path) as picture:
        cell.paste(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS), (0, 0))
    pen = ImageDraw.Draw(cell)
    for number, line in enumerate(lines):
        font = ImageFont.load_default(12)
        pen.text((2, SIDE + 4 + number * LINE), line, font=font, fill=MUTED if number else INK)
    return cell


def _stacked(sheets: "Sequence[Image.Image]") -> "Image.Image":
    from PIL import Image

    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), PAPER)
    above = 0
    for sheet in sheets:
        whole.paste(sheet, (0, above))
        above += sheet.height
    return whole


def _spread(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def size(count: int) -> str:
    """Return a number of bytes in words."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"
