"""The training loop, on one page: batch, loss, backward, clip, step, average, log, preview, save.

It knows a `Task` and nothing else: not what is trained, on which base, or from which pictures. There are no hooks; what
happens in a step stands here, in its order. Nothing random is carried from step to step (see `task.Turn`), so the state of
a run is exactly `checkpoint.State`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from vgm_peft.errors import TrainError
from vgm_peft.train.checkpoint import State
from vgm_peft.train.checkpoint import save as save_checkpoint
from vgm_peft.train.interrupt import Interrupt
from vgm_peft.train.journal import Journal, Taken
from vgm_peft.train.learned import demand_finite
from vgm_peft.train.optim import MovingAverage, build_optimiser, set_rates
from vgm_peft.train.preview import Previews
from vgm_peft.train.task import Group, Setup, Task, Turn

if TYPE_CHECKING:
    from accelerate import Accelerator

    from vgm_peft.train.config import RunConfig

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


def set_up(task: Task[Any], setup: Setup, folder: Path) -> Desk:
    """Make the optimiser and what belongs to it, spread over the processes; the state is that before the first step."""
    config, accelerator, groups = setup.config, setup.accelerator, task.groups()
    parameters = {name: p for group in groups for name, p in group.parameters.items()}
    module, optimiser = accelerator.prepare(Trainee(task, groups), build_optimiser(groups, config.optimiser))
    average = MovingAverage(list(parameters.values()), config.ema)
    state = State(parameters, optimiser, average, accelerator.scaler)
    previews = Previews(task, setup, folder / "samples")
    return Desk(config, accelerator, folder, previews, setup.notices, module, optimiser, state)


def run(desk: Desk) -> bool:
    """Train from where the state stands to the last step. Returns whether it got there, or was interrupted and saved.

    Raises `TrainError` when a loss or gradient is not finite; checkpoints made before stay.
    """
    config, state, main = desk.config, desk.state, desk.accelerator.is_main_process
    with Journal(desk.folder, state.step, config.steps, main) as journal, Interrupt(desk.accelerator) as interrupt:
        for notice in desk.notices:
            journal.say(f"note: {notice}")
        while state.step < config.steps:
            taken = take_step(desk)
            journal.step(state.step, taken)

            last, stopped = state.step == config.steps, interrupt.asked()
            if desk.previews.due(state.step) or last:
                with state.average.in_place():
                    desk.previews.draw(state.step)
            if main and (stopped or _due(config.checkpoint.every, state.step) or last and config.checkpoint.every):
                save_checkpoint(desk.folder / "checkpoints", state, config.checkpoint.keep)
            if stopped and not last:
                journal.say(f"interrupted after step {state.step}; a checkpoint is saved")
                return False
    return True


def take_step(desk: Desk) -> Taken:
    """Batch, loss, backward, clip, step, average; a step that overflows fp16 is taken again at half the loss scale."""
    config, state = desk.config, desk.state
    rate = set_rates(desk.optimiser, config.optimiser, state.step, config.steps)
    for _ in range(MAX_OVERFLOWS):
        loss = torch.stack([_backward(desk, micro) for micro in range(config.accumulation)]).mean()
        norm = _clip(desk)
        values = torch.stack([loss, norm.to(loss)]).tolist()
        overflow = state.scaler is not None and not math.isfinite(values[1])
        if not overflow:
            demand_finite(*values, step=state.step)
        desk.optimiser.step()
        desk.optimiser.zero_grad()
        if not overflow:
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


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
