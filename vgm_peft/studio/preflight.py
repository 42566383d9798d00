"""What can be said of a training before it begins: of its pictures, and what it will take of memory and time.

The pictures are judged by the same code that judges them when the training begins (`train.survey`). Memory is what must be
there in any case, and both are what a training alike took on this machine, where there was one; nothing is guessed.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from vgm_peft.errors import DataError
from vgm_peft.studio.jobs import Desk, Past
from vgm_peft.studio.look import clock
from vgm_peft.studio.tickets import base_name
from vgm_peft.studio.uploads import keep_pictures
from vgm_peft.studio.wishes import Wish, recipe_of

if TYPE_CHECKING:
    from vgm_peft.family import Base
    from vgm_peft.train.config import RunConfig

OPTIMISED = 16
"""Bytes for every trained value: itself, its gradient, and the two averages of Adam."""
UNKNOWN = "not known yet: nothing like it was trained here so far"


@dataclass(frozen=True)
class Preflight:
    """What was found; `wrong` says why the training would be refused."""

    pictures: tuple[str, ...]
    recipe: str
    trained: int | None
    memory: str
    time: str
    wrong: str = ""

    def html(self) -> str:
        """For the page, everything escaped."""
        rows = {"Recipe": self.recipe, "Learns": self._learns(), "Memory": self.memory, "Time": self.time}
        told = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in rows.items() if text)
        lines = "".join(f"<li>{escape(line)}</li>" for line in self.pictures)
        head = f'<p class="bad">{escape(self.wrong)}</p>' if self.wrong else '<p class="good">Ready to train.</p>'
        return f"{head}<dl>{told}</dl><ul>{lines}</ul>"

    def _learns(self) -> str:
        return "" if self.trained is None else f"{self.trained:,} values, {in_words(4 * self.trained)} as a file"


def preflight(wish: Wish, files: Sequence[str], desk: Desk, base: "Base") -> Preflight:
    """Look at uploaded pictures and settings as the training would. Raises `VgmError` for what contradicts itself."""
    from vgm_peft.data import bucket_table, describe_views
    from vgm_peft.families import size_of
    from vgm_peft.train.recipes import resolve
    from vgm_peft.train.survey import plan, survey

    settings, past = desk.settings, desk.alike(wish)
    with tempfile.TemporaryDirectory(prefix=".check-", dir=settings.queue) as folder:
        images = Path(folder) / wish.folder_name
        keep_pictures(files, images, settings.upload_count, wish.caption)
        recipe = recipe_of(wish, settings.base, settings.recipe)
        resolved = resolve(wish.table(base_name(settings.base), images, settings.runs / wish.folder_name), recipe)
        wrong, lines = "", list(resolved.notices)
        try:
            report = survey(resolved.config, quiet=True)
            views = plan(report, resolved.config, size_of(base))
            counts = (f"{count} pictures of {size}" for size, count, _, _ in bucket_table(report.examples, views))
            notes = (line for line in describe_views(report.examples, views) if line.startswith("note"))
            lines = [*counts, *notes, *report.notes, *lines]
        except DataError as error:
            wrong = str(error).replace(f"{folder}/", "").replace("--allow ", "the same kind under “Go on in spite of”: ")
        trained = _trained(resolved.config, base)
        name = resolved.recipe.stem if resolved.recipe else "plain settings"
        return Preflight(tuple(lines), name, trained, _memory(resolved.config, base, trained, past), _time(wish, past), wrong)


def _trained(config: "RunConfig", base: "Base") -> int | None:
    """How many values a delta has, made on no device at all; `None` for what is no delta."""
    import torch

    from vgm_peft.train.learner import fit

    if config.delta is None or config.task_class().trains_delta != "always":
        return None
    with torch.device("meta"):
        delta, _ = fit(config, base.family.name, base.sites, base.family.presets)
    return delta.count()


def _memory(config: "RunConfig", base: "Base", trained: int | None, past: Past | None) -> str:
    values = sum(p.numel() for part in base.parts.values() for p in part.parameters())
    weights = values * (4 if config.compute.precision == "no" else 2)
    learning = OPTIMISED * (trained or 0)
    least = f"at least {in_words(weights + learning)}: {in_words(weights)} for the base, the rest for what learns"
    if past is None or past.peak is None:
        return f"{least}; what the steps take on top is {UNKNOWN}"
    return f"about {in_words(past.peak)} in all, as “{past.name}” took; {least}"


def _time(wish: Wish, past: Past | None) -> str:
    if past is None:
        return UNKNOWN
    return f"about {clock(past.seconds_for(wish.steps))}, at {past.pace:.2g} s a step as in “{past.name}”"


def in_words(size: float) -> str:
    """Return `4.2 MiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"
