"""Knowing when to stop: the held-out loss is measured now and then; the best step is kept, and is the result."""

from pathlib import Path

from vgm_peft.train.checkpoint import Best, State
from vgm_peft.train.checkpoint import save as save_checkpoint
from vgm_peft.train.config_learning import HeldOutConfig
from vgm_peft.train.probe import Probe


def measure(probe: Probe, state: State, plan: HeldOutConfig, keep: Path | None) -> float:
    """Measure, note in the state how that compares with the best, and keep a checkpoint of a new best one under `keep`."""
    with state.average.in_place():
        loss = probe.loss(plan.draws)
    if state.best is not None and not loss < state.best.loss:
        state.best.worse += 1
        return loss
    state.best = Best(state.step, loss)
    if keep is not None:
        save_checkpoint(keep, state, keep=1)
    return loss


def given_up(state: State, plan: HeldOutConfig) -> bool:
    """Whether the last measurements were all no better than the best, so often that going on is in vain."""
    return plan.stop_when_worse > 0 and state.best is not None and state.best.worse >= plan.stop_when_worse
