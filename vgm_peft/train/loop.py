"""The training loop, on one page: batch, loss, backward, clip, step, average, measure, log, preview, save.

It knows a `Task` and nothing else: not what is trained, on which base, or from which pictures. There are no hooks; what
happens in a step stands here, in its order. Nothing random is carried from step to step (see `task.Turn`), so the state of
a run is exactly `checkpoint.State`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from vgm_peft.errors import TrainError
from vgm_peft.train.checkpoint import State
from vgm_peft.train.checkpoint import save as save_checkpoint
from vgm_peft.train.exam import Examiner
from vgm_peft.train.interrupt import Interrupt
from vgm_peft.train.journal import Journal, Taken
from vgm_peft.train.judge import Judge
from vgm_peft.train.learned import demand_finite, patience
from vgm_peft.train.limits import due
from vgm_peft.train.optim import MovingAverage, OwnAverage, keep_lengths, rest, set_rates
from vgm_peft.train.optimisers import build_optimiser, kind_named
from vgm_peft.train.preview import Previews
from vgm_peft.train.probe import Probe
from vgm_peft.train.task import Group, Setup, Task, Turn
from vgm_peft.train.watch import Watch, unit_of

if TYPE_CHECKING:
    from accelerate import Accelerator

    from vgm_peft.train.config import RunConfig

CHECKPOINTS = "checkpoints"
MAX_OVERFLOWS = 24
"""Times that one fp16 step may overflow; the loss scale has then been halved from 2^16 to nothing."""


class Trainee(nn.Module):
    """The trained parameters as one module whose forward is the loss, so that accelerate can wrap and spread it."""

    def __init__(self, task: Task[Any], groups: Sequence[Group]) -> None:
        super().__init__()
        self.task = task
        self.trained = nn.ParameterList([p for group in groups for p in group.parameters.values()])

    def forward(self, turn: Turn) -> Tensor:
        """Return the mean loss of one turn."""
        return self.task.loss(self.task.batch(turn), turn)


@dataclass
class Desk:
    """What the loop works with besides the task."""

    config: "RunConfig"
    accelerator: "Accelerator"
    folder: Path
    previews: Previews
    notices: list[str]
    trainee: nn.Module
    optimiser: torch.optim.Optimizer
    state: State
    judge: Judge
    watch: Watch

    @property
    def checkpoints(self) -> Path:
        """Where they are kept."""
        return self.folder / CHECKPOINTS


def set_up(task: Task[Any], setup: Setup, folder: Path, examiner: Examiner | None = None) -> Desk:
    """Make the optimiser and what belongs to it, spread over the processes; the state is that before the first step."""
    config, accelerator, groups = setup.config, setup.accelerator, task.groups()
    parameters = {name: p for group in groups for name, p in group.parameters.items()}
    plain = build_optimiser(groups, config.optimiser)
    module, optimiser = accelerator.prepare(Trainee(task, groups), plain)
    values = list(parameters.values())
    average = OwnAverage(values, plain) if kind_named(config.optimiser.name).averages else MovingAverage(values, config.ema)
    waiting = {unit_of(name) for name in parameters}
    state = State(parameters, optimiser, average, accelerator.scaler, waiting=waiting)
    late = frozenset(unit_of(name) for group in groups if group.span[0] for name in group.parameters)
    previews, watch = Previews(task, setup, folder / "samples"), Watch(parameters, patience(config), late)
    judge = Judge(setup, Probe(task, config.seed, accelerator), examiner, folder / CHECKPOINTS / "best")
    return Desk(config, accelerator, folder, previews, setup.notices, module, optimiser, state, judge, watch)


def run(desk: Desk) -> bool:
    """Train from where the state stands to the last step. Returns whether it got there, or was interrupted and saved.

    Raises `TrainError` when a loss or gradient is not finite; checkpoints made before stay.
    """
    config, state, main = desk.config, desk.state, desk.accelerator.is_main_process
    with Journal(desk.folder, state.step, config.steps, main) as journal, Interrupt(desk.accelerator) as interrupt:
        for notice in desk.notices:
            journal.say(f"note: {notice}")
        desk.watch.replay(journal.history)
        while state.step < config.steps and not desk.judge.given_up(state):
            taken = take_step(desk)
            last, stopped = state.step == config.steps, interrupt.asked()
            found = desk.judge.measure(state, last)
            taken = replace(taken, held_out=found.held_out, scores=found.scores)
            journal.step(state.step, replace(taken, warnings=desk.watch.step(state.step, taken, state.waiting)))

            last = last or desk.judge.given_up(state)
            if last or due(config.preview.every, state.step):
                with state.average.in_place():
                    desk.previews.draw(state.step)
            if main and (stopped or due(config.checkpoint.every, state.step, last)):
                journal.settle()
                save_checkpoint(desk.checkpoints, state, config.checkpoint.keep)
            if stopped and not last:
                journal.say(f"interrupted after step {state.step}; a checkpoint is saved")
                return False
    return True


def take_step(desk: Desk) -> Taken:
    """Batch, loss, backward, clip, step, lengths, average; a step that overflows fp16 is taken again at half the loss scale."""
    config, state = desk.config, desk.state
    rate = set_rates(desk.optimiser, config.optimiser, state.step, config.steps)
    for _ in range(MAX_OVERFLOWS):
        loss = torch.stack([_backward(desk, micro) for micro in range(config.accumulation)]).mean()
        rest(desk.optimiser, state.step, config.steps)
        norm = _clip(desk)
        values = torch.stack([loss, norm.to(loss)]).tolist()
        overflow = state.scaler is not None and not math.isfinite(values[1])
        if not overflow:
            finite = all(map(math.isfinite, values))
            demand_finite(*values, step=state.step, culprits=() if finite else _culprits(desk))
            desk.watch.gradients(state.waiting)
        desk.optimiser.step()
        desk.optimiser.zero_grad()
        if not overflow:
            keep_lengths(desk.optimiser)
            state.step += 1
            state.average.update(state.step)
            return Taken(values[0], rate, values[1])
    raise TrainError(f"step {state.step + 1} overflows fp16 at every loss scale", fix="compute in bf16 or float32")


def _backward(desk: Desk, micro: int) -> Tensor:
    """Add one micro-batch's gradients to the parameters; return its loss."""
    config, accelerator = desk.config, desk.accelerator
    position = desk.state.step * config.accumulation + micro
    turn = Turn(config.seed, position * accelerator.num_processes + accelerator.process_index)
    torch.manual_seed(turn.value("dropout"))
    with accelerator.accumulate(desk.trainee):
        loss = cast(Tensor, desk.trainee(turn))
        accelerator.backward(loss)
    return cast(Tensor, accelerator.reduce(loss.detach(), "mean"))


def _clip(desk: Desk) -> Tensor:
    """Scale all gradients together down to the norm allowed; return the norm they had."""
    limit = desk.config.optimiser.clip or float("inf")
    return cast(Tensor, desk.accelerator.clip_grad_norm_(desk.trainee.parameters(), limit))


def _culprits(desk: Desk) -> list[str]:
    """Where a step is not finite. Clipping has spread it over all gradients, so they are made again; chance is the same."""
    desk.optimiser.zero_grad()
    for micro in range(desk.config.accumulation):
        _backward(desk, micro)
    found = [name for name, p in desk.state.parameters.items() if not bool(torch.isfinite(p).all())]
    gradients = {name: p.grad for name, p in desk.state.parameters.items() if p.grad is not None}
    return found or [name for name, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())]
