"""The side networks of a stack: opened, put beside the base, and shown their pictures."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from vgm_peft.beside import Beside
from vgm_peft.errors import DataError
from vgm_peft.family import Base
from vgm_peft.side import Side
from vgm_peft.stack.files import DIGEST_OF, with_files
from vgm_peft.stack.recipe import Stack
from vgm_peft.stack.uses import ControlUse

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
    digest: str
    """SHA-256 of the network."""


class Controls:
    """The side networks of a stack. Opening reads and checks everything; `put_on` has the base hear them."""

    def __init__(
        self,
        base: Base,
        stack: Stack,
        before: "Controls | None" = None,
        plain: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Open what the stack names, leaving out what would never be heard. Raises `DeltaError` or `DataError`.

        Networks that those of `before` have open are taken from there. Others are opened within `plain`, in which the base has
        its own weights: some take theirs from it.
        """
        self._base = base
        self.uses = uses_of(stack)
        open_already = [] if before is None else list(before._all)
        self._all: list[_Control] = []
        for told, use in zip(self.uses, _heard(stack), strict=True):
            known = next((c for c in open_already if c.digest == told.network_digest), None)
            if known is None:
                with plain():
                    side, network = open_network(base, stack.path(use.network))
            else:
                open_already.remove(known)
                side, network = known.side, known.network
            self._all.append(_read(stack, use, side, network, told.network_digest))
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
            size, conditions = (width, height) if control.side.paired else None, control.side.conditions(control.network)
            shown = [pixels_of(part, size) for part in parts_of(control.picture, conditions, (width, height))]
            beside.tell(torch.cat(shown).to(self._base.device)[None])
            if control.mask is not None:
                beside.mask = pixels_of(control.mask, (width, height)).to(self._base.device).mean(0, keepdim=True)[None]

    def remove(self) -> None:
        """Take all of them away."""
        while self._besides:
            self._besides.pop().remove()


def uses_of(stack: Stack) -> tuple[ControlUse, ...]:
    """Return the side networks of a stack that are heard, their files known by the bytes alone: equal if all of them are."""
    return tuple(with_files(use, lambda kind, name, _: ("-", DIGEST_OF[kind](stack.path(name)))) for use in _heard(stack))


def _heard(stack: Stack) -> list[ControlUse]:
    return [use for use in stack.controls if use.strength != 0.0 and use.start < use.end]


def open_network(base: Base, path: Path) -> tuple[Side, nn.Module]:
    """Load a side network of whichever kind, frozen."""
    from vgm_peft.sides import open_side

    return open_side(path, base)


def _read(stack: Stack, use: ControlUse, side: Side, network: nn.Module, digest: str) -> _Control:
    mask = read_picture(stack.path(use.mask), "black") if use.mask else None
    return _Control(use, side, network, read_picture(stack.path(use.image), "black"), mask, digest)


def parts_of(picture: "Image.Image", count: int, size: tuple[int, int]) -> "list[Image.Image]":
    """Return `count` pictures that lie side by side in one, to draw at a size (width, height).

    Raises `DataError` for a picture that cannot be that: it has the proportions of `size` as a whole rather than part by part.
    """
    width, height = picture.size
    whole, wanted = log(width / height), log(size[0] / size[1])
    if width % count or abs(whole - log(count) - wanted) > abs(whole - wanted):
        raise DataError(
            f"a control picture of {width}x{height} pixels for a network that reads {count}",
            expected=f"{count} pictures of {size[0]}x{size[1]} side by side, {count * size[0]}x{size[1]}",
            fix="put black ones in place of those that are not there",
        )
    return [picture.crop((i * width // count, 0, (i + 1) * width // count, height)) for i in range(count)]


def pixels_of(picture: "Image.Image", size: tuple[int, int] | None) -> Tensor:
    """Return a picture as (3, P, Q) in 0 .. 1, at a size (width, height) where one is asked for, as diffusers resizes."""
    from PIL import Image

    if size is not None and picture.size != size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32) / 255.0).permute(2, 0, 1)


def read_picture(path: Path, paper: str = "white") -> "Image.Image":
    """Read a picture as RGB, 8 bits, upright, laid on paper of a colour where it can be seen through.

    Never decodes more than `MAX_PIXELS`. Raises `DataError`.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{path.name}: {image.width}x{image.height} pixels", expected=f"at most {MAX_PIXELS:,} pixels")
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits, of which pillow would make white
                upright = Image.fromarray((np.asarray(upright) / 257).round().clip(0, 255).astype(np.uint8))
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, paper), upright)
            return upright.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: no such picture", fix="check the path") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        why = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise DataError(f"{path.name}: not a readable picture{why}", expected="a PNG, JPEG, WebP or BMP file") from None
