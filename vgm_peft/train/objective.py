"""The denoising objective that every task shares: corrupt, predict, compare.

Mean squared error of the prediction (Ho et al. 2020, arXiv 2006.11239 eq. 14, and its v form) unless `[loss]` says otherwise;
what else there is stands in `losses`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vgm_peft.family import Base, Condition, Query
from vgm_peft.process import Process
from vgm_peft.train.config_learning import LossConfig
from vgm_peft.train.losses import averaged, errors, timesteps, weights
from vgm_peft.train.task import Turn

Teacher = Callable[[Query, Tensor], Tensor]
"""What the network should answer, given the question and the usual target: for those that are to answer as another does."""


@dataclass(frozen=True)
class Lesson:
    """What a loss is taken on: latents `x0` (B, C, H, W), their B conditions, `sizes` (B, 6), and how much each place counts,
    `mask` (B, 1, H, W) in 0 .. 1; without one all count alike."""

    x0: Tensor
    condition: Condition
    sizes: Tensor
    mask: Tensor | None = None

    def __add__(self, other: "Lesson") -> "Lesson":
        """Both, one after the other."""
        mask = None if self.mask is None and other.mask is None else torch.cat([self._counts(), other._counts()])
        condition = Condition.cat([self.condition, other.condition])
        return Lesson(torch.cat([self.x0, other.x0]), condition, torch.cat([self.sizes, other.sizes]), mask)

    def _counts(self) -> Tensor:
        return self.x0.new_ones(len(self.x0), 1, *self.x0.shape[2:]) if self.mask is None else self.mask


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
        lesson: Lesson,
        turn: Turn,
        *,
        teacher: Teacher | None = None,
        purpose: str = "noise",
    ) -> Tensor:
        """Return the weighted loss of each picture of a lesson, (B,) float32.

        Noise and timesteps are drawn on the CPU from the turn, so they are the same on every device; two calls in one
        turn need a `purpose` each to draw differently.
        """
        x0 = lesson.x0
        generator = turn.generator(purpose)
        noise = torch.randn(x0.shape, generator=generator)
        if self.config.noise_offset:
            noise += self.config.noise_offset * torch.randn(*x0.shape[:2], 1, 1, generator=generator)
        noise, t = noise.to(x0.device), timesteps(len(x0), generator, self.process, self.config).to(x0.device)
        query = Query(self.process.corrupt(x0, noise, t), t, lesson.condition, lesson.sizes)
        target = self.process.target(x0, noise, t)
        if teacher is not None:  # first, so that what follows the timestep is left as the question of the loss has it
            target = teacher(query, target)
        prediction = self.base.family.predict(self.base, query)
        error = averaged(errors(prediction, target, t, self.process, self.config), lesson.mask)
        weight = weights(t, self.process, self.config)
        return error if weight is None else error * weight
