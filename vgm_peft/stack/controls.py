"""The side networks of a stack: opened, put beside the base, and shown their pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from vgm_peft.beside import Beside
from vgm_peft.errors import DataError
from vgm_peft.family import Base
from vgm_peft.side import Side
from vgm_peft.stack.recipe import ControlUse, Stack

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 64_000_000
"""A control picture larger than this is refused before it is decoded."""


@dataclass(frozen=True)
class _Control:
    """One side network of a stack, with all that was read for it."""

    use: ControlUse
    side: Side
    network: nn.Module
    picture: "Image.Image"
    mask: "Image.Image | None"


class Controls:
    """The side networks of a stack. Opening reads and checks everything; `put_on` has the base hear them."""

    def __init__(self, base: Base, stack: Stack) -> None:
        """Open what the stack names, leaving out what would never be heard. Raises `DeltaError` or `DataError`."""
        self._base = base
        self._all = [_read(base, stack, use) for use in stack.controls if use.strength != 0.0 and use.start < use.end]
        self._besides: list[Beside] = []

    @property
    def networks(self) -> list[nn.Module]:
        """The networks."""
        return [control.network for control in self._all]

    def put_on(self) -> None:
        """Put all of them beside the base; they are silent until `show`."""
        for control in self._all:
            use = control.use
            span = (use.start, use.end)
            beside = Beside(self._base, control.side, control.network, use.strength, span=span, guess=use.guess)
            self._besides.append(beside)
            beside.layers = control.side.layers(self._base, use.layers)

    @torch.no_grad()
    def show(self, width: int, height: int) -> None:
        """Tell every network its picture, brought to the size in pixels that is drawn now where it must have that size."""
        for control, beside in zip(self._all, self._besides, strict=True):
            beside.tell(
                pixels_of(control.picture, (width, height) if control.side.paired else None).to(self._base.device)[None]
            )
            if control.mask is not None:
                beside.mask = pixels_of(control.mask, (width, height)).to(self._base.device).mean(0, keepdim=True)[None]

    def remove(self) -> None:
        """Take all of them away."""
        while self._besides:
            self._besides.pop().remove()


def _read(base: Base, stack: Stack, use: ControlUse) -> _Control:
    from vgm_peft.sides import open_side

    mask = read_picture(stack.path(use.mask)) if use.mask else None
    return _Control(use, *open_side(stack.path(use.network), base), read_picture(stack.path(use.image)), mask)


def pixels_of(picture: "Image.Image", size: tuple[int, int] | None) -> Tensor:
    """Return a picture as (3, P, Q) in 0 .. 1, at a size (width, height) where one is asked for, as diffusers resizes."""
    from PIL import Image

    if size is not None and picture.size != size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32) / 255.0).permute(2, 0, 1)


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
