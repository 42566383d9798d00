"""What the checks of a run cost: the share of a step's processor time that is spent in them, in one run of the loop.

Counted are all calls of the loop that only look: whether the loss and the gradients are finite, which parts have had a
gradient, whether loss or gradient are out of their usual range, and the line in the journal. The whole and its parts are
timed in the same steps, so what else the machine does falls on both alike.

    python benchmarks/checks.py [--base toybox] [--batch 4] [--rank 8] [--steps 40]
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.step import get_base, make_config
from vgm_peft.data import Cache
from vgm_peft.train import loop
from vgm_peft.train.config import RunConfig
from vgm_peft.train.journal import Journal
from vgm_peft.train.run import _accelerator
from vgm_peft.train.task import Setup
from vgm_peft.train.watch import Watch

CHECKS: tuple[tuple[Any, str], ...] = ((loop, "demand_finite"), (Watch, "gradients"), (Watch, "step"), (Journal, "step"))


def counted(owner: Any, name: str, spent: dict[str, float]) -> Callable[[], None]:
    """Have the processor time of a function added up; returns what puts it back."""
    plain, label = getattr(owner, name), f"{owner.__name__.rpartition('.')[2]}.{name}"

    def timed(*args: Any, **named: Any) -> Any:
        begin = time.process_time()
        try:
            return plain(*args, **named)
        finally:
            spent[label] = spent.get(label, 0.0) + time.process_time() - begin

    setattr(owner, name, timed)
    return lambda: setattr(owner, name, plain)


def measure(name: str, batch: int, rank: int, steps: int) -> tuple[float, dict[str, float]]:
    """Processor seconds of so many steps of the loop, and what of them each check took."""
    spent: dict[str, float] = {}
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
        config = make_config(RunConfig, folder, batch, rank)
        setup = Setup(config, get_base(name, "cpu"), Cache(folder / "cache"), _accelerator(config), cleanup)
        desk = loop.set_up(config.task_class().prepare(setup), setup, folder)
        desk.config = replace(config, steps=2)
        loop.run(desk)  # what is done once is done
        for owner, check in CHECKS:
            cleanup.callback(counted(owner, check, spent))
        desk.config = replace(config, steps=2 + steps)
        begin = time.process_time()
        loop.run(desk)
        return time.process_time() - begin, spent


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=cast(str, __doc__).splitlines()[0])
    parser.add_argument("--base", default="toybox", help="toybox, a folder, or a hub id")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    whole, spent = measure(args.base, args.batch, args.rank, args.steps)
    print(f"base {args.base}, batch {args.batch}, rank {args.rank}, {torch.get_num_threads()} thread(s), {args.steps} steps\n")
    print("| | processor time a step, ms | share |\n|---|---|---|")
    rows = [("a step of the loop", whole), *sorted(spent.items()), ("all checks", sum(spent.values()))]
    print("\n".join(f"| {label} | {1e3 * seconds / args.steps:.2f} | {seconds / whole:.2%} |" for label, seconds in rows))


if __name__ == "__main__":
    main()
