"""The preflight: what the folders of pictures hold, told and refused before a model is loaded, and kept with the run.

Every file is accounted for first; how pictures fall into buckets follows as soon as the size is known for which the base was
made. What is wrong stops the run here unless the user allows it.
"""

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vgm_peft.data import (
    Faults,
    Framing,
    Report,
    View,
    bucket_table,
    check_sizes,
    describe_views,
    plan_views,
    scan_all,
)
from vgm_peft.data.pictures import shown
from vgm_peft.errors import DataError
from vgm_peft.families import Size
from vgm_peft.train.config import RunConfig
from vgm_peft.train.durable import write_text

TEXT, TABLE = "data.md", "data.json"


def survey(config: RunConfig, quiet: bool = False) -> Report:
    """Read every file of the run's folders. Raises `DataError` for what is wrong with them and not in `data.allow`."""
    from tqdm import tqdm

    sources = config.task_class().sources(config)
    with tqdm(desc="reading pictures", leave=False, disable=quiet) as bar:

        def tell(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return scan_all(sources, frozenset(config.data.allow), tell)


@contextmanager
def kept_when_refused(folder: Path) -> Generator[None]:
    """Keep what is wrong with the pictures in the run's folder too, one thing a line, and say where it is."""
    try:
        yield
    except DataError as error:
        wrong = [f"* {_cell(line.strip())}" for line in error.what.splitlines()]
        cure = [_cell(text) for text in (error.expected and f"Expected: {error.expected}.", error.fix) if text]
        path = write_text(folder / TEXT, "\n".join(["# What is wrong with the pictures", "", *wrong, "", *cure]) + "\n")
        fix = f"{error.fix.rstrip('. ')}; " if error.fix else ""
        raise DataError(error.what, expected=error.expected, fix=f"{fix}{path} has it line by line") from None


def framing(config: RunConfig, size: Size) -> Framing:
    """How the run cuts its pictures for a base of this size."""
    data = config.data
    sides = dict.fromkeys((data.resolution or size.resolution, *data.more_resolutions))
    return Framing(sides=tuple(sides), step=size.step, square=not data.buckets, crops=data.crops, zoom=data.zoom)


def plan(report: Report, config: RunConfig, size: Size) -> list[View]:
    """Put the pictures into buckets. Raises `DataError` for those that are much too small, unless that is allowed."""
    views = plan_views(report.examples, framing(config, size))
    faults = Faults(frozenset(config.data.allow))
    check_sizes(report.examples, views, faults)
    faults.settle(" and ".join(map(str, report.folders)))
    return views


def keep(report: Report, views: Sequence[View], folder: Path) -> None:
    """Write the whole report into a run's folder, for people and for programs."""
    buckets = bucket_table(report.examples, views)
    rows = [dict(zip(("size", "pictures", "seen_per_pass", "crops"), row, strict=True)) for row in buckets]
    write_text(folder / TABLE, json.dumps({**report.table(), "buckets": rows}, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / TEXT, "\n".join(_markdown(report, views)) + "\n")


def _markdown(report: Report, views: Sequence[View]) -> list[str]:
    examples = report.examples
    counts = ", ".join(f"{part} {count}" for part, count in report.counts.items())
    lines = ["# What this run learned from", "", f"{len(report.files)} files: {counts}.", ""]
    lines += [f"* {_cell(note)}" for note in report.notes]
    lines += ["", "| bucket | pictures | seen per pass | crops kept |", "|---|---|---|---|"]
    lines += [f"| {size} | {count} | {seen} | {crops} |" for size, count, seen, crops in bucket_table(examples, views)]
    lines += [
        "",
        *(f"* {_cell(line.removeprefix('note: '))}" for line in describe_views(examples, views) if line.startswith("note")),
    ]
    lines += ["", "| picture | size | repeats | control | mask | caption |", "|---|---|---|---|---|---|"]
    for e in examples:
        beside = [_cell(path.name) if path else "" for path in (e.control, e.mask)]
        cells = [_cell(e.path.name), f"{e.width} x {e.height}", str(e.repeats), *beside, _cell(e.caption)]
        lines.append(f"| {' | '.join(cells)} |")
    if report.ignored:
        lines += ["", "| plays no part | because |", "|---|---|"]
        lines += [f"| {_cell(name)} | {_cell(why)} |" for name, why in report.ignored.items()]
    return lines


def _cell(text: str) -> str:
    """A text that cannot end its cell, its row or its line, nor be taken for a tag."""
    return shown(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
