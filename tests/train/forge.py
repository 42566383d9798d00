"""A warm process that forks: each call runs in a real process of its own, to be killed by a real SIGKILL, without the
seconds that importing torch costs. `python -m tests.train.forge` reads one JSON object a line and answers each with one.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[2]
CHANGES = frozenset("open write flush fsync replace rename mkdir rmdir unlink remove truncate ftruncate pwrite close".split())
"""Names of the calls by which a file system changes."""


class Forge:
    """The warm process, seen from a test; a context manager."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __enter__(self) -> "Forge":
        with self.log.open("ab") as log:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.train.forge"], cwd=ROOT, stdin=-1, stdout=-1, stderr=log, text=True
            )
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.communicate()

    def call(self, function: str, kill_after: float | None = None, /, **arguments: Any) -> int:
        """Run `module:function` in a process; return its exit status, negative for the signal that ended it.

        With `kill_after` it is sent SIGKILL after so many seconds, if it still lives.
        """
        assert self._server.stdin is not None and self._server.stdout is not None
        asked = {"function": function, "arguments": arguments, "kill_after": kill_after}
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, self.log.read_text()[-4000:]
        return int(answer)


def dies_at(number: int, files: bool) -> None:
    """Have this process send itself SIGKILL at its `number`-th call of a C function from now, or of one that changes files.

    The call is not made any more: `number` = 1 dies before the first, and so on.
    """

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    at_call(number, files, die)


def at_call(number: int, files: bool, action: Any) -> list[int]:
    """Call `action` at the `number`-th such call from now; returns a list whose only entry counts them."""
    seen = [0]

    def look(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call" and (not files or changes_files(called)):
            seen[0] += 1
            if seen[0] == number:
                action()

    sys.setprofile(look)
    return seen


def changes_files(called: Any) -> bool:
    """Whether a C function is one by which a file system changes."""
    if called.__name__ not in CHANGES:
        return False
    owner = getattr(called, "__self__", None)
    return getattr(called, "__module__", None) in ("posix", "io", "_io") or type(owner).__module__ == "_io"


def _serve() -> None:
    """Answer until the input ends; what children print goes to the log."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    importlib.import_module("tests.train.killed")
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(asked["function"], asked["arguments"])
        if asked["kill_after"] is not None:
            _kill_later(child, asked["kill_after"])
        status = os.waitpid(child, 0)[1]
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
        answers.flush()


def _run(function: str, arguments: dict[str, Any]) -> None:
    status = 1
    try:
        module, _, name = function.partition(":")
        status = getattr(importlib.import_module(module), name)(**arguments) or 0
    except BaseException:
        traceback.print_exc()
    sys.setprofile(None)
    sys.stderr.flush()
    os._exit(status)


def _kill_later(child: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    _serve()
