"""Exact, safe training state: one safetensors file per stage, written aside and moved into place.

A stage's clock counts training seconds over all its runs, so a schedule by wall clock survives an interruption.
"""

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Facts = dict[str, float | int | str]


@dataclass
class Clock:
    """Training seconds of one stage against its budget; `spent` comes from the earlier runs of the stage."""

    budget: float
    spent: float = 0.0
    started: float | None = None

    def elapsed(self) -> float:
        """Seconds trained so far; the first call starts the clock."""
        if self.started is None:
            self.started = time.monotonic()
        return self.spent + time.monotonic() - self.started

    def progress(self) -> float:
        """Share of the budget that is used up, 0..1."""
        return min(1.0, self.elapsed() / self.budget)


def save_state(path: Path, tensors: Mapping[str, Tensor], facts: Facts) -> None:
    """Write tensors and facts to one safetensors file; a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, aside, {"facts": json.dumps(facts)})
    os.replace(aside, path)


def load_state(path: Path) -> tuple[dict[str, Tensor], Facts]:
    """Read what `save_state` wrote."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        facts: Facts = json.loads((file.metadata() or {}).get("facts", "{}"))
    return tensors, facts


def module_tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """The module's state under a prefix, for `save_state`."""
    return {f"{prefix}.{name}": value for name, value in module.state_dict().items()}


def restore_module(prefix: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put a state saved under a prefix back into the module; every key must match."""
    start = len(prefix) + 1
    module.load_state_dict({k[start:]: v for k, v in tensors.items() if k.startswith(prefix + ".")})


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's per-parameter tensors, for `save_state`."""
    found: dict[str, Tensor] = {}
    for index, slots in optimiser.state_dict()["state"].items():
        for name, value in slots.items():
            found[f"optimiser.{index}.{name}"] = torch.as_tensor(value)
    return found


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors saved by `optimiser_tensors` back."""
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, index, name = key.split(".", 2)
            slots.setdefault(int(index), {})[name] = value
    whole = optimiser.state_dict()
    whole["state"] = slots
    optimiser.load_state_dict(whole)


def replace_folder(new: Path, place: Path) -> None:
    """Move the finished folder `new` to `place`, putting aside and then deleting what was there."""
    old = place.with_name(place.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.replace(place, old)
    os.replace(new, place)
    shutil.rmtree(old, ignore_errors=True)


def say(line: str) -> None:
    """Print one log line with the time of day (UTC), at once."""
    print(time.strftime("%H:%M:%S ", time.gmtime()) + line, flush=True)
