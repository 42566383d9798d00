"""A drawing that goes on in a thread of its own while the page is told how far it is."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from vgm_peft.errors import VgmError
from vgm_peft.studio.look import clock

if TYPE_CHECKING:
    from PIL import Image

    from vgm_peft.stack.sampling import Progress

T = TypeVar("T")
Stepping = Callable[["Progress"], bool]
"""What a drawing is told after every step; it answers whether to go on."""
PREVIEW_EVERY = 0.7
"""Seconds between two previews, so that decoding them never costs more than the drawing."""


@dataclass(frozen=True)
class Event:
    """What a drawing says while it goes: how far it is, and at times a preview."""

    fraction: float
    line: str
    preview: "Image.Image | None" = None


class Drawing(Generic[T]):
    """One drawing in a thread of its own: iterate over its events, then take the result; `stop` ends it early."""

    def __init__(self, work: "Callable[[Callable[[Progress], bool]], T]") -> None:
        self.result: T | None = None
        self.error: Exception | None = None
        self.stopped = False
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._work, self._begun, self._previewed = work, 0.0, 0.0
        threading.Thread(target=self._run, name="drawing", daemon=True).start()

    def stop(self) -> None:
        """End it at the next step."""
        self.stopped = True

    def __iter__(self) -> Iterator[Event]:
        while (event := self._events.get()) is not None:
            yield event

    def _run(self) -> None:
        try:
            self.result = self._work(self._step)
        except Exception as error:
            self.error = error
        finally:
            self._events.put(None)

    def _step(self, progress: "Progress") -> bool:
        now = time.monotonic()
        self._begun = self._begun or now
        spent, share = now - self._begun, progress.fraction
        left = f" · {clock(spent / share * (1 - share))} left" if spent > 1 and share < 1 else ""
        several = f"Picture {progress.picture} of {progress.pictures} · " if progress.pictures > 1 else ""
        preview = None
        if now - self._previewed > PREVIEW_EVERY and progress.step < progress.steps:
            preview = progress.preview()
            self._previewed = time.monotonic()
        self._events.put(Event(share, f"{several}step {progress.step} of {progress.steps}{left}", preview))
        return not self.stopped


def explain(error: Exception) -> str:
    """One line for the page: our own errors as they are, running out of memory with its cures, the rest by its kind."""
    text = str(error)
    if isinstance(error, VgmError):
        return text
    if isinstance(error, MemoryError) or any(said in text.lower() for said in ("out of memory", "can't allocate memory")):
        return "Out of memory. Draw fewer pictures at once, choose a smaller size, or close other programs."
    return f"{type(error).__name__}: {text[:300]}"
