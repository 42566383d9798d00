"""Work on the library's files: export for another tool, merge, resize. Results are new entries; what is there stays.

One piece of work at a time: each holds whole deltas in memory.
"""

import re
import shutil
import tempfile
import threading
import time
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vgm_peft.errors import ConfigError, VgmError, nearest
from vgm_peft.studio.wishes import check_name

if TYPE_CHECKING:
    from vgm_peft.delta import Delta
    from vgm_peft.studio.engine import Engine
    from vgm_peft.tools.checkpoint import Checkpoint

MOST = 32
"""Deltas of one merge."""
KEPT, AGE = 8, 3600.0
"""Exports that stay for their download, and for how many seconds."""


@dataclass(frozen=True)
class Made:
    """What came of a piece of work: its file, and what to know of it."""

    path: Path
    told: str


class Workbench:
    """Safe to call from several threads; work queues up. All names are those of the library."""

    def __init__(self, engine: "Engine") -> None:
        self.engine, self.runs = engine, engine.settings.runs
        self._lock = threading.Lock()

    @property
    def outbox(self) -> Path:
        """Where exports are kept until they were fetched."""
        return self.runs / ".exports"

    def export(self, name: str, target: str, approximate: int | None = None) -> Made:
        """Write a delta for another tool, several files as one zip. Raises `VgmError` where the tool cannot have it."""
        from vgm_peft.formats.export import Wishes, export, file_name
        from vgm_peft.formats.targets import target_named

        tool, path = target_named(target), self.place(name)
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-_")[:40] or "delta"
        with self._lock:
            self._tidy()
            self.outbox.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=self.outbox))
            try:
                delta, fitting = self._read(path)
                out = folder / file_name(tool.name, stem)
                with self.engine.alone() as base:
                    made = export(delta, out, tool.name, base if fitting else None, Wishes(approximate=approximate))
                ways = sorted(set(made.plan.ways.values()))
                lines = [f"For {tool.about}, read back and compared: {', '.join(ways)}.", *made.plan.remarks]
                if made.plan.losses:
                    lines.append(f"{made.plan.loss:.2%} of the change is lost.")
                return Made(out if [out] == made.files else _zipped(folder, stem, made.files), " ".join(lines))
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise

    def merge(self, weights: Mapping[str, float], name: str, method: str = "concat", rank: int | None = None) -> Made:
        """Make several deltas, each at a strength, into one. Raises `VgmError` for what cannot be one."""
        from vgm_peft.tools.merge import Options, merge

        if not 1 <= len(weights) <= MOST:
            raise ConfigError(f"{len(weights)} deltas", expected=f"2 .. {MOST} to merge", fix="add some")
        if strange := next((n for n, w in weights.items() if not -1000 < w < 1000), None):
            raise ConfigError(f"the strength of {strange[:60]}", expected="a number, usually 0 .. 1")
        options = Options(method, rank)
        with self._lock:
            uses = [(self._read(self.place(each))[0], weight) for each, weight in weights.items()]
            delta = merge(uses, options, self._checkpoint())
            said = " + ".join(f"{weight:g} x {each}" for each, weight in weights.items())
            return self._keep(delta, name, f"{said}, {method}, {len(delta.patches)} layers.")

    def resize(self, of: str, name: str, rank: int | None = None, keep: float | None = None) -> Made:
        """Make a delta smaller: to a rank, or to what keeps a share of every layer. Raises `VgmError`."""
        from vgm_peft.tools.resize import Target, resize

        target = Target(rank, keep)
        with self._lock:
            delta, steps = resize(self._read(self.place(of))[0], target, self._checkpoint())
            worst = max(step.error for step in steps.values())
            mean = sum(step.error for step in steps.values()) / len(steps)
            ranks = sorted({step.after for step in steps.values()})
            spread = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} .. {ranks[-1]}"
            lost = f"{mean:.1%} of their change is lost on average, {worst:.1%} at most"
            return self._keep(delta, name, f"{len(steps)} layers, {spread}; {lost}.")

    def place(self, name: str) -> Path:
        """The place of a delta of the library. Raises `ConfigError` for any other name."""
        found = self.engine.deltas()
        for each in found:
            if each.name == name:
                return each.path
        raise ConfigError(f'no delta "{name[:100]}" in the library', fix=nearest(name[:100], [each.name for each in found]))

    def _read(self, path: Path) -> "tuple[Delta, bool]":
        """Read a delta, with the base where it fits; also say whether it does."""
        from vgm_peft.formats import read
        from vgm_peft.formats.fitting import misfit
        from vgm_peft.header import open_header

        base = self.engine.loaded or self.engine.base()
        fitting = not misfit(open_header(path), base)
        return read(path, base if fitting else None), fitting

    def _checkpoint(self) -> "Checkpoint | None":
        """The base on disk, for changes that depend on it; none for a base that is not on this disk."""
        from vgm_peft.tools.checkpoint import Checkpoint

        with suppress(VgmError):
            return Checkpoint(self.engine.settings.base)
        return None

    def _keep(self, delta: "Delta", name: str, told: str) -> Made:
        """Write a delta into a folder of its own among the runs."""
        from vgm_peft import formats

        folder = self.runs / check_name(name)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            raise ConfigError(f'a run named "{name}" exists', fix="choose another name") from None
        try:
            path = formats.write(delta, folder / "delta.safetensors")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return Made(path, f"“{folder.name}”: {told}")

    def _tidy(self) -> None:
        """Remove old exports, and those of a Studio that was killed."""
        folders = sorted((p for p in self.outbox.glob("*") if p.is_dir()), key=lambda p: p.stat().st_mtime)
        old = [p for p in folders if time.time() - p.stat().st_mtime > AGE]
        for folder in {*old, *folders[: -(KEPT - 1)]}:
            shutil.rmtree(folder, ignore_errors=True)


def _zipped(folder: Path, stem: str, files: list[Path]) -> Path:
    """All that was written as one file to fetch; nothing is packed, since weights do not get smaller."""
    out = folder / f"{stem}.zip"
    inside = sorted(p for p in folder.rglob("*") if p.is_file())
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as packed:
        for path in inside:
            packed.write(path, path.relative_to(folder).as_posix())
    return out
