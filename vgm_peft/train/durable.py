"""Writing small files and whole folders so that a crash or a full disk leaves either the old state or the new one.

What is half-written stands beside its place under a name that begins with a dot, so nothing ever reads it; what a killed
process leaves of it is swept away by the next one that has the folder to itself.
"""

import errno
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from vgm_peft.errors import SaveError

LEFTOVER = re.compile(r"\..*\.part|\..+\.[0-9a-f]{32}")
"""Names of what is being written: ours, `formats.canonical`'s, and those of folders that are exchanged."""


def write_text(path: Path, text: str) -> Path:
    """Write a text file aside, sync it, and rename it into place. Raises `SaveError`; the old file is then unharmed."""
    return write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> Path:
    """Write a file aside, sync it, and rename it into place. Raises `SaveError`; the old file is then unharmed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with saving(path):
        try:
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                sync(file.fileno())
            os.replace(aside, path)
            sync_folder(path.parent)
        finally:
            aside.unlink(missing_ok=True)
    return path


@contextmanager
def folder_aside(folder: Path) -> Generator[Path]:
    """Give an empty folder beside `folder` to fill; when the block ends well it becomes `folder`, otherwise it is removed."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    with saving(folder):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            yield aside
            sync_folder(aside)
            os.replace(aside, folder)
            sync_folder(folder.parent)
            sync_folder(folder.parent.parent)  # its parent may be new as well
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder, which loses its name first: a removal cut short leaves nothing that looks whole."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    with saving(folder):
        os.replace(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written directly under a folder that is ours alone."""
    with saving(folder):
        for path in folder.iterdir() if folder.is_dir() else ():
            if not LEFTOVER.fullmatch(path.name):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def saving(path: Path) -> Generator[None]:
    """Turn what the system says of a failed write into a `SaveError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what, fix = (
                f"{path}: the disk is full",
                "free some space and go on with --resume; what was there before is unharmed",
            )
        else:
            what, fix = f"{path}: cannot be written ({error.strerror or error})", "choose another place with --output"
        raise SaveError(what, fix=fix) from None


def sync(number: int) -> None:
    """Flush a file or folder to the disk; file systems that cannot are left alone."""
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system lets a folder be opened."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        sync(number)
    finally:
        os.close(number)
