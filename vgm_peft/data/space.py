"""How large the cache may grow, and what goes when it is too large: what was used longest ago, never what a run uses.

Reading an entry sets its file's time. A run that writes holds a lease, a locked file in the cache whose time is that of its
start; the system lets go of the lock when the process ends in whatever way. What is younger than the oldest lease alive may
be in use and stays, so that two runs that share a small cache do not take turns at deleting each other's work. Only times of
one file system are compared, and a mistake among them costs time, never a value.
"""

import math
import os
from pathlib import Path
from uuid import uuid4

from vgm_peft.errors import ConfigError

GIB = 50.0
"""Bound of the cache when nobody says another, in GiB."""
VARIABLE = "VGM_CACHE_GIB"
_LEASES = ".leases"
_KEPT = 0.9
"""Down to which share of the bound the cache is cut, so that it is not cut at every entry."""


def bound_of(gib: float | None = None) -> int:
    """Return the bound in bytes: as given, else as the environment says, else `GIB`. Raises `ConfigError`."""
    text = os.environ.get(VARIABLE, "")
    try:
        size = gib if gib is not None else float(text or GIB)
    except ValueError:
        size = math.nan
    if not (math.isfinite(size) and size > 0):
        raise ConfigError(f"{VARIABLE}={text}", expected="the largest size of the cache in GiB, such as 20")
    return int(size * 2**30)


class Space:
    """The size of one cache folder as one process sees it. Every method may raise `OSError` but `used` and `release`."""

    def __init__(self, root: Path, gib: float | None = None) -> None:
        self._lease: tuple[Path, int] | None = None
        self._size: int | None = None
        """Bytes in the folder as far as known; found out at the first entry written."""
        self.root, self.bound = root, bound_of(gib)

    def used(self, path: Path) -> None:
        """Remember that an entry was read just now."""
        try:
            self.claim(make=False)
            os.utime(path)
        except OSError:
            pass  # a cache that may only be read is not cut by us either

    def claim(self, make: bool = True) -> None:
        """Take the lease of this process, once; unless `make`, only where the cache has been written to before."""
        if self._lease is not None and self._lease[0].exists():
            return
        self.release()
        folder = self.root / _LEASES
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{os.getpid()}-{uuid4().hex[:8]}"
        number = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        _try_lock(number)
        self._lease = path, number

    def release(self) -> None:
        """Give the lease back."""
        if self._lease is not None:
            path, number = self._lease
            self._lease = None
            try:
                os.close(number)
                path.unlink(missing_ok=True)
            except OSError:
                pass  # an unlocked lease is swept away by the next process that cuts

    def __del__(self) -> None:
        self.release()

    def grown(self, by: int) -> str:
        """Take note of an entry of `by` bytes; cut the cache when it is too large. Return what the user should know."""
        self._size = self._measured() if self._size is None else self._size + by
        if self._size <= self.bound:
            return ""
        self._size = self._cut()
        if self._size <= self.bound:
            return ""
        self.bound = max(self.bound, self._size * 2)  # said once; not measured again at every entry
        return (
            f"cache {self.root} is larger than its bound, since runs that are alive use what is in it; "
            f"raise it by data.cache_gib or {VARIABLE}"
        )

    def _entries(self) -> list[tuple[int, int, Path]]:
        """Time, size and path of every file but leases, oldest first."""
        found: list[tuple[int, int, Path]] = []
        for folder in (entry for entry in os.scandir(self.root) if entry.is_dir() and entry.name != _LEASES):
            for entry in os.scandir(folder.path):
                try:
                    facts = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # another process cuts at the same time
                    continue
                found.append((facts.st_mtime_ns, facts.st_size, Path(entry.path)))
        return sorted(found)

    def _measured(self) -> int:
        return sum(size for _, size, _ in self._entries())

    def _cut(self) -> int:
        """Delete the oldest entries, and what killed writers left, as far as no live lease is older; return what is left."""
        start = self._oldest_lease()
        entries = self._entries()
        left = sum(size for _, size, _ in entries)
        for time, size, path in entries:
            if time >= start:
                break
            if left > self.bound * _KEPT or path.name.startswith("."):
                path.unlink(missing_ok=True)
                left -= size
        return left

    def _oldest_lease(self) -> int:
        """The time of the oldest lease whose process lives; leases of dead ones are swept away."""
        times: list[int] = []
        own = self._lease[0] if self._lease else None
        for entry in os.scandir(self.root / _LEASES):
            path = Path(entry.path)
            try:
                number = os.open(path, os.O_RDWR)
            except FileNotFoundError:
                continue
            try:
                if path != own and _try_lock(number):
                    path.unlink(missing_ok=True)
                else:
                    times.append(os.fstat(number).st_mtime_ns)
            finally:
                os.close(number)
        return min(times, default=0)


def _try_lock(number: int) -> bool:
    """Lock an open file; say whether it was free. Where files cannot be locked, every lease counts as alive."""
    try:
        import fcntl

        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True
