"""How a run draws (class pictures, previews, pictures to be scored): a sampler put on a pipeline for a while, and a call."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from vgm_peft.family import Base
from vgm_peft.stack.sampling import scheduler_for

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SCHEDULER = "dpmpp"


@contextmanager
def sampler(pipe: "DiffusionPipeline", base: Base) -> Generator[Any]:
    """Give a pipeline the sampler and no progress bar of its own; within the context it is the pipeline, loosely typed."""
    loose = cast(Any, pipe)
    before, bar = loose.scheduler, getattr(pipe, "_progress_bar_config", None)
    loose.scheduler = scheduler_for(base, SCHEDULER)
    loose.set_progress_bar_config(disable=True)
    try:
        yield loose
    finally:
        loose.scheduler = before
        loose.set_progress_bar_config(**(bar or {}))


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How pictures are drawn: number i of a call has the noise of `seed + i`."""

    seed: int
    steps: int
    guidance: float | None = None
    """`None`: the base's own."""


def draw(pipe: Any, base: Base, prompts: Sequence[str], how: Drawing) -> Tensor:
    """Draw prompts in one call of a pipeline that has the sampler: (B, P, Q, 3) uint8 on the CPU.

    Decoded by the family, since the VAE may be in another precision than what
    sampled, and one by one, since that is where most memory is used.
    """
    chance = [torch.Generator().manual_seed(how.seed + i) for i in range(len(prompts))]
    latents: Tensor = pipe(
        prompt=list(prompts) if len(prompts) > 1 else prompts[0],
        num_inference_steps=how.steps,
        guidance_scale=base.guidance(how.guidance),
        generator=chance if len(prompts) > 1 else chance[0],
        output_type="latent",
    ).images
    pixels = torch.cat([base.family.decode(base, one) for one in latents.split(1)]).float().permute(0, 2, 3, 1) / 2 + 0.5
    return (pixels.clamp(0, 1).nan_to_num() * 255).round().to(torch.uint8).cpu()
