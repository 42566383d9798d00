"""In which ways each picture is shown: at which sizes, cut where, how often; and the table that says so before a run.

Every way is planned, encoded and cached before the first step; a step only chooses. So flips, crops and several resolutions
cost nothing while training, and a resumed run chooses what the uninterrupted one would have chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vgm_peft.data.buckets import Crop, further_crops, plan_crops
from vgm_peft.data.faults import Faults
from vgm_peft.data.faults import names as listed
from vgm_peft.data.pictures import shown
from vgm_peft.data.report import Example

ENLARGED = 2.0
"""A picture that must be enlarged by more is too small for its bucket; smaller enlargements are noted."""
LOST = 0.1
"""Share of a picture's area whose loss to the crop is noted."""


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How pictures are cut: for squares of these `sides` in pixels, all `step`s long; `square`, or in aspect buckets."""

    sides: tuple[int, ...]
    step: int
    square: bool = False
    crops: int = 1
    zoom: float = 1.0


@dataclass(frozen=True)
class View:
    """A picture at one size: its example's number, and the crops to that size of which each turn takes one."""

    example: int
    crops: tuple[Crop, ...]

    @property
    def target(self) -> tuple[int, int]:
        """Width and height in pixels: its bucket."""
        return self.crops[0].target


def plan_views(examples: Sequence[Example], framing: Framing) -> list[View]:
    """Return the ways in which each example is shown, one for each side.

    A picture too small for one side takes the next smaller one's size instead, so that all are seen equally often.
    """
    sizes = [(e.width, e.height) for e in examples]
    levels = [plan_crops(sizes, side, framing.step, square=framing.square) for side in sorted(framing.sides)]
    out: list[View] = []
    for i, example in enumerate(examples):
        best = levels[0][i]
        for level in levels:
            best = best if level[i].upscaled else level[i]
            out.append(View(i, further_crops(best, example.digest, framing.crops, framing.zoom)))
    return out


def check_sizes(examples: Sequence[Example], views: Sequence[View], faults: Faults) -> None:
    """Note as a fault which pictures would have to be enlarged by more than `ENLARGED`."""
    small = {v.example: v.crops[0] for v in views if v.crops[0].scaled[0] > ENLARGED * v.crops[0].original[0]}
    if small:
        names = listed([f"{shown(examples[i].path.name)} ({_by(c.original)} for {_by(c.target)})" for i, c in small.items()])
        fix = "use larger pictures, or train at a smaller data.resolution"
        faults.add(f"pictures much smaller than what they are trained at: {names}", fix, kind="tiny")


def bucket_table(examples: Sequence[Example], views: Sequence[View]) -> list[tuple[str, int, int, int]]:
    """Each bucket: its size, its pictures, how often pictures of it come up in a pass (repeats count), and their crops."""
    rows: dict[tuple[int, int], list[View]] = {}
    for view in views:
        rows.setdefault(view.target, []).append(view)
    return [
        (
            _by(target),
            len({v.example for v in found}),
            sum(examples[v.example].repeats for v in found),
            sum(len(v.crops) for v in found),
        )
        for target, found in sorted(rows.items())
    ]


def describe_views(examples: Sequence[Example], views: Sequence[View]) -> list[str]:
    """Say in lines which buckets there are, and which pictures are enlarged or lose over a tenth."""
    lines = ["bucket        pictures  seen per pass  crops kept"]
    lines += [f"{size:<12}  {count:8}  {seen:13}  {crops:10}" for size, count, seen, crops in bucket_table(examples, views)]
    first = {view.example: view.crops[0] for view in reversed(views)}
    pairs = [(examples[i], crop) for i, crop in sorted(first.items())]
    larger = [f"{shown(e.path.name)} ({_by(c.original)} to {_by(c.scaled)})" for e, c in pairs if c.upscaled]
    cut = [f"{shown(e.path.name)} ({c.lost:.0%})" for e, c in pairs if c.lost > LOST]
    lines += [f"note: enlarged: {listed(larger)}"] if larger else []
    lines += [f"note: the crop takes much of: {listed(cut)}"] if cut else []
    return lines


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
