"""The drawing under way, for whatever hooks into the denoiser: which pipeline draws, and where it stands.

One denoiser serves several stock pipelines (from noise, from a picture, within a mask). Only the one that draws now knows
whether its calls hold the two halves of classifier-free guidance, and which of the scheduler's steps it does: one that
begins from a picture leaves the first of them out.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vgm_peft.family import Base

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Span = tuple[float, float]
"""From which share of the steps that are done to which, 0 .. 1."""


@contextmanager
def drawn_by(base: Base, pipe: "DiffusionPipeline") -> Generator[None]:
    """Have `guided` and `moment` ask a pipeline made of the base's components, for as long as it draws."""
    before, base.drawer = base.drawer, pipe
    try:
        yield
    finally:
        base.drawer = before


def guided(base: Base) -> bool:
    """Whether a call of the denoiser holds the halves without and with the prompt, in this order."""
    return bool(getattr(base.drawer, "do_classifier_free_guidance", False))


def moment(base: Base, t: "Tensor | float | int") -> Span:
    """Return the share of the steps at which the step at timestep `t` begins, and that at which it ends.

    Where no pipeline does such a step, both are the share of the noise that is gone.
    """
    now = float(torch.as_tensor(t).flatten()[0])
    done = _steps(base.drawer)
    found = (done == now).nonzero()
    if len(found):
        return int(found[0]) / len(done), (int(found[0]) + 1) / len(done)
    gone = 1.0 - (now + 1.0) / base.process.steps
    return gone, gone


def _steps(pipe: "DiffusionPipeline") -> Tensor:
    """The timesteps that a pipeline does; none before it drew."""
    if not pipe.scheduler.num_inference_steps:
        return torch.empty(0)
    steps = torch.as_tensor(pipe.scheduler.timesteps, dtype=torch.float64).flatten().cpu()
    return steps[-int(getattr(pipe, "num_timesteps", len(steps))) :]
