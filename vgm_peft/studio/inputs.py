"""Pictures that drawings use, written anew and kept under names of our own; and small ones for the page."""

import base64
import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from vgm_peft.picture import write_image

if TYPE_CHECKING:
    from PIL import Image

MOST_KEPT = 2_000
"""Pictures for drawings that are kept; the oldest go."""


def picture_field(label: str, elem_id: str) -> gr.File:
    """A field for a picture. It takes a file, since gradio's own for pictures decodes whatever it is given."""
    kinds = [".png", ".jpg", ".jpeg", ".webp", ".bmp"]
    return gr.File(label=label, type="filepath", file_types=kinds, height=110, interactive=True, elem_id=elem_id)


def keep_picture(picture: "Image.Image", folder: Path) -> str:
    """Keep a picture that a drawing uses, under a name that its pixels decide, so that no picture is kept twice."""
    said = f"{picture.mode} {picture.size}".encode()
    path = folder / f"{hashlib.sha256(said + picture.tobytes()).hexdigest()[:24]}.png"
    if not path.exists():
        write_image(picture, path)
        kept = sorted(folder.glob("*.png"), key=lambda p: p.stat().st_mtime)
        for old in kept[:-MOST_KEPT]:
            old.unlink(missing_ok=True)
    return path.name


def small_url(picture: "Image.Image", side: int) -> str:
    """A picture, at most `side` pixels wide and high, as a data URL for the page."""
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
