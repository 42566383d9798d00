"""Knowing when to stop: a run is measured now and then; its best step is kept, and is the result.

What decides is the held-out loss, or, where pictures are scored, their total. Either way the best step is the one that costs
least: a loss is a cost, and so is what a total lacks of 1.
"""

from dataclasses import dataclass
from pathlib import Path

from vgm_peft.score import Scores
from vgm_peft.train.checkpoint import Best, State
from vgm_peft.train.checkpoint import save as save_checkpoint
from vgm_peft.train.exam import Examiner
from vgm_peft.train.limits import due
from vgm_peft.train.probe import Probe
from vgm_peft.train.task import Setup


@dataclass(frozen=True)
class Measured:
    """What was measured after a step; `None` is what was not due."""

    held_out: float | None = None
    scores: Scores | None = None


class Judge:
    """Measures one run."""

    def __init__(self, setup: Setup, probe: Probe, examiner: Examiner | None, folder: Path) -> None:
        """Keep a checkpoint of the best step in `folder`; there is an examiner where pictures are scored."""
        self.probe, self.folder, self._examiner = probe, folder, examiner
        self._held_out, self._scores = setup.config.held_out, setup.config.scores
        self._by_scores = examiner is not None and self._scores.decide
        self._keeps = setup.accelerator.is_main_process

    @property
    def decides(self) -> bool:
        """Whether there is a best step to go back to when the run ends."""
        return self._by_scores or self._held_out.every > 0

    def measure(self, state: State, last: bool) -> Measured:
        """Measure what is due after a step or at the last one, and note in the state how that compares with the best."""
        probe = self.probe if due(self._held_out.every, state.step, last) else None
        examiner = self._examiner if due(self._scores.every, state.step, last) else None
        if probe is None and examiner is None:
            return Measured()
        with state.average.in_place():
            found = Measured(probe and probe.loss(self._held_out.draws), examiner and examiner.scores())
        cost = found.held_out
        if self._by_scores:
            cost = None if found.scores is None else 1.0 - found.scores.total
        if cost is not None:
            self._compare(state, cost)
        return found

    def _compare(self, state: State, cost: float) -> None:
        """Of equals take the later: as long as a score is still 0, learning has only begun."""
        if state.best is not None and not cost <= state.best.cost:
            state.best.worse += 1
            return
        state.best = Best(state.step, cost)
        if self._keeps:
            save_checkpoint(self.folder, state, keep=1)

    def given_up(self, state: State) -> bool:
        """Whether the last measurements were all worse than the best, so often that going on is in vain."""
        patience = (self._scores if self._by_scores else self._held_out).stop_when_worse
        return patience > 0 and state.best is not None and state.best.worse >= patience

    def verdict(self, state: State, done: int) -> str:
        """In plain words: which step the parameters in the state are of, after `done` steps, and why they are the result."""
        step = f"step {done}, the last" if state.step == done else f"step {state.step} of {done}"
        if state.best is None:
            return step
        if self._by_scores:
            return f"{step}, whose pictures scored best: total {1.0 - state.best.cost:.4g}"
        return f"{step}, which had the lowest held-out loss: {state.best.cost:.4g}"
