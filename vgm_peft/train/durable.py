"""Writing small files and whole folders so that a crash or a full disk leaves either the old state or the new one."""

import errno
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from vgm_peft.errors import SaveError


def write_text(path: Path, text: str) -> Path:
    """Write a text file aside, sync it, and rename it into place. Raises `SaveError`; the old file is then unharmed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with saving(path):
        try:
            with aside.open("w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                sync(file.fileno())
            os.replace(aside, path)
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
        finally:
            shutil.rmtree(aside, ignore_errors=True)


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
