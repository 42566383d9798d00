"""Pictures from a browser: checked, re-encoded and kept under names of our own."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vgm_peft.errors import DataError
from vgm_peft.stack.controls import read_picture

if TYPE_CHECKING:
    from PIL import Image

MIN_SIDE, MAX_SIDE = 16, 4096
"""Pixels a side: fewer are refused; a picture of more is made smaller, since no base learns from so many."""
CAPTION = 4_000
"""Bytes of a caption's file."""
MOST_KEPT = 500
"""Pictures that drawings use which are kept; the oldest go first."""


def keep_pictures(files: Sequence[str], folder: Path, most: int, caption: str = "") -> int:
    """Write every uploaded picture into a new folder as `001.png` ..., its caption beside it; all of them or none.

    Each is decoded, turned upright and written anew, one after another, so that nothing but pixels gets in and only one is in
    memory. A `.txt` among the files is the caption of the picture of its name; others get `caption`, if that is not empty.
    Raises `DataError` naming the first file that is no picture.
    """
    texts = {Path(file).stem: Path(file) for file in files if file.endswith(".txt")}
    pictures = [Path(file) for file in files if not file.endswith(".txt")]
    if not pictures:
        raise DataError("no pictures yet", fix="drop three to twenty pictures of your subject into the field")
    if len(pictures) > most:
        raise DataError(f"{len(pictures)} pictures", expected=f"at most {most}")
    if orphan := next((stem for stem in texts if stem not in {p.stem for p in pictures}), None):
        raise DataError(f"{orphan}.txt: there is no picture of this name", fix="name it like its picture")
    folder.mkdir(parents=True)
    try:
        for number, picture in enumerate(pictures, 1):
            checked(picture).save(folder / f"{number:03}.png")
            text = _caption(texts[picture.stem]) if picture.stem in texts else caption
            if text:
                (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return len(pictures)


def checked(path: Path) -> "Image.Image":
    """Read an uploaded picture as RGB of at most `MAX_SIDE` pixels a side. Raises `DataError`."""
    image = read_picture(path)
    if min(image.size) < MIN_SIDE:
        raise DataError(f"{path.name}: {image.width}x{image.height} pixels", expected=f"at least {MIN_SIDE} a side")
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image


def _caption(path: Path) -> str:
    """An uploaded caption. Raises `DataError` for one that is long or no text."""
    size = path.stat().st_size
    if size > CAPTION:
        raise DataError(f"{path.name}: {size} bytes", expected=f"a caption of at most {CAPTION}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path.name}: no text in UTF-8", fix="save it as UTF-8") from None
    return " ".join(text.split())
