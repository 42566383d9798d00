"""Did it learn? A run whose parameters are not finite, never moved, or change nothing, must not end as if all were well."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vgm_peft.errors import TrainError
from vgm_peft.train.checkpoint import State
from vgm_peft.train.config import RunConfig
from vgm_peft.train.watch import some, unit_of

PATIENCE = 4
"""Steps before every unit must have moved: behind several layers of zeros a gradient needs a few steps to arrive."""


UNLUCKY = 1e-9
"""Chance that a unit may have of being left out of every step by `module_dropout` before it is blamed for not moving."""


@dataclass(frozen=True)
class Beginning:
    """What a run is compared with at its end."""

    values: Mapping[str, str]
    """Fingerprints of the parameters."""
    answers: Sequence[float]
    """Losses on held-out noise."""


def patience(config: RunConfig) -> float:
    """Steps before every unit must have moved: more where `module_dropout` leaves units out of a share of them by chance."""
    shares = [piece.options.get("module_dropout", 0.0) for piece in config.delta.pieces()] if config.delta else []
    absence = max((share for share in shares if isinstance(share, float)), default=0.0)
    return PATIENCE + (math.log(UNLUCKY) / math.log(absence) if absence else 0.0)


def fingerprints(parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """A digest of every parameter's values, by name."""
    return {name: _digest(parameter) for name, parameter in parameters.items()}


def demand_finite(loss: float, norm: float, step: int, culprits: Sequence[str] = ()) -> None:
    """Raise `TrainError` naming the step when its loss or its gradient is not a number, and the parameters it is found in."""
    for name, value in (("loss", loss), ("gradient", norm)):
        if not math.isfinite(value):
            where = f", in {some(culprits, 3)}" if culprits else ""
            raise TrainError(
                f"the {name} of step {step + 1} is {value}{where}",
                expected="a finite number",
                fix="lower optimiser.lr, or compute in bf16 or float32; the checkpoints before it are unharmed",
            )


def demand_learned(state: State, before: Mapping[str, str], patience: float) -> None:
    """Raise `TrainError` unless all parameters are finite and every unit moved by its own gradient since `before`.

    Weight decay alone moves a parameter too, so one whose gradients were all zero counts as still. Before `patience` steps only
    one thing is asked: that anything moved at all.
    """
    infinite = [name for name, p in state.parameters.items() if not bool(torch.isfinite(p).all())]
    if infinite:
        raise TrainError(f"{some(infinite, 3)} holds values that are not finite", fix="lower optimiser.lr")
    moved: dict[str, bool] = {}
    for name, parameter in state.parameters.items():
        unit = unit_of(name)
        moved[unit] = moved.get(unit, False) or unit not in state.waiting and _digest(parameter) != before[name]
    still = [unit for unit, yes in moved.items() if not yes]
    if len(still) == len(moved) or still and state.step >= patience:
        raise TrainError(
            f"nothing was learned at {len(still)} of {len(moved)} places ({some(still)})",
            expected="every trained part to move",
            fix="raise the learning rate of that part, or leave it out of delta.sites",
        )


def demand_changed(before: Sequence[float], after: Sequence[float]) -> None:
    """Raise `TrainError` unless the held-out losses are finite and not all as they were before the first step."""
    if not all(map(math.isfinite, after)):
        raise TrainError(f"the loss on held-out noise is {after[0]}", expected="a finite number", fix="lower optimiser.lr")
    if list(before) == list(after):
        raise TrainError(
            "the base predicts exactly what it did before the run, though every part moved",
            expected="a change of its answers to held-out noise",
            fix="look at the scale of the delta (alpha, scale), or raise optimiser.lr",
        )


def _digest(parameter: nn.Parameter) -> str:
    plain = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(plain.numpy().tobytes(), digest_size=16).hexdigest()
