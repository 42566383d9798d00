"""`python -m vgm_peft.toybox evaluate-side`: put a side network beside a base, judge it, print, and keep a grid to look at."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import cast

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vgm_peft import families
from vgm_peft.beside import Beside
from vgm_peft.errors import SaveError
from vgm_peft.picture import grid, write_image
from vgm_peft.sides import open_side
from vgm_peft.toybox.evaluate import Sampling, TextToImage
from vgm_peft.toybox.evaluate_side import IMAGE, Drawn, Exam, SideMeasure, measure_side, measured, set_exam
from vgm_peft.toybox.oracle import Oracles

GRID, SCORES = "grid.png", "scores.json"
ROWS = 6
"""Scenes in the grid: the first ones, which are of as many classes."""


def run(args: argparse.Namespace) -> None:
    """Judge, print JSON or a table, and write `grid.png` and `scores.json` where a folder is named."""
    exam = set_exam(args.kind, args.count, args.seed, placed=not args.unplaced)
    base = families.load(args.base, device=args.device)
    base.pipe.set_progress_bar_config(disable=True)
    how = Sampling(steps=args.steps, guidance=base.guidance(args.guidance), seed=args.seed, batch=args.batch)
    side, network = open_side(args.network, base)
    with (
        Beside(base, side, network, args.strength) as beside,
        tqdm(total=2 * args.count, desc="held-out scenes", unit="picture", disable=args.json) as bar,
    ):
        pipe = cast(TextToImage, base.pipe)
        found, drawn = measure_side(pipe, beside, exam, how, Oracles.load(), lambda n: cast(None, bar.update(n)))
    report = {"network": str(args.network), "side": side.name, "strength": args.strength, **found.table()}
    report |= {"prompt": exam.prompts[0].text, "steps": how.steps, "guidance": how.guidance, "seed": how.seed}
    print(json.dumps(report) if args.json else _lines(found))
    if args.output is not None:
        _keep(args.output, report, sheet(exam, drawn, _headline(found)))


def _lines(found: SideMeasure) -> str:
    """A line a number: uncontrolled, controlled, real renders."""
    scores = (found.uncontrolled, found.controlled, found.real)
    rows = {measured(found.kind): [s.control for s in scores], "prompt agreement": [s.prompt for s in scores]}
    rows |= {f"  {name}": [s.details[name] for s in scores] for name in found.real.details}
    head = f"{f'{found.count} held-out scenes':28}{'uncontrolled':>14}{'controlled':>14}{'real renders':>14}"
    body = [f"{name:28}" + "".join(f"{value:14.4f}" for value in values) for name, values in rows.items()]
    return "\n".join([head, *body, _headline(found)])


def _headline(found: SideMeasure) -> str:
    name, a, b, c = measured(found.kind), found.uncontrolled, found.controlled, found.real
    return (
        f"{name} {b.control:.3f}: {100 * found.share:.0f} % of the way from uncontrolled ({a.control:.3f}) to real renders "
        f"({c.control:.3f}); prompt agreement {100 * a.prompt:.0f} % before, {100 * b.prompt:.0f} % after"
    )


def sheet(exam: Exam, drawn: Drawn, caption: str) -> Image.Image:
    """The first scenes of an exam as rows: what steers, uncontrolled, controlled, real render."""
    shown = exam.shown.mul(255.0).round().byte().permute(0, 2, 3, 1)
    columns = (shown, drawn.uncontrolled, drawn.controlled, exam.real)
    rows = [[_picture(images[i]) for images in columns] for i in range(min(ROWS, len(exam.prompts)))]
    first = "image prompt" if exam.kind == IMAGE else exam.kind
    texts = [prompt.text for prompt in exam.prompts[: len(rows)]]
    return grid(rows, (first, "uncontrolled", "controlled", "real render"), texts, caption)


def _picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.numpy())


def _keep(folder: Path, report: dict[str, object], picture: Image.Image) -> None:
    write_image(picture, folder / GRID)
    try:
        (folder / SCORES).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise SaveError(f"{folder}: {error.strerror or error}", fix="choose a folder that can be written") from error
