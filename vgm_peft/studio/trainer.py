"""The process of one training: `python -m vgm_peft.studio.trainer TICKET`.

It holds the ticket's lock for as long as `vgm-train` runs below it, hands signals on, and writes how that ended. So the
Studio may be killed and started again at any time: whether a training lives, and how it ended, stands in its ticket. It goes
on with a run that was begun, and imports nothing heavy, since it stays beside the training to its end.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from vgm_peft.errors import TrainError
from vgm_peft.train.durable import write_text
from vgm_peft.train.lock import locked

TICKET, BEGUN, AGAIN, END, LOG = "ticket.json", "begun.json", "again.json", "end.json", "log.txt"
TRAIN = "import sys; from vgm_peft.cli import main; sys.exit(main('train', sys.argv[1:]))"


class Stop:
    """Hands Ctrl-C on: the first two as they are, which save and which leave at once, and then no more asking."""

    def __init__(self) -> None:
        self.asked = 0
        self.child: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1
        self._pass_on()

    def _pass_on(self) -> None:
        """Not by way of `Popen`, which may take from us how the process ended."""
        if self.child is None or not self.asked:
            return
        hard = signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL
        with suppress(ProcessLookupError):
            os.kill(self.child, hard if self.asked > 2 or sys.platform == "win32" else signal.SIGINT)

    def watch(self, child: int | None) -> None:
        """Hand on to this process from now, and what came before; to none once it has ended."""
        self.child = child
        self._pass_on()


def main(folder: Path) -> int:
    """Train what a ticket asks for, or go on with it. Returns 0; 3 when another process has the ticket."""
    stop = Stop()
    try:
        with locked(folder):
            if not (folder / END).exists():
                _train(folder, stop)
    except TrainError:
        return 3
    return 0


def _train(folder: Path, stop: Stop) -> None:
    ticket: dict[str, Any] = json.loads((folder / TICKET).read_text(encoding="utf-8"))
    run, begun = Path(ticket["run"]), (folder / BEGUN).exists()
    write_text(folder / BEGUN, "{}\n")
    (folder / AGAIN).unlink(missing_ok=True)
    again = begun and (run / "run.toml").is_file()
    flags = [f"--resume={run}"] if again else ticket["flags"]
    started = time.monotonic()
    with (folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", TRAIN, *flags], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        stop.watch(process.pid)
        status, peak = _wait(process)
        stop.watch(None)
    whole = None if again else round(time.monotonic() - started, 1)
    told = {"status": status, "stopped": bool(stop.asked), "peak": peak, "seconds": whole}
    write_text(folder / END, json.dumps(told) + "\n")


def _wait(process: "subprocess.Popen[bytes]") -> tuple[int, int | None]:
    """How a process ended (negative: by which signal), and the most memory it had, in bytes, where the system tells."""
    if not hasattr(os, "wait4"):
        return process.wait(), None
    _, status, usage = os.wait4(process.pid, 0)
    unit = 1 if sys.platform == "darwin" else 1024
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * unit


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
