"""Tickets: the trainings asked for in the browser, each a folder of its own that outlives the Studio.

ticket.json   what was asked, and where the run is       begun.json   it was begun; again.json: it is to go on
NAME/         the uploaded pictures, written anew        end.json     how it ended
log.txt       what `vgm-train` said                      .lock        of the process that trains, while it lives

Nothing in it says "running": that is so when the lock's process lives. So no `kill -9` can leave a wrong word behind.
"""

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from vgm_peft.config import build
from vgm_peft.errors import ConfigError, TrainError
from vgm_peft.studio.metrics import Metrics
from vgm_peft.studio.settings import Settings
from vgm_peft.studio.trainer import AGAIN, BEGUN, END, LOG, TICKET
from vgm_peft.studio.uploads import keep_pictures
from vgm_peft.studio.wishes import Wish, aim_of, recipe_of
from vgm_peft.train.durable import folder_aside, remove_folder, sweep, write_text
from vgm_peft.train.lock import holder

Status = Literal["waiting", "running", "done", "stopped", "interrupted", "failed"]
NUMBER = re.compile("[0-9]{6,9}")
TAIL = 30_000
"""Bytes of a log that are ever looked at."""


@dataclass(frozen=True)
class State:
    """How a training stands, read from what it wrote."""

    number: int
    name: str
    status: Status
    step: int
    steps: int
    loss: float | None
    seconds_left: float | None
    previews: tuple[Path, ...]
    message: str
    """One line: where it is, or how it ended."""
    log: str = ""

    @property
    def running(self) -> bool:
        """Whether a process works on it."""
        return self.status == "running"

    @property
    def ended(self) -> bool:
        """Whether it neither runs nor waits."""
        return self.status not in ("running", "waiting")

    @property
    def can_go_on(self) -> bool:
        """Whether it ended without a result."""
        return self.ended and self.status != "done"


@dataclass(frozen=True)
class Ticket:
    """One training that was asked for."""

    folder: Path
    wish: Wish
    run: Path
    base: str

    @classmethod
    def read(cls, folder: Path) -> "Ticket":
        """Read a ticket. Raises `TrainError` for a folder that holds none that can be read."""
        try:
            table = cast("dict[str, Any]", json.loads((folder / TICKET).read_text(encoding="utf-8")))
            return cls(folder, build(Wish, table["wish"]), Path(table["run"]), str(table["base"]))
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            raise TrainError(f"{folder}: its ticket cannot be read ({error})", fix="delete the folder") from None

    @cached_property
    def number(self) -> int:
        """Its place among all tickets there ever were."""
        return int(self.folder.name)

    def status(self, starting: bool = False) -> Status:
        """How it stands; `starting` says that its process was begun just now and may not have the lock yet."""
        end = self.end()
        if end is not None:
            return "done" if end.get("status") == 0 else "stopped" if end.get("stopped") else "failed"
        if starting or holder(self.folder) is not None:
            return "running"
        if self.end() is not None:  # it ended between the two looks
            return self.status()
        begun = (self.folder / BEGUN).exists() and not (self.folder / AGAIN).exists()
        return "interrupted" if begun else "waiting"

    def end(self) -> Mapping[str, Any] | None:
        """How its process ended, if it has."""
        try:
            said: Any = json.loads((self.folder / END).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return cast("dict[str, Any]", said) if isinstance(said, dict) else None

    def interrupt(self) -> bool:
        """Ask its process to save and leave, asked again to leave at once; say whether there is one."""
        process = holder(self.folder)
        if process is None:
            return False
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM if sys.platform == "win32" else signal.SIGINT)
        return True

    def again(self) -> None:
        """Put a training that ended without a result back among those that wait."""
        write_text(self.folder / AGAIN, "{}\n")
        (self.folder / END).unlink(missing_ok=True)

    def fail(self, status: int) -> None:
        """Say that its process ended before it could say so itself."""
        write_text(self.folder / END, json.dumps({"status": status}) + "\n")

    def remove(self) -> None:
        """Forget it, and its pictures; its run stays."""
        remove_folder(self.folder)

    def state(self, metrics: Metrics, status: Status, before: int = 0) -> State:
        """Read how it stands; `before` is how many others come first while it waits."""
        steps = self.wish.steps
        metrics.update(self.run / "metrics.jsonl")
        step, pace = metrics.step, metrics.pace
        left = pace * (steps - step) if status == "running" and pace and step else None
        log = tail(self.folder / LOG)
        message = self._message(status, step, log, before)
        return State(self.number, self.wish.name, status, step, steps, metrics.loss, left, self._previews(), message, log)

    def _previews(self) -> tuple[Path, ...]:
        return tuple(sorted((self.run / "samples").glob("step-*.png"))[-8:])

    def _message(self, status: Status, step: int, log: str, before: int) -> str:
        if status == "waiting":
            return f"Waits; {before} {'comes' if before == 1 else 'come'} first" if before else "Begins in a moment"
        if status == "running":
            return f"Step {step} of {self.wish.steps}" if step else "Getting ready: reading pictures, loading the base"
        if status == "done":
            where = "the control networks" if aim_of(self.wish.task).annotated else "the deltas"
            return f"Done. “{self.run.name}” is now in the Library and among {where} of Create."
        done = f" after step {step}" if step else ""
        if status == "interrupted":
            return f"Interrupted{done}: its process was ended from outside. Go on takes it up again."
        if status == "stopped":
            return f"Stopped{done}. Go on takes it up again."
        return "It failed: " + self._reason(log)

    def _reason(self, log: str) -> str:
        code = (self.end() or {}).get("status")
        if code == -9:
            return "the system ended it, most often for want of memory. Close other programs, or choose a smaller method."
        lines = [line for line in log.splitlines() if line.strip()]
        return lines[-1].removeprefix("vgm-train: ") if lines else f"exit status {code}"


def write_ticket(queue: Path, number: int, settings: Settings, wish: Wish, files: Sequence[str]) -> Ticket:
    """Write a ticket with the uploaded pictures: whole, or not at all. Raises `VgmError` for what is wrong with them."""
    run, base = (settings.runs / wish.folder_name).absolute(), base_name(settings.base)
    folder = queue / f"{number:06d}"
    recipe = recipe_of(wish, settings.base, settings.recipe)
    images = folder.absolute() / wish.folder_name
    with folder_aside(folder) as aside:
        keep_pictures(files, aside / wish.folder_name, settings.upload_count, wish.caption)
        flags = wish.flags(wish.table(base, images, run), None if recipe is None else recipe.absolute())
        told = {"wish": asdict(wish), "run": str(run), "base": base, "flags": flags}
        write_text(aside / TICKET, json.dumps(told, ensure_ascii=False, indent=1) + "\n")
    return Ticket.read(folder)


def base_name(base: str) -> str:
    """A base's name that means the same from every folder."""
    return str(Path(base).absolute()) if base != "toybox" and Path(base).exists() else base


def tickets_of(queue: Path, known: Mapping[str, Ticket] | None = None) -> dict[str, Ticket]:
    """All tickets by number, in the order in which they were asked for; `known` ones are not read again.

    One that cannot be read is left out.
    """
    names = sorted(entry.name for entry in os.scandir(queue) if NUMBER.fullmatch(entry.name)) if queue.is_dir() else ()
    found: dict[str, Ticket] = {}
    for name in names:
        with suppress(TrainError):
            found[name] = known[name] if known and name in known else Ticket.read(queue / name)
    return found


def tidy(queue: Path) -> None:
    """Sweep away what was half-written, and tickets of trainings that ended and whose runs were deleted since."""
    sweep(queue)
    for ticket in tickets_of(queue).values():
        if ticket.end() is not None and not ticket.run.exists() and holder(ticket.folder) is None:
            ticket.remove()
    for folder in queue.glob(".check-*"):  # a preflight that was killed
        shutil.rmtree(folder, ignore_errors=True)


def tail(path: Path) -> str:
    """The end of a text file; progress bars' overwritten lines are left out."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(line.rsplit("\r", 1)[-1] for line in text.split("\n") if line.strip())
