"""The folder of a run: a name that is free, a lock while it is written, and no second run over the first.

delta.safetensors   what was trained            run.toml        the resolved configuration
exports/            the same for other tools    manifest.json   what it was made from and with
samples/            pictures made on the way    metrics.jsonl   one line per step
data.md, data.json  every picture and file that it learned from, and in which buckets
checkpoints/        to go on from; of a run     tb/             TensorBoard events
                    that ended, the last one
report.html         all of it on one page
"""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from vgm_peft.errors import TrainError
from vgm_peft.train.config import RunConfig
from vgm_peft.train.durable import LEFTOVER, saving, sweep
from vgm_peft.train.lock import LOCK, locked

RECIPE, MANIFEST, REFUSAL = "run.toml", "manifest.json", "data.md"


def choose_folder(config: RunConfig) -> Path:
    """The folder that the configuration names, or the next free `runs/<task>-<pictures>-<n>`."""
    if config.output:
        return Path(config.output)
    named = "+".join(Path(concept.images).resolve().name for concept in config.concepts)
    stem = f"{config.task.name}-{named[:100] or 'pictures'}"
    return next(p for n in range(1, 1_000_000) if _free(p := Path("runs", f"{stem}-{n}")))


@contextmanager
def claimed(folder: Path, resume: bool) -> Generator[Path]:
    """Make the folder ours for the length of the run. Raises `TrainError` when it is another's, `SaveError` without room.

    `resume` says whether it must hold a run already, or must not.
    """
    if resume:
        check_run(folder)
    if not resume and not _free(folder):
        raise TrainError(f"{folder} exists and is not empty", fix="name another --output, or go on with it by --resume")
    fresh = not folder.exists()
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder):
            for place in (folder, folder / "checkpoints", folder / "samples", folder / "exports"):
                sweep(place)
            yield folder
    finally:
        if fresh and not any(folder.iterdir()):  # it failed before there was anything to keep
            folder.rmdir()


def _free(folder: Path) -> bool:
    """Whether a run may have a folder: it is not there, or holds nothing of another."""
    return not folder.exists() or folder.is_dir() and all(map(_of_no_run, folder.iterdir()))


def _of_no_run(path: Path) -> bool:
    """Whether a file is what a run leaves whose pictures were refused, or that was killed before it wrote anything."""
    return path.name in (LOCK, REFUSAL) or LEFTOVER.fullmatch(path.name) is not None


def check_run(folder: Path) -> None:
    """Raise `TrainError` unless a folder holds a run that can be gone on with."""
    if not (folder / RECIPE).is_file():
        raise TrainError(f"{folder} holds no run to go on with", expected=f"a folder with {RECIPE} and checkpoints/")
