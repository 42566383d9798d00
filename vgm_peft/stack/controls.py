"""The side networks of a stack: opened, given their pictures, and carried by the stock pipeline that takes them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from vgm_peft.errors import DataError
from vgm_peft.family import Base
from vgm_peft.stack.recipe import ControlUse, Stack

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

MAX_PIXELS = 64_000_000
"""A control picture larger than this is refused before it is decoded."""


@dataclass(frozen=True)
class Control:
    """A side network ready to run: the module, its picture, its strength."""

    network: nn.Module
    picture: "Image.Image"
    strength: float


def open_controls(base: Base, stack: Stack) -> list[Control]:
    """Open what the stack names, leaving out what has strength 0. Raises `DeltaError` or `DataError`."""
    uses = [use for use in stack.controls if use.strength != 0.0]
    return [Control(_open(stack, use, base), read_picture(stack.path(use.image)), use.strength) for use in uses]


def _open(stack: Stack, use: ControlUse, base: Base) -> nn.Module:
    from vgm_peft.sides import open_side

    return open_side(stack.path(use.folder), base)[1]


def carrying(base: Base, controls: list[Control]) -> "tuple[DiffusionPipeline, dict[str, Any]]":
    """Return the stock pipeline that runs the base with these side networks, and the arguments it wants for them.

    Without any it is the base's own. The new pipeline shares every component; nothing is copied, cast or moved.
    """
    if not controls:
        return base.pipe, {}
    from diffusers import AutoPipelineForText2Image

    # `DiffusionPipeline.from_pipe` would cast everything to float32; the automatic one leaves components alone.
    networks = [c.network for c in controls]
    make = cast(Any, AutoPipelineForText2Image).from_pipe
    pipe = make(base.pipe, controlnet=networks, requires_safety_checker=False)
    arguments = {"image": [c.picture for c in controls], "controlnet_conditioning_scale": [c.strength for c in controls]}
    return cast("DiffusionPipeline", pipe), arguments


def read_picture(path: Path) -> "Image.Image":
    """Read a control picture as RGB, upright, without ever decoding more than `MAX_PIXELS`. Raises `DataError`."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{path.name}: {image.width}x{image.height} pixels", expected=f"at most {MAX_PIXELS:,} pixels")
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: no such picture", fix="check the path") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        why = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise DataError(f"{path.name}: not a readable picture{why}", expected="a PNG, JPEG, WebP or BMP file") from None
