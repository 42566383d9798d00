"""Checkpoints from which a run goes on exactly: the same bytes at the end as if it had never stopped.

A checkpoint is a folder `step-000100` of three files: `state.safetensors` (parameters, optimiser state, moving average),
`state.json` (the step and all that is no tensor) and, written last, `manifest.json`: size and SHA-256 of the other two and
of itself. The folder is written aside, synced and renamed, so a half-written one never has the name of a whole one; and it
loses that name before it is removed. Chance needs no saving (see `task.Turn`), nor do rates (`optim`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from vgm_peft.errors import TrainError, VgmError
from vgm_peft.formats.canonical import open_header, read_tensors, save_file
from vgm_peft.train.durable import folder_aside, remove_folder, sweep
from vgm_peft.train.origin import Origin, demand_same, differences
from vgm_peft.train.seal import check, read_facts, seal, write_facts

if TYPE_CHECKING:
    from vgm_peft.train.optim import Average

VERSION = 3
TENSORS, FACTS = "state.safetensors", "state.json"


@dataclass
class Best:
    """The step that cost least so far (see `judge.py`), and how many measurements since were worse."""

    step: int
    cost: float
    worse: int = 0


@dataclass
class State:
    """All that changes during a run, by reference: what a checkpoint holds."""

    parameters: Mapping[str, nn.Parameter]
    """By name, in the order of the optimiser's groups."""
    optimiser: torch.optim.Optimizer
    average: "Average"
    scaler: "torch.amp.grad_scaler.GradScaler | None" = None
    """fp16 only."""
    step: int = 0
    """Steps done."""
    waiting: set[str] = field(default_factory=set[str])
    """Names of the units whose gradients have been nothing but zeros so far."""
    best: Best | None = None
    origin: Origin | None = None
    """What the run is made from (configuration, data and base digests); a checkpoint of another origin is refused."""


def save(root: Path, state: State, keep: int) -> Path:
    """Write a checkpoint under `root`, then remove the oldest until `keep` are left. Raises `SaveError`."""
    folder = root / f"step-{state.step:06d}"
    sweep(root)
    if not _whole(folder):  # otherwise it was saved before: the same step of the same run holds the same bytes
        if folder.exists():
            remove_folder(folder)
        tensors, facts = _capture(state)
        with folder_aside(folder) as aside:
            save_file(tensors, aside / TENSORS)
            write_facts(aside / FACTS, facts)
            seal(aside, VERSION, state.step)
    # Later ones can only be damaged ones that this run went back behind: they count for nothing and are overwritten yet.
    for old in [p for p in _newest_first(root) if _step(p) <= state.step][keep:]:
        remove_folder(old)
    return folder


def thin(root: Path, leave: int) -> None:
    """Leave the newest `leave` whole checkpoints under `root` and no others. Raises `SaveError`."""
    left = 0
    for folder in _newest_first(root):
        if left < leave and _whole(folder):
            left += 1
        else:
            remove_folder(folder)


def restore(root: Path, state: State, notice: Callable[[str], None]) -> Path | None:
    """Bring `state` to the newest whole checkpoint under `root`, and return it; `notice` hears of those passed over.

    A run that was stopped before its first checkpoint begins again: `None`. Raises `TrainError` when all there are are
    damaged, or when the newest whole one belongs to a run of another origin.
    """
    passed: list[str] = []
    for folder in _newest_first(root):
        try:
            facts, tensors = _read(folder)
        except (OSError, ValueError, KeyError, TypeError, VgmError) as error:
            passed.append(f"checkpoint {folder.name} is passed over: {error}")
            notice(passed[-1])
            continue
        demand_same(folder, cast(Origin, facts["origin"]), state.origin or {})
        if elsewhere := differences(facts["machine"], _machine(state)):
            notice(f"begun on another machine (then -> now): {', '.join(elsewhere)}; the result may differ in its last digits")
        _apply(folder, state, facts, tensors)
        return folder
    if not passed:
        return None
    raise TrainError(f"{root} holds no whole checkpoint: {'; '.join(passed)}", fix="start the run anew in another --output")


def _capture(state: State) -> tuple[dict[str, Tensor], dict[str, object]]:
    tensors: dict[str, Tensor] = {f"parameter/{name}": p.detach() for name, p in state.parameters.items()}
    numbers: dict[str, object] = {}
    for name, parameter in state.parameters.items():
        for key, value in state.optimiser.state.get(parameter, {}).items():
            (tensors if isinstance(value, Tensor) else numbers)[f"optimiser/{name}/{key}"] = value
    groups: list[dict[str, object]] = []
    for number, group in enumerate(state.optimiser.param_groups):
        groups.append({k: v for k, v in group.items() if k != "params" and not isinstance(v, Tensor)})
        tensors |= {f"group/{number}/{k}": v for k, v in group.items() if isinstance(v, Tensor)}
    for name, shadow in zip(state.parameters, state.average.shadow, strict=bool(state.average.shadow)):
        tensors[f"average/{name}"] = shadow
    away = _device(state)
    facts: dict[str, object] = {
        "step": state.step,
        "numbers": numbers,
        "groups": groups,
        "on_cpu": sorted(name for name, t in tensors.items() if t.device.type == "cpu" != away),
        "scaler": None if state.scaler is None else state.scaler.state_dict(),
        "waiting": sorted(state.waiting),
        "best": None if state.best is None else vars(state.best),
        "machine": _machine(state),
        "origin": state.origin,
    }
    return tensors, facts


def _machine(state: State) -> dict[str, object]:
    """What the last digits of a result depend on besides the run itself."""
    return {"torch": torch.__version__, "device": _device(state), "threads": torch.get_num_threads()}


def _device(state: State) -> str:
    return next(iter(state.parameters.values())).device.type


def _apply(folder: Path, state: State, facts: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    _put(folder, state, tensors)
    for name, value in [*tensors.items(), *facts["numbers"].items()]:
        if not name.startswith("optimiser/"):
            continue
        owner, key = name.removeprefix("optimiser/").rsplit("/", 1)
        parameter = state.parameters[owner]
        if isinstance(value, Tensor) and name not in facts["on_cpu"]:
            value = value.to(parameter.device)
        state.optimiser.state[parameter][key] = value  # `load_state_dict` would turn 8-bit states into float32
    for number, (group, values) in enumerate(zip(state.optimiser.param_groups, facts["groups"], strict=True)):
        group |= {k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in values.items()}
        for key in [k for k, v in group.items() if isinstance(v, Tensor)]:
            group[key] = tensors[f"group/{number}/{key}"].to(group[key].device)
    if state.scaler is not None:
        state.scaler.load_state_dict(facts["scaler"])
    state.step, state.waiting = int(facts["step"]), set(facts["waiting"])
    state.best = None if facts["best"] is None else Best(**facts["best"])


@torch.no_grad()
def _put(folder: Path, state: State, tensors: Mapping[str, Tensor]) -> None:
    fresh, _ = _capture(state)
    own = ("parameter/", "average/")
    wanted = {name for name in fresh if name.startswith(own)}
    found = {name for name in tensors if name.startswith(own)}
    if wanted != found or any(fresh[n].shape != tensors[n].shape for n in wanted):
        odd = sorted(wanted ^ found) or [n for n in sorted(wanted) if fresh[n].shape != tensors[n].shape]
        raise TrainError(f"{folder}: does not fit this run (first: {odd[0]})", fix="resume with the run's own run.toml")
    for name in wanted:
        fresh[name].copy_(tensors[name])


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a checkpoint whose every byte is as it was written. Raises `ValueError`, `OSError` or `VgmError`."""
    check(folder, (TENSORS, FACTS), VERSION, _step(folder))
    return read_facts(folder / FACTS), read_tensors(open_header(folder / TENSORS))


def _whole(folder: Path) -> bool:
    try:
        check(folder, (TENSORS, FACTS), VERSION, _step(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _newest_first(root: Path) -> list[Path]:
    """The checkpoints under `root`, by step and not by time; what is half-written has another name."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.glob("step-*") if p.name.removeprefix("step-").isdecimal()), key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
