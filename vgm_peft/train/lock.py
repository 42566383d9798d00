"""One run, one writer: the lock on a run's folder.

Where the system can (everywhere but on Windows and some network folders) it is `flock`: the kernel lets go of it when the
process ends, in whatever way, so a dead run blocks nobody. Elsewhere the file itself is the lock, and says whose: a process
that no longer lives, or whose number now belongs to a process that began at another time, has lost it.
"""

import errno
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vgm_peft.errors import TrainError
from vgm_peft.train.durable import saving

LOCK = ".lock"
CANNOT = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Hold a folder for the length of the block. Raises `TrainError` when a living process has it."""
    path = folder / LOCK
    with saving(folder):
        number = os.open(path, os.O_CREAT | os.O_RDWR)
    ours = False
    try:
        _take(number, path)
        ours = True
        yield
    finally:
        # First the name, then the lock: whoever gets to lock the file must find that it is not the named one any more.
        named = ours and not _removed(path)
        os.close(number)
        if named:
            path.unlink(missing_ok=True)


def holder(folder: Path) -> int | None:
    """The number of the living process that has a folder, by what its lock says; `None` when none has it."""
    try:
        number = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        owner = _owner(number)
    finally:
        os.close(number)
    return int(owner["pid"]) if _alive(owner) else None


def _take(number: int, path: Path) -> None:
    owner = _owner(number)
    held = _flock(number)
    if held is None:
        held = not _alive(owner)
    if held and _moved(number, path):  # between opening and locking, its holder ended and another began
        held = False
    if not held:
        who = f" (process {owner['pid']})" if owner else ""
        raise TrainError(f"another run{who} is writing to {path.parent}", fix="wait for it, or name another --output")
    with saving(path):
        os.ftruncate(number, 0)
        os.lseek(number, 0, os.SEEK_SET)
        os.write(number, json.dumps({"pid": os.getpid(), "born": _born(os.getpid())}).encode())


def _flock(number: int) -> bool | None:
    """Whether the system gave the lock; `None` where it has none to give."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in CANNOT else False
    return True


def _owner(number: int) -> dict[str, Any]:
    """What the lock says of its holder; nothing when it is new or was cut short."""
    try:
        said = json.loads(os.read(number, 4096))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) and isinstance(said.get("pid"), int) else {}


def _alive(owner: dict[str, Any]) -> bool:
    """Whether the holder lives: a process of its number that began when it did."""
    return bool(owner) and (born := _born(owner["pid"])) is not None and born == owner.get("born")


def _born(pid: int) -> str | None:
    """When a process began, in the words of this machine; `None` when there is none of that number."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        if stat[0] in "ZX":  # it has ended; only nobody has asked yet how
            return None
        return f"{boot} {stat[19]}"  # in ticks since the start: setting the clock does not change it
    except OSError:  # no such process, or no such system
        if Path("/proc/self/stat").exists():
            return None
    import psutil

    try:
        return str(psutil.Process(pid).create_time())
    except (psutil.Error, ValueError):
        return None


def _removed(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
    except PermissionError:  # Windows removes no file that is open
        return False
    return True


def _moved(number: int, path: Path) -> bool:
    try:
        return not os.path.samestat(os.fstat(number), os.stat(path))
    except FileNotFoundError:
        return True
