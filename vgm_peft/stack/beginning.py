"""What pictures begin from: noise, another picture (img2img), or another picture within a mask (inpainting).

diffusers' own pipelines of the base's class draw all three, made of its components, so whatever is on the base is heard in
each. A picture to begin from is noised as far as `Stack.change` says and denoised again (SDEdit, Meng et al. 2021, arXiv
2108.01073); where a mask is black its latents are put back after every step, with that step's noise (blended latent
diffusion, Avrahami et al. 2022, arXiv 2206.02779), and in the end its very pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from vgm_peft.errors import BaseModelError, DataError
from vgm_peft.family import Base
from vgm_peft.stack.controls import read_picture
from vgm_peft.stack.recipe import Stack

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Beginning:
    """How the pictures of a stack begin: the stock pipeline that draws them, and what it is told of it."""

    pipe: "DiffusionPipeline"
    arguments: Mapping[str, object]
    kept: "tuple[Image.Image, Image.Image] | None" = None
    """With a mask: the picture, and the mask, white where it is drawn anew."""

    def finish(self, drawn: Image.Image) -> Image.Image:
        """Put back the pixels that are to stay."""
        return drawn if self.kept is None else Image.composite(drawn, *self.kept)


def begin(base: Base, stack: Stack, size: tuple[int, int]) -> Beginning:
    """Read what a stack begins from, brought to the size (width, height) that is drawn.

    A picture of another shape loses an even part of its edges. Its mask has its size and goes the same way; what is at
    least half white is drawn anew. Raises `DataError` for what cannot be read, a mask of another size or one without white.
    """
    shape = {"width": size[0], "height": size[1]}
    if not stack.image:
        return Beginning(base.pipe, shape)
    image = read_picture(stack.path(stack.image), "white")
    fitted = _fitted(image, size)
    told = {"image": fitted, "strength": stack.change}
    if not stack.paint:
        return Beginning(_sharing(base, "AutoPipelineForImage2Image"), told)
    path = stack.path(stack.paint)
    mask = read_picture(path, "black").convert("L")
    if mask.size != image.size:
        raise DataError(
            f"{path.name}: a mask of {mask.width}x{mask.height} pixels",
            expected=f"{image.width}x{image.height}, like its picture",
        )
    mask = _fitted(mask, size).point([0] * 128 + [255] * 128)
    if mask.getbbox() is None:
        raise DataError(f"{path.name}: nothing in it is white", expected="a mask that is white where the picture is drawn anew")
    pipe = _sharing(base, "AutoPipelineForInpainting")
    return Beginning(pipe, {**told, **shape, "mask_image": mask}, (fitted, mask))


def _fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)


def _sharing(base: Base, task: str) -> "DiffusionPipeline":
    """Make the base's pipeline of another task, of the same components; nothing is copied."""
    import diffusers

    auto: Any = getattr(diffusers, task)
    try:
        pipe = auto.from_pipe(base.pipe)
    except ValueError:
        raise BaseModelError(
            f"{base.source}: diffusers has no {task.removeprefix('AutoPipelineFor')} for a {type(base.pipe).__name__}",
            fix="leave the image out",
        ) from None
    if hasattr(pipe, "watermark"):  # a pipeline has one by whether a package is installed, not by what it is made of
        pipe.watermark = getattr(base.pipe, "watermark", None)
    return pipe
