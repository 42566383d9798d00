"""Two runs never write to one folder, and a dead one blocks nobody."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vgm_peft.errors import TrainError
from vgm_peft.train.folder import claimed
from vgm_peft.train.lock import LOCK, _born, locked

HOLD = """import sys, time
from pathlib import Path
from vgm_peft.train.lock import locked
with locked(Path(sys.argv[1])):
    print(1, flush=True)
    time.sleep(600)
"""


def _holder(folder: Path) -> "subprocess.Popen[str]":
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "1\n"
    return other


def test_a_living_run_keeps_its_folder_and_a_killed_one_does_not(tmp_path: Path) -> None:
    other = _holder(tmp_path)
    try:
        for _ in range(2):  # being refused takes nothing from the other
            with pytest.raises(TrainError, match=f"another run \\(process {other.pid}\\) is writing"), locked(tmp_path):
                pass
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.communicate()
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_what_a_run_left_that_was_killed_before_it_wrote_anything_is_swept(tmp_path: Path) -> None:
    for name in (LOCK, ".run.toml.123.part", ".0123456789abcdef.part"):
        (tmp_path / name).touch()
    with claimed(tmp_path, resume=False):
        assert [p.name for p in tmp_path.iterdir()] == [LOCK]
    (tmp_path / "precious").touch()
    with pytest.raises(TrainError, match="not empty"), claimed(tmp_path, resume=False):
        pass


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("no_flock")
def test_without_the_systems_locks_the_file_says_who_lives(tmp_path: Path) -> None:
    lock, sleeper = tmp_path / LOCK, subprocess.Popen(["sleep", "600"])
    try:
        lock.write_text(json.dumps({"pid": sleeper.pid, "born": _born(sleeper.pid)}))
        with pytest.raises(TrainError, match=f"process {sleeper.pid}"), locked(tmp_path):
            pass
        lock.write_text(json.dumps({"pid": sleeper.pid, "born": "at another time"}))  # its number was given out again
        with locked(tmp_path):
            pass
        lock.write_text(json.dumps({"pid": sleeper.pid, "born": _born(sleeper.pid)}))
    finally:
        sleeper.kill()
        sleeper.wait()
    with locked(tmp_path):  # now it is dead
        pass
    lock.write_text("{")  # cut short
    with locked(tmp_path):
        pass
