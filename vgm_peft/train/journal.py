"""What a run says while it goes: a progress bar, one line per step in `metrics.jsonl`, and TensorBoard events.

The events are written through TensorBoard's own record writer where that is installed, and not by its `SummaryWriter`,
which puts the machine's name into the file's name.
"""

import importlib
import json
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO

from vgm_peft.score import Scores
from vgm_peft.train.durable import saving, sync, write_text

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Taken:
    """What a step came to: its mean loss, the rate of the first group, the norm of all gradients before clipping."""

    loss: float
    rate: float
    norm: float
    held_out: float | None = None
    """The held-out loss after the step, where it was measured."""
    scores: Scores | None = None
    """What drawn pictures were worth then, where they were."""
    warnings: tuple[str, ...] = ()


class Journal:
    """The record of one run; a context manager. Silent when `main` is false, so that one process of several speaks."""

    def __init__(self, folder: Path, done: int, steps: int, main: bool = True) -> None:
        """Open the record of a run of `steps` steps of which `done` are done; later lines of an earlier try are dropped."""
        self.folder, self.main = folder, main
        self._file: TextIO | None = None
        self._events: _Events | None = None
        self._bar: Any = None
        self.history: list[dict[str, Any]] = read_metrics(folder / METRICS, done)
        """The lines of the steps that were done before."""
        if main:
            self._file = _continued(folder / METRICS, self.history)
            self._events = _Events.open(folder / "tb", done)
            self._bar = _bar(done, steps)
        self._last = time.perf_counter()

    def step(self, step: int, taken: Taken) -> None:
        """Record step number `step` (from 1)."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if self._file is None:
            return
        values: dict[str, Any] = {name: value for name, value in vars(taken).items() if value is not None and value != ()}
        if taken.scores is not None:
            values["scores"] = taken.scores.table()
            self.say(f"step {step}: {taken.scores}")
        for warning in taken.warnings:
            self.say(f"warning: step {step}: {warning}")
        with saving(self.folder / METRICS):
            self._file.write(json.dumps({"step": step, **values, "seconds": round(seconds, 4)}) + "\n")
            self._file.flush()
            if self._events is not None:
                self._events.scalars(step, _flat(values))
        self._bar.set_postfix_str(f"loss {taken.loss:.4f}, rate {taken.rate:.2g}", refresh=False)
        self._bar.update()

    def settle(self) -> None:
        """Bring all lines to the disk, so that no checkpoint is ever ahead of its record."""
        if self._file is not None:
            with saving(self.folder / METRICS):
                sync(self._file.fileno())

    def say(self, text: str) -> None:
        """Print a line without spoiling the bar."""
        if self._bar is not None:
            self._bar.write(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for thing in (self._bar, self._file, self._events):
            with suppress(OSError):  # a full disk has been reported by the write that met it
                if thing is not None:
                    thing.close()


def _flat(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among values, those in a table by both names."""
    inner = {f"{name}/{key}": v for name, table in values.items() if isinstance(table, dict) for key, v in table.items()}
    return {name: value for name, value in {**values, **inner}.items() if isinstance(value, float)}


def _bar(done: int, steps: int) -> Any:
    from tqdm import tqdm

    pause = 0.2 if sys.stderr.isatty() else 15.0  # a log file wants a line now and then, not every step
    return tqdm(total=steps, initial=done, desc="training", unit="step", dynamic_ncols=True, mininterval=pause)


def read_metrics(path: Path, done: int | None = None) -> list[dict[str, Any]]:
    """The lines of a record up to that of step `done`, or all; those cut short when a run was stopped are left out."""
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            said = json.loads(line)
            if done is None or int(said["step"]) <= done:
                lines.append(said)
        except (ValueError, KeyError, TypeError):
            continue
    return lines


def _continued(path: Path, history: list[dict[str, Any]]) -> TextIO:
    """Open the metrics for appending to what is kept of them; the old file is whole until the new one is."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in history))
    with saving(path):
        return path.open("a", encoding="utf-8", newline="\n")


class _Events:
    """A TensorBoard event file without the host's name."""

    def __init__(self, writer: Any, file: Any) -> None:
        self._writer, self._file = writer, file

    @classmethod
    def open(cls, folder: Path, done: int) -> "Self | None":
        try:
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            return None
        with saving(folder):
            folder.mkdir(exist_ok=True)
            # Steps after `done` of an earlier try are overtaken by this file's, which sorts later.
            file = (folder / f"events.out.tfevents.{done:010d}.run").open("wb")
        events = cls(RecordWriter(file), file)
        events._write(file_version="brain.Event:2")
        return events

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        summary_pb2: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        summary = summary_pb2.Summary(
            value=[summary_pb2.Summary.Value(tag=f"train/{name}", simple_value=v) for name, v in values.items()]
        )
        self._write(step=step, summary=summary)

    def _write(self, **fields: Any) -> None:
        event_pb2: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._writer.write(event_pb2.Event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()

    def close(self) -> None:
        self._file.close()
