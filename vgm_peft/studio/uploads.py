"""Pictures from a browser: checked, re-encoded and kept under names of our own."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from vgm_peft.errors import DataError
from vgm_peft.stack.controls import read_picture

MIN_SIDE = 16


def keep_pictures(files: Sequence[str], folder: Path, most: int) -> int:
    """Write every uploaded picture into a new folder as `001.png` ...; all of them or none.

    Each is decoded, turned upright and written anew, so that nothing but pixels gets in. Raises `DataError` naming the
    first file that is no picture.
    """
    if not files:
        raise DataError("no pictures yet", fix="drop three to twenty pictures of your subject into the field")
    if len(files) > most:
        raise DataError(f"{len(files)} pictures", expected=f"at most {most}")
    images = [(Path(file).name, read_picture(Path(file))) for file in files]
    for name, image in images:
        if min(image.size) < MIN_SIDE:
            raise DataError(f"{name}: {image.width}x{image.height} pixels", expected=f"at least {MIN_SIDE} a side")
    folder.mkdir(parents=True)
    try:
        for i, (_, image) in enumerate(images):
            image.save(folder / f"{i + 1:03}.png")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return len(images)
