"""SHA-256 of files: several at once, with a bar where that takes a while, and large ones only when they have changed.

To read a base of some GB again at every start, only to learn that it is still the same, would cost seconds each time. So
the digest of a large file is remembered in the user's cache folder, for exactly this path, size, inode, device and times.
Whoever changes a file may set its `mtime` back, but not its `ctime`, which is the system's own; Windows keeps none, and
nothing is remembered there. A file that changed so lately that a clock's next tick may not have come yet is not remembered
either. What must be proved and not only known, a checkpoint's bytes for one, is always read: `digest_of_file`.
"""

import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from uuid import uuid4

from vgm_peft.folders import cache_folder

LARGE = 16 << 20
"""Bytes from which on a file's digest is remembered; a smaller one is read as fast as looked up."""
YOUNG = 2_000_000_000
"""Nanoseconds that a file must have stood unchanged; no file system's clock is coarser (FAT's)."""
THREADS = min(8, os.cpu_count() or 1)
"""Hashing leaves Python's lock alone, so threads are enough."""
_CHUNK = 1 << 20
_log = logging.getLogger(__name__)


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes as they are now, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_files(paths: Iterable[Path]) -> str:
    """SHA-256 over the SHA-256 of files, in order, in hex; see `digests_of`."""
    return hashlib.sha256("".join(digests_of(paths)).encode()).hexdigest()


def digests_of(paths: Iterable[Path]) -> list[str]:
    """SHA-256 of each file in hex, remembered or read on several threads. Raises `OSError` for one that cannot be read."""
    places, memory = [path.absolute() for path in paths], Memory()
    known = {path: memory.recall(path) for path in places}
    unread = [path for path, digest in known.items() if digest is None]
    with _progress(sum(path.stat().st_size for path in unread)) as tell, ThreadPoolExecutor(THREADS) as pool:

        def read(path: Path) -> str:
            return _read(path, memory, tell)

        known |= zip(unread, pool.map(read, unread), strict=True)
    return [digest for path in places if (digest := known[path]) is not None]


class Memory:
    """Digests of large files, each in a small file of the user's cache. One that cannot be kept or used costs time only."""

    def __init__(self) -> None:
        self.folder = cache_folder() / "digests"

    def recall(self, path: Path) -> str | None:
        """Return the digest of an absolute path's file, if it is remembered of this very file. Raises `OSError` without one."""
        facts = path.stat()
        if os.name == "nt" or facts.st_size < LARGE:
            return None
        entry = self.entry(path)
        try:
            kept = entry.lstat()
            if not stat.S_ISREG(kept.st_mode) or kept.st_uid != os.getuid() or kept.st_mode & 0o022 or kept.st_size > 200:
                return None  # also where another user could have written it
            text = entry.read_text(encoding="ascii")
        except (OSError, ValueError):
            return None
        if text != _sealed(path, facts, text[:64]):
            return None
        with suppress(OSError):  # a cache that may only be read; else what is used longest ago goes first
            os.utime(entry)
        return text[:64]

    def remember(self, path: Path, facts: os.stat_result, digest: str) -> None:
        """Keep the digest of an absolute path's file that was as `facts` say before it was read: of one that changed meanwhile
        it is never recalled."""
        entry = self.entry(path)
        aside = entry.with_name(f".{entry.name}.{os.getpid()}.{uuid4().hex[:8]}")
        try:  # no fsync: a hollow entry lacks its seal
            self.folder.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="ascii") as file:
                file.write(_sealed(path, facts, digest))
            os.replace(aside, entry)
        except OSError as error:
            _log.info("%s: cannot be remembered (%s); it is read again next time", path, error.strerror)
            with suppress(OSError):
                aside.unlink(missing_ok=True)

    def entry(self, path: Path) -> Path:
        """Where the digest of an absolute path's file is kept."""
        return self.folder / hashlib.sha256(os.fsencode(path)).hexdigest()


def _read(path: Path, memory: Memory, tell: Callable[[int], None]) -> str:
    """Hash a file, and remember its digest where that is safe and worth it."""
    digest, now = hashlib.sha256(), time.time_ns()
    with path.open("rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            tell(len(chunk))
    settled = max(before.st_mtime_ns, before.st_ctime_ns) <= now - YOUNG
    if os.name != "nt" and settled and before.st_size >= LARGE:
        memory.remember(path, before, digest.hexdigest())
    return digest.hexdigest()


def _sealed(path: Path, facts: os.stat_result, digest: str) -> str:
    """An entry: the digest, and a hash over it and all that it holds for."""
    return f"{digest} {hashlib.sha256(json.dumps([str(path), *_stamp(facts), digest]).encode()).hexdigest()}\n"


def _stamp(facts: os.stat_result) -> tuple[int, ...]:
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino, facts.st_dev


@contextmanager
def _progress(total: int) -> Generator[Callable[[int], None]]:
    """Show a bar on a terminal once a second has passed; gives a function to be told of bytes read, from any thread."""
    from tqdm import tqdm

    lock = Lock()
    with tqdm(total=total, desc="hashing", unit="B", unit_scale=True, delay=1.0, leave=False, disable=None) as bar:

        def tell(count: int) -> None:
            with lock:
                bar.update(count)

        yield tell
