"""Drawing what a `Stack` describes, with stock diffusers pipelines.

Every picture is sampled on its own from its own generator (`seed + i`, on the CPU), so neither the number of pictures
nor the device decides what is on it, and a picture's metadata remakes its bytes on the same machine.
"""

import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from vgm_peft.delta import Delta
from vgm_peft.drawing import drawn_by
from vgm_peft.errors import BaseModelError, ConfigError
from vgm_peft.family import Base, fitting_threads
from vgm_peft.picture import Picture
from vgm_peft.stack.beginning import begin
from vgm_peft.stack.recipe import SCHEDULERS, Stack
from vgm_peft.stack.runtime import Applied

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin
    from PIL import Image


@dataclass(frozen=True)
class Progress:
    """Where the sampling stands: picture `picture` of `pictures`, step `step` of `steps`, both counted from 1."""

    picture: int
    pictures: int
    step: int
    steps: int
    latents: Tensor
    """The noisy latents after the step, (1, C, H, W)."""
    base: Base

    @property
    def fraction(self) -> float:
        """Share of all the work that is done, 0 .. 1."""
        return (self.picture - 1 + self.step / self.steps) / self.pictures

    @torch.no_grad()
    def preview(self) -> "Image.Image":
        """Decode the latents as they are: still noisy, but the picture is recognisable from about half-way on."""
        pixels = self.base.family.decode(self.base, self.latents)
        return to_image((pixels[0].float().permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).nan_to_num().cpu().numpy())


OnStep = Callable[[Progress], bool | None]
"""Called after every step; returning `False` stops the sampling."""


def generate(
    base: Base,
    stack: Stack,
    on_step: OnStep | None = None,
    *,
    given: Mapping[str, Delta] | None = None,
    tell: Callable[[str], None] = warnings.warn,
) -> list[Picture]:
    """Put the stack on the base, draw its pictures, and take it off again, whatever happens.

    Returns the finished pictures: fewer than `stack.count` when `on_step` stopped the sampling. `given` as in `Stack.on`;
    `tell` is told what the user should know.
    """
    record = stack.pinned(skip=given or {})
    with stack.on(base, given=given) as applied:
        for notice in applied.notices:
            tell(notice)
        return list(draw(applied, record, on_step))


@torch.no_grad()
def draw(applied: Applied, record: Stack, on_step: OnStep | None = None) -> Iterator[Picture]:
    """Draw the pictures of a stack that is on its base, one after another; `record` is what their metadata say."""
    base, stack = applied.base, applied.stack
    width, height = stack.width or base.resolution, stack.height or base.resolution
    guidance = base.guidance(stack.guidance)
    record = replace(record, base_digest=base.digest, width=width, height=height, guidance=guidance, count=1).beginning_at(
        record.folder
    )
    beginning = begin(base, stack, (width, height))
    pipe = cast(Any, beginning.pipe)
    arguments: dict[str, Any] = {
        "num_inference_steps": stack.steps,
        "guidance_scale": guidance,
        "output_type": "np",
        **beginning.arguments,
    }
    applied.controls.show(width, height)
    with fitting_threads(base.denoiser), dressed(pipe, scheduler_for(base, stack.scheduler)), drawn_by(base, pipe):
        arguments |= applied.prompting()
        for i in range(stack.count):
            watch = _Watch(base, on_step, i + 1, stack.count, stack.done)
            generator = torch.Generator("cpu").manual_seed(stack.seed + i)
            pixels = pipe(**arguments, generator=generator, callback_on_step_end=watch).images[0]
            if watch.stopped:
                return
            if not np.isfinite(pixels).all():
                raise BaseModelError(
                    f"picture {i + 1} is not finite", fix="use dtype bfloat16 or float32, or smaller strengths"
                )
            seeded = replace(record, seed=stack.seed + i).beginning_at(record.folder)
            yield Picture(beginning.finish(to_image(pixels)), seeded)


def scheduler_for(base: Base, name: str) -> "SchedulerMixin":
    """Make a sampler from the base's own scheduler, so that prediction type, noise schedule and zero-SNR carry over."""
    import diffusers

    if name not in SCHEDULERS:
        raise ConfigError(f'scheduler "{name}"', expected="one of " + ", ".join(SCHEDULERS))
    kind: Any = getattr(diffusers, SCHEDULERS[name][0])
    config = dict(base.pipe.scheduler.config)
    # Bare defaults clip latents to -1 .. 1, which is right for pixels only.
    config.setdefault("clip_sample", False)
    return kind.from_config(config)


class _Watch:
    """The pipeline's step callback: reports, and asks the pipeline to stop when told to."""

    def __init__(self, base: Base, on_step: OnStep | None, picture: int, pictures: int, steps: int) -> None:
        self.base, self.on_step, self.where, self.steps = base, on_step, (picture, pictures), steps
        self.stopped = False

    def __call__(self, pipe: Any, step: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.on_step is not None and not self.stopped:
            progress = Progress(*self.where, min(step + 1, self.steps), self.steps, tensors["latents"], self.base)
            if self.on_step(progress) is False:
                self.stopped = True
                pipe._interrupt = True
        return {}


@contextmanager
def dressed(pipe: "DiffusionPipeline", scheduler: "SchedulerMixin") -> Generator[None]:
    """Give a pipeline another scheduler and no progress bar of its own, for a while."""
    loose: Any = pipe
    before, bar = loose.scheduler, getattr(pipe, "_progress_bar_config", None)
    loose.scheduler = scheduler
    loose.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        loose.scheduler = before
        if bar is None:
            del loose._progress_bar_config
        else:
            loose._progress_bar_config = bar


def to_image(pixels: "np.ndarray[Any, Any]") -> "Image.Image":
    """Turn (P, Q, 3) in 0 .. 1 into a picture, rounding as diffusers does."""
    from PIL import Image

    return Image.fromarray((pixels * 255).round().astype("uint8"))
