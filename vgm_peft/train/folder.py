"""The folder of a run: a name that is free, a lock while it is written, and no second run over the first.

delta.safetensors   what was trained            run.toml        the resolved configuration
exports/            the same for other tools    manifest.json   what it was made from and with
samples/            pictures made on the way    metrics.jsonl   one line per step
checkpoints/        to go on from               tb/             TensorBoard events
"""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from vgm_peft.errors import TrainError
from vgm_peft.train.config import RunConfig
from vgm_peft.train.durable import saving

RECIPE, MANIFEST, LOCK = "run.toml", "manifest.json", ".lock"


def choose_folder(config: RunConfig) -> Path:
    """The folder that the configuration names, or the next free `runs/<task>-<pictures>-<n>`."""
    if config.output:
        return Path(config.output)
    stem = f"{config.task.name}-{Path(config.data.images).resolve().name or 'pictures'}"
    return next(p for n in range(1, 1_000_000) if not (p := Path("runs", f"{stem}-{n}")).exists())


@contextmanager
def claimed(folder: Path, resume: bool) -> Generator[Path]:
    """Make the folder ours for the length of the run. Raises `TrainError` when it is another's, `SaveError` without room.

    `resume` says whether it must hold a run already, or must not.
    """
    if resume:
        check_run(folder)
    if not resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TrainError(f"{folder} exists and is not empty", fix="name another --output, or go on with it by --resume")
    fresh = not folder.exists()
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR)
    try:
        _lock(lock, folder)
        yield folder
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(lock)
        if fresh and not any(folder.iterdir()):  # it failed before there was anything to keep
            folder.rmdir()


def check_run(folder: Path) -> None:
    """Raise `TrainError` unless a folder holds a run that can be gone on with."""
    if not (folder / RECIPE).is_file():
        raise TrainError(f"{folder} holds no run to go on with", expected=f"a folder with {RECIPE} and checkpoints/")


def _lock(number: int, folder: Path) -> None:
    """Take the lock; the system lets go of it when the process ends in whatever way, so a dead run blocks nobody."""
    try:
        import fcntl
    except ImportError:  # Windows: the check for a filled folder must do
        return
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise TrainError(f"another run is writing to {folder}", fix="wait for it, or name another --output") from None
