"""Did it learn? A run whose parameters are not finite, or in part never moved, must not end as if all were well."""

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from vgm_peft.errors import TrainError
from vgm_peft.train.checkpoint import State

PATIENCE = 4
"""Steps before every unit must have moved: behind several layers of zeros a gradient needs a few steps to arrive."""


def fingerprints(parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """A digest of every parameter's values, by name."""
    return {name: _digest(parameter) for name, parameter in parameters.items()}


def demand_finite(loss: float, norm: float, step: int) -> None:
    """Raise `TrainError` naming the step when its loss or its gradient is not a number."""
    for name, value in (("loss", loss), ("gradient", norm)):
        if not abs(value) < float("inf"):
            raise TrainError(
                f"the {name} of step {step + 1} is {value}",
                expected="a finite number",
                fix="lower optimiser.lr, or compute in bf16 or float32; the checkpoints before it are unharmed",
            )


def demand_learned(state: State, before: Mapping[str, str]) -> None:
    """Raise `TrainError` unless all parameters are finite and every unit moved by its own gradient since `before`.

    Weight decay alone moves a parameter too, so one whose gradients were all zero counts as still.
    """
    infinite = [name for name, p in state.parameters.items() if not bool(torch.isfinite(p).all())]
    if infinite:
        raise TrainError(f"{infinite[0]} holds values that are not finite", fix="lower optimiser.lr")
    moved: dict[str, bool] = {}
    for name, parameter in state.parameters.items():
        unit = name.rsplit("/", 1)[0]
        momentum = state.optimiser.state.get(parameter, {}).get("exp_avg")
        pushed = momentum is None or bool(momentum.any())
        moved[unit] = moved.get(unit, False) or pushed and _digest(parameter) != before[name]
    still = [unit for unit, yes in moved.items() if not yes]
    if len(still) == len(moved) or still and state.step >= PATIENCE:
        raise TrainError(
            f"nothing was learned at {len(still)} of {len(moved)} places (first: {still[0]})",
            expected="every trained part to move",
            fix="raise the learning rate of that part, or leave it out of delta.sites",
        )


def _digest(parameter: nn.Parameter) -> str:
    plain = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(plain.numpy().tobytes(), digest_size=16).hexdigest()
