"""Schedules, and averages of the parameters.

A schedule here is a pure function of the step, not an object with a state: nothing to save, nothing to restore, and a
resumed run has the same rate at the same step. The shapes are those of transformers and diffusers, shifted by one step so
that the first step of a warm-up already learns.
"""

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vgm_peft.train.config_learning import OptimiserConfig, Schedule


def set_rates(optimiser: torch.optim.Optimizer, config: OptimiserConfig, step: int, steps: int) -> float:
    """Give every group its rate for `step` (from 0) of `steps`; return that of the first which is trained in this step.

    A group that is trained in a part of the run has the whole schedule in that part.
    """
    for group in optimiser.param_groups:
        first, last = span_of(group, steps)
        factor = rate_factor(config.schedule, step - first, last - first, config.warmup) if first <= step < last else 0.0
        group["lr"] = group["peak"] * factor
    return next((float(g["lr"]) for g in optimiser.param_groups if not _rests(g, step, steps)), 0.0)


def span_of(group: Mapping[str, Any], steps: int) -> tuple[int, int]:
    """The steps (from 0) in which a group is trained: the first, and the first after them."""
    first, last = group.get("span", (0.0, 1.0))
    return round(first * steps), round(last * steps)


def rest(optimiser: torch.optim.Optimizer, step: int, steps: int) -> None:
    """Take away the gradients of groups that are not trained in this step: they stay bit for bit, and weigh on no norm."""
    for group in optimiser.param_groups:
        for parameter in group["params"] if _rests(group, step, steps) else ():
            parameter.grad = None


def _rests(group: Mapping[str, Any], step: int, steps: int) -> bool:
    first, last = span_of(group, steps)
    return not first <= step < last


@torch.no_grad()
def keep_lengths(optimiser: torch.optim.Optimizer) -> None:
    """After a step, bring the rows of groups that ask for it to their length.

    `clamp`: none is longer than the mean. `pull`: |e| becomes |e| + min(1, 100 lr) (mean - |e|), as in cloneofsimo's lora.
    """
    for group in optimiser.param_groups:
        if "length" not in group or not group["lr"]:
            continue
        for parameter in group["params"]:
            norm = parameter.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            wanted = group["mean_length"] / norm
            share = min(1.0, 100.0 * group["lr"])
            parameter.mul_(wanted.clamp(max=1.0) if group["length"] == "clamp" else 1.0 + share * (wanted - 1.0))


def rate_factor(schedule: Schedule, step: int, steps: int, warmup: int = 0) -> float:
    """The rate at `step` (from 0) as a share of its peak, in 0 .. 1.

    After the warm-up, with `u` going from 0 to 1 over the rest of the run: linear `1 - u`; cosine `(1 + cos(pi u)) / 2`;
    polynomial `(1 - u)^2`; inverse_sqrt `sqrt(k / (k + s))`, `s` steps after the warm-up of length `k` (at least 1).
    """
    if step < warmup:
        return (step + 1) / warmup
    past, rest = step - warmup, max(1, steps - warmup)
    u = min(1.0, past / rest)
    if schedule == "linear":
        return 1.0 - u
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * u))
    if schedule == "polynomial":
        return (1.0 - u) ** 2
    if schedule == "inverse_sqrt":
        scale = max(1, warmup)
        return math.sqrt(scale / (scale + past))
    return 1.0


class Average(Protocol):
    """What is drawn and saved in place of the parameters as they are trained."""

    shadow: list[Tensor]
    """Its own values, where it has any: what a checkpoint holds of it."""

    def update(self, steps: int) -> None:
        """Take in the parameters as they are after `steps` steps (1, 2 ...)."""
        ...

    def in_place(self) -> AbstractContextManager[None]:
        """Put the averages where the parameters are; the parameters come back bit for bit."""
        ...


class OwnAverage:
    """The average that an optimiser keeps by itself and shows in its mode for evaluation (schedule-free)."""

    def __init__(self, parameters: Sequence[nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
        self.parameters, self._optimiser = list(parameters), optimiser
        self.shadow: list[Tensor] = []

    def update(self, steps: int) -> None:
        """Nothing: the optimiser has done it."""

    @contextmanager
    def in_place(self) -> Generator[None]:
        """Switch the mode; on the way back the library's arithmetic would lose the last bits, so copies are put back."""
        optimiser: Any = self._optimiser
        kept = [p.detach().clone() for p in self.parameters]
        optimiser.eval()
        try:
            yield
        finally:
            optimiser.train()
            with torch.no_grad():
                for parameter, value in zip(self.parameters, kept, strict=True):
                    parameter.copy_(value)


class MovingAverage:
    """Exponential moving average of parameters; the decay grows to `decay` as (1 + n) / (10 + n), so early steps fade fast.

    With decay 0 it holds nothing and costs nothing.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.shadow: list[Tensor] = [p.detach().clone() for p in self.parameters] if decay else []

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take in the parameters as they are after `steps` steps (1, 2 ...)."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        for average, parameter in zip(self.shadow, self.parameters, strict=bool(self.shadow)):
            average.lerp_(parameter, 1.0 - decay)

    @contextmanager
    def in_place(self) -> Generator[None]:
        """Put the averages where the parameters are, for drawing or saving; the parameters come back bit for bit."""
        kept = [p.detach().clone() for p in self.parameters] if self.shadow else []
        self._put(self.shadow)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=bool(values)):
            parameter.copy_(value)
