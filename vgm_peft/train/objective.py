"""The denoising objective that every task shares: corrupt, predict, compare.

Mean squared error of the prediction (Ho et al. 2020, arXiv 2006.11239 eq. 14, and its v form), with the min-SNR weight
(arXiv 2303.09556), offset noise, and a choice of how timesteps are drawn.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vgm_peft.family import Base, Condition, Query, Residuals
from vgm_peft.process import Process
from vgm_peft.train.config import LossConfig
from vgm_peft.train.task import Turn

Side = Callable[[Query], Residuals]
"""What a side network adds, given the question that the denoiser gets."""
Teacher = Callable[[Query, Tensor], Tensor]
"""What the network should answer, given the question and the usual target: for those that are to answer as another does."""


@dataclass(frozen=True)
class Objective:
    """The loss of one base under one `[loss]`."""

    base: Base
    config: LossConfig
    process: Process

    @classmethod
    def of(cls, base: Base, config: LossConfig) -> "Objective":
        """Make it; raises `BaseModelError` when the base cannot be trained so (zero-terminal SNR and epsilon)."""
        if config.zero_terminal_snr is None:
            return cls(base, config, base.process)
        return cls(base, config, Process.of(base.pipe.scheduler.config, config.zero_terminal_snr))

    def losses(
        self,
        x0: Tensor,
        condition: Condition,
        sizes: Tensor,
        turn: Turn,
        side: Side | None = None,
        purpose: str = "noise",
        teacher: Teacher | None = None,
    ) -> Tensor:
        """Return the weighted loss of each picture, (B,) float32, for latents `x0` (B, C, H, W) and B conditions.

        Noise and timesteps are drawn on the CPU from the turn, so they are the same on every device; two calls in one
        turn need a `purpose` each to draw differently.
        """
        generator = turn.generator(purpose)
        noise = torch.randn(x0.shape, generator=generator)
        if self.config.noise_offset:
            noise += self.config.noise_offset * torch.randn(*x0.shape[:2], 1, 1, generator=generator)
        noise, t = noise.to(x0.device), self.timesteps(len(x0), generator).to(x0.device)
        query = Query(self.process.corrupt(x0, noise, t), t, condition, sizes)
        target = self.process.target(x0, noise, t)
        if teacher is not None:  # first, so that what follows the timestep is left as the question of the loss has it
            target = teacher(query, target)
        prediction = self.base.family.predict(self.base, query, None if side is None else side(query))
        error = F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)
        return error if self.config.min_snr is None else error * self.process.weight(t, self.config.min_snr)

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw `count` timesteps (int64, uniform over 0 .. N-1), each alone or one from each `count`-th of the schedule."""
        if not self.config.stratified:
            return torch.randint(0, self.process.steps, (count,), generator=generator)
        place = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
        return (place * (self.process.steps / count)).long().clamp_(max=self.process.steps - 1)
