"""The desk of trainings: they wait in a queue of files and run one at a time, each in a process of its own.

All that it knows stands in the tickets, so a Studio that was killed finds everything as it was: what still trains, what waits,
what was interrupted. Two Studios on one folder of runs share its queue; whoever moves it holds its lock for that moment.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from vgm_peft.errors import TrainError, VgmError
from vgm_peft.studio.metrics import Metrics
from vgm_peft.studio.settings import Settings
from vgm_peft.studio.tickets import State, Status, Ticket, base_name, tickets_of, tidy, write_ticket
from vgm_peft.studio.wishes import Wish
from vgm_peft.train.lock import locked

WAITING, SHOWN = 8, 10
"""Trainings that may wait, and those that ended of which the page still tells."""
LOOK = 0.4
"""Seconds between two looks whether the next one may begin."""
PATIENCE = 10.0
"""Seconds to wait for another Studio that moves the queue."""


@dataclass(frozen=True)
class Past:
    """What a training took that is over."""

    name: str
    steps: int
    pace: float
    """Seconds a step."""
    seconds: float | None
    """From first to last, where it was not interrupted."""
    peak: int | None
    """Bytes of the machine's memory."""

    def seconds_for(self, steps: int) -> float:
        """How long one of so many steps would take, getting ready included where that is known."""
        ready = max(0.0, self.seconds - self.steps * self.pace) if self.seconds is not None else 0.0
        return ready + steps * self.pace


class Desk:
    """Takes wishes, begins trainings, and says how they stand. Safe to call from several threads."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.queue = settings, settings.queue
        self.queue.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._begun: dict[int, subprocess.Popen[bytes]] = {}
        self._known: dict[str, Ticket] = {}
        self._metrics: dict[int, Metrics] = {}
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def start(self, wish: Wish, files: Sequence[str]) -> Ticket:
        """Keep the pictures and queue the training. Raises `TrainError` for a name in use or a full queue, `DataError`."""
        with self._moving():
            known = self.tickets()
            if (self.settings.runs / wish.folder_name).exists() or any(t.wish.folder_name == wish.folder_name for t in known):
                raise TrainError(f'a run named "{wish.name}" exists', fix="choose another name")
            if sum(self._status(ticket) == "waiting" for ticket in known) >= WAITING:
                raise TrainError(f"{WAITING} trainings wait already", fix="let one end, or take one out of the queue")
            numbers = [int(p.name) for p in self.queue.glob("[0-9]*") if p.name.isdecimal()]
            ticket = write_ticket(self.queue, max(numbers, default=0) + 1, self.settings, wish, files)
        self.advance()
        self.wake()
        return ticket

    def stop(self, number: int) -> None:
        """Have a training save and leave, or take one that waits out of the queue. Raises `TrainError` for none."""
        with self._moving():
            ticket = self.ticket(number)
            if self._status(ticket) == "waiting":
                ticket.remove()
                return
        deadline = time.monotonic() + PATIENCE  # of a process begun just now, which cannot be asked before it has its lock
        while not ticket.interrupt() and self._status(ticket) == "running" and time.monotonic() < deadline:
            time.sleep(0.05)

    def go_on(self, number: int) -> None:
        """Queue a training again that ended without a result; it goes on from its last checkpoint. Raises `TrainError`."""
        with self._moving():
            ticket = self.ticket(number)
            status = self._status(ticket)
            if status not in ("stopped", "interrupted", "failed"):
                raise TrainError(f'"{ticket.wish.name}" is {status}', expected="one that ended without a result")
            ticket.again()
        self.wake()

    def remove(self, number: int) -> None:
        """Forget a training that does not run, and its uploaded pictures; its run stays. Raises `TrainError`."""
        with self._moving():
            ticket = self.ticket(number)
            if self._status(ticket) == "running":
                raise TrainError(f'"{ticket.wish.name}" is running', fix="stop it first")
            self._metrics.pop(number, None)
            ticket.remove()

    def tickets(self) -> list[Ticket]:
        """All trainings, oldest first; a ticket never changes, so each is read once."""
        with self._lock:
            self._known = tickets_of(self.queue, self._known)
            return list(self._known.values())

    def ticket(self, number: int) -> Ticket:
        """One training. Raises `TrainError` where there is none of that number."""
        for ticket in self.tickets():
            if ticket.number == number:
                return ticket
        raise TrainError(f"there is no training {number}", fix="reload the page")

    def states(self) -> list[State]:
        """How the trainings stand that run or wait, and the newest of the others: oldest first."""
        with self._lock:
            statuses: list[tuple[Ticket, Status]] = [(ticket, self._status(ticket)) for ticket in self.tickets()]
            ended = [ticket.number for ticket, status in statuses if status not in ("running", "waiting")]
            running, waiting, out = any(status == "running" for _, status in statuses), 0, list[State]()
            for ticket, status in statuses:
                if ticket.number not in ended[:-SHOWN]:
                    out.append(ticket.state(self.metrics(ticket.number), status, waiting + running))
                waiting += status == "waiting"
            return out

    def state(self, number: int) -> State:
        """How one stands. Raises `TrainError` where there is none of that number."""
        with self._lock:
            ticket = self.ticket(number)
            return ticket.state(self.metrics(number), self._status(ticket))

    def metrics(self, number: int) -> Metrics:
        """The record of a training as far as it was read."""
        with self._lock:
            return self._metrics.setdefault(number, Metrics())

    def alike(self, wish: Wish) -> Past | None:
        """The newest training that ended well and trained the same way on the same base, if there is one."""
        base = base_name(self.settings.base)
        for ticket in reversed(self.tickets()):
            other, end = ticket.wish, ticket.end() or {}
            same = (other.task, other.preset, other.method, ticket.base) == (wish.task, wish.preset, wish.method, base)
            if same and end.get("status") == 0:
                with self._lock:
                    metrics = self.metrics(ticket.number)
                    metrics.update(ticket.run / "metrics.jsonl")
                    if metrics.pace is not None:
                        return Past(other.name, other.steps, metrics.pace, end.get("seconds"), end.get("peak"))
        return None

    def wake(self) -> None:
        """See to it that the queue is looked after (idempotent); a page that is only built starts nothing."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._closed.clear()
                self._thread = threading.Thread(target=self._serve, name="trainings", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Look after it no longer; what runs goes on."""
        self._closed.set()

    def advance(self) -> None:
        """Begin the next training if none runs."""
        if self._next() is None:
            return
        with self._moving():
            ticket = self._next()  # another Studio may have begun it meanwhile
            if ticket is None:
                return
            command = [sys.executable, "-m", "vgm_peft.studio.trainer", str(ticket.folder.absolute())]
            self._begun[ticket.number] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )

    def _next(self) -> Ticket | None:
        """The training to begin now."""
        with self._lock:
            statuses = [(self._status(ticket), ticket) for ticket in self.tickets()]
        if any(status == "running" for status, _ in statuses):
            return None
        return next((ticket for status, ticket in statuses if status == "waiting"), None)

    def _serve(self) -> None:
        said = ""
        with self._moving():
            tidy(self.queue)
        while not self._closed.wait(LOOK):
            try:
                self.advance()
            except (VgmError, OSError) as error:  # a disk that is full or gone may come back
                if str(error) != said:
                    print(f"vgm-studio: the queue of trainings stands still: {error}", flush=True)
                said = str(error)

    def _status(self, ticket: Ticket) -> Status:
        with self._lock:
            process = self._begun.get(ticket.number)
            if process is None:
                return ticket.status()
            code = process.poll()
            if code is not None:
                del self._begun[ticket.number]
                if code not in (0, 3) and ticket.status() == "waiting":
                    ticket.fail(code)
            return ticket.status(starting=code is None)

    @contextmanager
    def _moving(self) -> Generator[None]:
        """Have the queue alone, among threads and among Studios. Raises `TrainError` when another keeps it."""
        deadline = time.monotonic() + PATIENCE
        with self._lock, ExitStack() as holding:
            while True:
                try:
                    holding.enter_context(locked(self.queue))
                    break
                except TrainError:
                    if time.monotonic() > deadline:
                        raise TrainError("another Studio is moving the queue of trainings", fix="try again") from None
                    time.sleep(0.05)
            yield
