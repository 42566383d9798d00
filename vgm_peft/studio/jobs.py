"""Trainings, each in a process of its own, so that the Studio stays quick and a closed browser tab ends nothing."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from vgm_peft.data.faults import KINDS
from vgm_peft.errors import ConfigError, TrainError
from vgm_peft.studio.settings import Settings

ALLOWED = {kind: KINDS[kind] for kind in ("tiny", "duplicate", "near-duplicate")}
"""What can be wrong with pictures that were written anew when they were uploaded, and what happens when it is allowed."""
TAIL = 30_000
"""Bytes of a log that are ever looked at."""


@dataclass(frozen=True)
class Wish:
    """A training as asked for in the browser."""

    name: str
    class_prompt: str
    steps: int
    token: str = "sks"
    seed: int = 0
    allow: tuple[str, ...] = ()
    """Kinds of faults in the pictures to go on in spite of, of `ALLOWED`."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 _-]{0,39}", self.name):
            raise ConfigError(
                f'the name "{self.name[:60]}"',
                expected="1 to 40 letters, digits, spaces, _ or -, the first no sign",
            )
        for what, text in (("what it is", self.class_prompt), ("the word for it", self.token)):
            if not text.strip() or len(text) > 200 or not text.isprintable():
                raise ConfigError(f"{what} is {len(text)} characters long", expected="1 .. 200 ordinary characters")
        if " " in self.token.strip():
            raise ConfigError(f'the word "{self.token}"', expected="one word, such as sks")
        if strange := set(self.allow) - ALLOWED.keys():
            raise ConfigError(f'allow "{min(strange)}"', expected="some of " + ", ".join(ALLOWED))
        if not 1 <= self.steps <= 100_000:
            raise ConfigError(f"steps = {self.steps}", expected="1 .. 100,000")

    @property
    def folder_name(self) -> str:
        """The run's folder name."""
        return self.name.strip().replace(" ", "-")


@dataclass(frozen=True)
class State:
    """How a training stands, read from what it wrote."""

    name: str
    running: bool
    step: int
    steps: int
    loss: float | None
    seconds_left: float | None
    previews: tuple[Path, ...]
    message: str
    """One line: where it is, or how it ended."""
    log: str = ""


class Job:
    """One training process and its folder."""

    def __init__(self, settings: Settings, wish: Wish, images: Path) -> None:
        """Start `vgm-train` on a folder of pictures. Raises `TrainError` when the run's folder exists."""
        self.wish, self.folder = wish, settings.runs / wish.folder_name
        self.log = settings.inbox / f"{wish.folder_name}.log"
        self._asked_to_stop = False
        recipe = [f"--recipe={settings.recipe}"] if settings.recipe else []
        # A list, never a shell; "=" keeps a text that begins with "-" from being read as a flag.
        command = [
            *(sys.executable, "-c", "import sys; from vgm_peft.cli import main; sys.exit(main('train'))", "dreambooth"),
            *(f"--images={images}", f"--base={settings.base}", f"--output={self.folder}"),
            *(f"--class-prompt={wish.class_prompt.strip()}", f"--token={wish.token.strip()}"),
            *(f"--steps={wish.steps}", f"--seed={wish.seed}", f"--set=preview.every={-(-wish.steps // 4)}", *recipe),
            *([f"--allow={','.join(wish.allow)}"] if wish.allow else []),
        ]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Ask the training to save and leave; ask again to end it at once."""
        self._asked_to_stop = True
        if self.running:
            self._process.send_signal(signal.SIGTERM if sys.platform == "win32" else signal.SIGINT)

    def wait(self, seconds: float) -> bool:
        """Wait for the end, at most so long; say whether it came."""
        end = time.monotonic() + seconds
        while self.running and time.monotonic() < end:
            time.sleep(0.05)
        return not self.running

    def state(self) -> State:
        """Read how the training stands."""
        step, loss, pace = _last_metrics(self.folder / "metrics.jsonl")
        steps, running = self.wish.steps, self.running
        left = pace * (steps - step) if running and pace and step else None
        previews = tuple(sorted((self.folder / "samples").glob("*.png"), key=lambda p: p.stat().st_mtime)[-8:])
        log = _tail(self.log)
        return State(self.wish.name, running, step, steps, loss, left, previews, self._message(step, running, log), log)

    def _message(self, step: int, running: bool, log: str) -> str:
        if running:
            return f"Step {step} of {self.wish.steps}" if step else "Getting ready: reading pictures, loading the base"
        if (self.folder / "delta.safetensors").is_file() and self._process.returncode == 0:
            return f"Done. “{self.folder.name}” is now among the deltas of Create."
        if self._asked_to_stop:
            return "Stopped."
        lines = [line for line in log.splitlines() if line.strip()]
        return "It failed: " + (lines[-1].removeprefix("vgm-train: ") if lines else f"exit status {self._process.returncode}")


class Desk:
    """The Studio's one training at a time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.job: Job | None = None
        self._lock = threading.Lock()

    def start(self, wish: Wish, files: list[str]) -> Job:
        """Keep the pictures and start training. Raises `TrainError` while another training runs or for a name in use."""
        from vgm_peft.studio.uploads import keep_pictures

        with self._lock:  # two tabs may press at once
            if self.job is not None and self.job.running:
                raise TrainError(f'"{self.job.wish.name}" is still training', fix="wait for it, or stop it")
            if (self.settings.runs / wish.folder_name).exists():
                raise TrainError(f'a run named "{wish.name}" exists', fix="choose another name")
            images = self.settings.inbox / f"{wish.folder_name}-{time.time_ns():x}" / wish.folder_name
            keep_pictures(files, images, self.settings.upload_count)
            self.job = Job(self.settings, wish, images)
            return self.job

    def stop(self) -> None:
        """Stop the training that runs, if one does."""
        if self.job is not None:
            self.job.stop()


def _last_metrics(path: Path) -> tuple[int, float | None, float | None]:
    """Return the last step, its loss, and the median seconds a step of the lines at the end of a metrics file."""
    lines: list[dict[str, object]] = []
    for line in _tail(path).splitlines():
        try:
            parsed = json.loads(line)
        except ValueError:  # the first line of the tail, or one just being written
            continue
        if isinstance(parsed, dict):
            lines.append(cast("dict[str, object]", parsed))
    if not lines:
        return 0, None, None
    last = lines[-1]
    step, loss = last.get("step"), last.get("loss")
    paces = sorted(s for s in (line.get("seconds") for line in lines) if isinstance(s, (int, float)))
    return (
        step if isinstance(step, int) else 0,
        float(loss) if isinstance(loss, (int, float)) else None,
        float(paces[len(paces) // 2]) if paces else None,
    )


def _tail(path: Path) -> str:
    """The end of a text file; progress bars' overwritten lines are left out."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(line.rsplit("\r", 1)[-1] for line in text.split("\n") if line.strip())
