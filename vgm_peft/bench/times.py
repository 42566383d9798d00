"""What a step of every method costs, measured side by side: short runs in turns, so that all meet the same machine.

The runs of a comparison are hours apart; what else the machine did in each of them would say more than the methods.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from vgm_peft.bench.plan import Plan, Trial
from vgm_peft.config import Table, merge
from vgm_peft.train.durable import saving, write_text

if TYPE_CHECKING:
    from vgm_peft.family import Base

ROUNDS, STEPS = 3, 10
SHORT: Table = {"optimiser": {"warmup": 0}, "task": {"class_images": 4, "class_steps": 1}}
"""Laid over a recipe: what does not change what a step costs."""


def step_times(plan: Plan, load: "Callable[[], Base]", say: Callable[[str], None]) -> Mapping[str, float]:
    """Return milliseconds of a step by method, the least of all rounds: other work only ever makes a step slower.

    Kept in `times.json`, by method, and measured only for those that are not there.
    """
    path = plan.output / "times.json"
    kept: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    left = [method for method in plan.methods if method not in kept]
    if left:
        say(f"timing {len(left)} methods side by side")
        base, found = load(), {method: float("inf") for method in left}
        for _ in range(ROUNDS):
            for method in left:
                found[method] = min(found[method], _short_run(Trial(plan, plan.subjects[0], method, 0), base))
        kept |= {method: round(1e3 * seconds, 1) for method, seconds in found.items()}
        write_text(path, json.dumps(kept, indent=2) + "\n")
    return {method: kept[method] for method in plan.methods}


def _short_run(trial: Trial, base: "Base") -> float:
    """Seconds of the quickest step of a run of a few."""
    from vgm_peft.train.run import train

    folder = trial.plan.output / "timing"
    try:
        train(trial.config(merge(SHORT, {"output": str(folder), "steps": min(STEPS, trial.plan.steps or STEPS)})), base=base)
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return min(json.loads(line)["seconds"] for line in lines)
    finally:
        with saving(folder):
            shutil.rmtree(folder, ignore_errors=True)
