"""Checkpoints from which a run goes on exactly: the same bytes at the end as if it had never stopped.

A checkpoint is a folder `step-000100` of two files, `state.safetensors` (parameters, optimiser state, moving average) and
`state.json` (the step, what is no tensor, and the SHA-256 of the first file). It is written aside, synced and renamed, so
a half-written one never has the name of a whole one. Chance needs no saving (see `task.Turn`), nor do rates (`optim`).
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from vgm_peft.errors import TrainError, VgmError
from vgm_peft.formats.canonical import open_header, read_tensors, save_file
from vgm_peft.train.durable import folder_aside, write_text

if TYPE_CHECKING:
    from vgm_peft.train.optim import MovingAverage

VERSION = 1
TENSORS, FACTS = "state.safetensors", "state.json"


@dataclass
class State:
    """All that changes during a run, by reference: what a checkpoint holds."""

    parameters: Mapping[str, nn.Parameter]
    """By name, in the order of the optimiser's groups."""
    optimiser: torch.optim.Optimizer
    average: "MovingAverage"
    scaler: "torch.amp.grad_scaler.GradScaler | None" = None
    """fp16 only."""
    step: int = 0
    """Steps done."""
    origin: Mapping[str, object] | None = None
    """What the run is made from (configuration, data and base digests); a checkpoint of another origin is refused."""


def save(root: Path, state: State, keep: int) -> Path:
    """Write a checkpoint under `root`, then remove the oldest until `keep` are left. Raises `SaveError`."""
    tensors, numbers = _capture(state)
    folder = root / f"step-{state.step:06d}"
    if folder.exists():
        if _whole(folder):  # saved before; the same step of the same run holds the same bytes
            return folder
        shutil.rmtree(folder)
    with folder_aside(folder) as aside:
        save_file(tensors, aside / TENSORS)
        facts = {
            "version": VERSION,
            "step": state.step,
            "sha256": _digest(aside / TENSORS),
            "numbers": numbers,
            "scaler": None if state.scaler is None else state.scaler.state_dict(),
            "origin": state.origin,
        }
        write_text(aside / FACTS, json.dumps(facts, indent=1, sort_keys=True) + "\n")
    for old in _newest_first(root)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def restore(root: Path, state: State, notice: Callable[[str], None]) -> None:
    """Bring `state` to the newest whole checkpoint under `root`; say by `notice` which ones were passed over and why.

    Raises `TrainError` when there is none, or when it belongs to a run of another origin.
    """
    for folder in _newest_first(root):
        try:
            facts, tensors = _read(folder)
        except (OSError, ValueError, KeyError, VgmError) as error:
            notice(f"checkpoint {folder.name} is passed over: {error}")
            continue
        _check_origin(folder, cast(Mapping[str, object], facts["origin"]), state.origin or {})
        _apply(folder, state, facts, tensors)
        return
    raise TrainError(f"{root} holds no whole checkpoint", fix="start the run anew in another folder (--output)")


def _capture(state: State) -> tuple[dict[str, Tensor], dict[str, object]]:
    tensors: dict[str, Tensor] = {f"parameter/{name}": p.detach() for name, p in state.parameters.items()}
    numbers: dict[str, object] = {}
    for name, parameter in state.parameters.items():
        for key, value in state.optimiser.state.get(parameter, {}).items():
            (tensors if isinstance(value, Tensor) else numbers)[f"optimiser/{name}/{key}"] = value
    for name, shadow in zip(state.parameters, state.average.shadow, strict=bool(state.average.shadow)):
        tensors[f"average/{name}"] = shadow
    return tensors, numbers


@torch.no_grad()
def _apply(folder: Path, state: State, facts: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    fresh, _ = _capture(state)
    wanted = {name for name in fresh if not name.startswith("optimiser/")}
    found = {name for name in tensors if not name.startswith("optimiser/")}
    if wanted != found or any(fresh[n].shape != tensors[n].shape for n in wanted):
        odd = sorted(wanted ^ found) or [n for n in sorted(wanted) if fresh[n].shape != tensors[n].shape]
        raise TrainError(f"{folder}: does not fit this run (first: {odd[0]})", fix="resume with the run's own run.toml")
    for name in wanted:
        fresh[name].copy_(tensors[name])
    saved: dict[str, dict[str, object]] = {}
    for name, value in [*tensors.items(), *facts["numbers"].items()]:
        if name.startswith("optimiser/"):
            parameter, key = name.removeprefix("optimiser/").rsplit("/", 1)
            saved.setdefault(parameter, {})[key] = value
    order = {name: number for number, name in enumerate(state.parameters)}
    table = state.optimiser.state_dict()
    state.optimiser.load_state_dict({**table, "state": {order[name]: values for name, values in saved.items()}})
    if state.scaler is not None:
        state.scaler.load_state_dict(facts["scaler"])
    state.step = int(facts["step"])


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    if facts["version"] != VERSION:
        raise ValueError(f"it is of version {facts['version']}, expected {VERSION}")
    if _digest(folder / TENSORS) != facts["sha256"]:
        raise ValueError("its bytes are not those that were written")
    return facts, read_tensors(open_header(folder / TENSORS))


def _whole(folder: Path) -> bool:
    try:
        _read(folder)
    except (OSError, ValueError, KeyError, VgmError):
        return False
    return True


def _check_origin(folder: Path, saved: Mapping[str, object], now: Mapping[str, object]) -> None:
    changed = [key for key in sorted({*saved, *now}) if saved.get(key) != now.get(key)]
    if changed:
        key = changed[0]
        raise TrainError(
            f"{folder.parent.parent.name}: {key} was {saved.get(key)!r} and is now {now.get(key)!r}",
            expected="the run that is resumed, unchanged",
            fix="set it back, or start a new run",
        )


def _newest_first(root: Path) -> list[Path]:
    """The checkpoints under `root`, by step; what is half-written has another name."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.glob("step-*") if p.name.removeprefix("step-").isdigit()), key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
