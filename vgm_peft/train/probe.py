"""The held-out loss: the task's own, on turns that training never takes, always the same ones, with all dropout off.

Twice measured on the same parameters it is the same number to the last bit, so the smallest difference between two
measurements is one of the parameters.
"""

from typing import TYPE_CHECKING, Any, cast

import torch

from vgm_peft.train.task import Task, Turn, own_chance

if TYPE_CHECKING:
    from accelerate import Accelerator

GATE_DRAWS = 2
"""Batches that tell whether a run changed what its base predicts."""


class Probe:
    """Measures one task."""

    def __init__(self, task: Task[Any], seed: int, accelerator: "Accelerator") -> None:
        self._task, self._seed, self._accelerator = task, seed, accelerator

    @torch.no_grad()
    def losses(self, draws: int) -> list[float]:
        """The loss of each of so many batches. Parameters, modes and chance are afterwards as before."""
        out: list[float] = []
        with own_chance(self._accelerator.device), self._task.evaluating(), self._accelerator.autocast():
            for number in range(draws):
                turn = Turn(self._seed, number, held_out=True)
                torch.manual_seed(turn.value("dropout"))
                out.append(float(self._task.loss(self._task.batch(turn), turn)))
        if self._accelerator.num_processes > 1:  # all must draw the same conclusions, to the last bit
            out = cast(
                torch.Tensor, self._accelerator.reduce(torch.tensor(out, device=self._accelerator.device), "mean")
            ).tolist()
        return out

    def loss(self, draws: int) -> float:
        """Their mean."""
        return sum(self.losses(draws)) / draws
