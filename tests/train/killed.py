"""What the processes of `forge` do: real runs and real saves, on one base that they all inherit."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.train.forge import at_call, dies_at
from tests.train.ground import files, tiny_base
from vgm_peft.cli import main
from vgm_peft.config import Table
from vgm_peft.train import loop, train
from vgm_peft.train.checkpoint import State, restore, save
from vgm_peft.train.config import bind
from vgm_peft.train.journal import Journal, Taken
from vgm_peft.train.optim import MovingAverage

torch.set_num_threads(1)
tiny_base("sd15")

SETTINGS: dict[str, Table] = {
    "plain": {
        "steps": 5,
        "data": {"batch": 1, "caption_dropout": 0.3, "flip": True},
        "delta": {"dropout": 0.3, "sites": ["cross-attention"]},
        "checkpoint": {"every": 2, "leave": 1},
        "preview": {"every": 2, "count": 1, "steps": 1},
    },
    "rich": {
        "steps": 4,
        "accumulation": 2,
        "ema": 0.9,
        "data": {"batch": 1},
        "delta": {"text": True, "rank_dropout": 0.2, "module_dropout": 0.5, "sites": ["cross-attention"]},
        "optimiser": {"schedule": "cosine", "warmup": 2, "text_lr": 1e-3},
        "loss": {"min_snr": 5.0, "noise_offset": 0.05, "stratified": True, "kind": "huber"},
        "held_out": {"every": 1, "draws": 1},
        "checkpoint": {"every": 1, "keep": 1},
    },
    "scored": {
        "steps": 4,
        "data": {"batch": 1},
        "delta": {"dropout": 0.2, "sites": ["cross-attention"]},
        "optimiser": {"lr": 0.2, "clip": 0.0},
        "scores": {"every": 1, "by": "oracles", "pictures": 1, "steps": 1, "stop_when_worse": 1},
        "checkpoint": {"every": 1, "keep": 1},
    },
}
"""What is killed: together, all that carries something from step to step. At the rate of `scored` its second step draws best,
so it is given up after the third."""


def run(table: Table, resume: str = "", die: int = 0, files: bool = False, count: str = "") -> int:
    """Train to the end, or to the `die`-th call in the loop or after it; with `count` write there how many calls there are."""
    begin, seen = loop.run, [[0]]

    def armed(desk: loop.Desk) -> bool:
        if die:
            dies_at(die, files)
        elif count:
            seen[0] = at_call(0, files, None)
        return begin(desk)

    loop.run = armed
    finished = train(bind(table), resume=Path(resume) if resume else None, base=tiny_base("sd15")).finished
    if count:
        Path(count).write_text(str(seen[0][0]))
    return 0 if finished else 130


def command(arguments: list[str], die: int = 0) -> int:
    """`vgm-train` as typed, but killed once step `die` is recorded."""
    record = Journal.step

    def last_words(journal: Journal, step: int, taken: Taken) -> None:
        record(journal, step, taken)
        if step == die:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.step = last_words  # pyright: ignore[reportAttributeAccessIssue]
    return main("train", arguments)


def kept(folder: Path) -> dict[str, object]:
    """Everything that a run leaves, but the time its steps took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    plain = {name: data for name, data in files(folder).items() if not name.startswith(("tb/", "metrics.jsonl"))}
    return {**plain, "metrics": [{k: v for k, v in line.items() if k != "seconds"} for line in lines]}


def small_state(step: int) -> State:
    """A state with everything in it that a checkpoint can hold; the same for the same step."""
    torch.manual_seed(0)
    parameters = {f"unit{i}/w": nn.Parameter(torch.randn(3, 2)) for i in range(2)}
    optimiser = torch.optim.AdamW(list(parameters.values()), lr=0.1)
    average = MovingAverage(list(parameters.values()), 0.9)
    state = State(parameters, optimiser, average, origin={"seed": 1})
    for number in range(step):
        for p in parameters.values():
            p.grad = torch.full_like(p, 0.1 * number - 0.2)
        optimiser.step()
        average.update(number + 1)
    state.step = step
    return state


def tensors_of(state: State) -> dict[str, torch.Tensor]:
    """All its values, by name."""
    out = {name: p.detach().clone() for name, p in state.parameters.items()}
    for name, p in state.parameters.items():
        out |= {f"{name} {key}": value.clone() for key, value in state.optimiser.state.get(p, {}).items()}
    return out | {f"average {i}": t.clone() for i, t in enumerate(state.average.shadow)}


def save_and_die(root: str, step: int, keep: int, die: int) -> int:
    """Save a checkpoint, but for dying at the `die`-th call that changes files; 0 when there were fewer."""
    state = small_state(step)
    if die:
        dies_at(die, files=True)
    save(Path(root), state, keep)
    return 0


def restored(root: Path, said: list[str] | None = None) -> State:
    """A fresh state brought to the newest whole checkpoint."""
    state: Any = small_state(0)
    restore(root, state, (said if said is not None else []).append)
    return state


KILLED = -signal.SIGKILL
