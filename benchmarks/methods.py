"""What every method costs: its training step over the same step with plain LoRA, and beside peft and lycoris-lora.

One step is noise, U-Net forward, loss, backward, AdamW, on the whole of Toybox's U-Net; only what is attached to it differs.
For each method at its own layers (those that its literature trains) there run side by side, turn about, within one process:

- the method as it is here,
- LoRA as it is here with about as many trained values: on the same layers, or on the attention where those hold no matrices,
- peft's and LyCORIS' implementation of the same method with the same settings on the same layers, where they have one.

Looked at is the median over the rounds of the ratio within a round, of processor time (other work on the machine makes
time on the wall wander several-fold; the JSON has both). Memory is what the step holds at the end of the forward, counted and
not sampled: the U-Net, what is trained with its gradient and AdamW's two moments, what is frozen beside it, and every tensor
that autograd has saved (each storage once). What an operation needs for itself while it runs is not in it.

    python benchmarks/methods.py [--methods lokr,dora] [--rounds 12] [--batch 2] [--json FILE]
"""

import argparse
import gc
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch

sys.path.insert(0, str(Path(__file__).parent))
from cases import Case, cases  # noqa: E402
from runners import Batches, Runner, equal_lora, of_lycoris, of_peft, ours, runner  # noqa: E402
from step import STAND_IN, Span, examples, get_base  # noqa: E402

from vgm_peft.deltas import TABLE, method_named  # noqa: E402
from vgm_peft.errors import VgmError  # noqa: E402
from vgm_peft.family import Base  # noqa: E402
from vgm_peft.site import choose  # noqa: E402

NEAR = 0.1
"""Share by which the values trained by two programs may differ before the table says so."""


@dataclass(frozen=True)
class Result:
    """One method, measured."""

    name: str
    sites: int
    values: int
    lora_rank: int
    lora_values: int
    target: float | None
    step_ms: float
    """Median of processor time."""
    over_lora: float
    quartiles: tuple[float, float]
    over_lora_wall: float
    memory_over_lora: float
    others: Mapping[str, "Other"]
    """Program -> what its step costs over ours."""


@dataclass(frozen=True)
class Other:
    """Another program beside ours: its step and memory over ours, and how many values it trains."""

    step: float
    memory: float
    values: int


def measure(name: str, case: Case, base: Base, batches: Batches, rounds: int) -> Result:
    """Run one method beside LoRA and the other programs, turn about."""
    method = method_named(case.kind)
    sites = choose(base.sites, method.where, base.family.presets, method.ops)
    first = runner("ours", base, batches, ours(sites, case.kind, case.options))
    lora_sites, rank = equal_lora(base, sites, first.values)
    runners = [first, runner("lora", base, batches, ours(lora_sites, "lora", {"rank": rank}))]
    for label, maker, told in (("peft", of_peft, case.peft), ("lycoris", of_lycoris, case.lycoris)):
        if told is not None:
            try:
                runners.append(runner(label, base, batches, maker(sites, *told)))
            except Exception as error:  # noqa: BLE001 - what another program cannot do is a finding, not our fault
                print(f"{name}: {label} fails: {type(error).__name__}: {str(error)[:160]}", file=sys.stderr)
    _take_turns(runners, rounds)
    return _result(name, case, len(sites), rank, runners)


def _take_turns(runners: Sequence[Runner], rounds: int) -> None:
    for each in runners:
        each.step()
    gc.collect()
    gc.disable()
    for number in range(rounds):
        shift = number % len(runners)
        for each in (*runners[shift:], *runners[:shift]):
            wall, cpu = time.perf_counter(), time.process_time()
            each.step()
            each.spans.append(Span(time.perf_counter() - wall, time.process_time() - cpu))
    gc.enable()


def _result(name: str, case: Case, sites: int, rank: int, runners: Sequence[Runner]) -> Result:
    mine, lora, *others = runners
    ratios = [a.cpu / b.cpu for a, b in zip(mine.spans, lora.spans, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Result(
        name,
        sites,
        mine.values,
        rank,
        lora.values,
        case.target,
        1e3 * statistics.median(s.cpu for s in mine.spans),
        middle,
        (low, high),
        statistics.median(a.wall / b.wall for a, b in zip(mine.spans, lora.spans, strict=True)),
        mine.held / lora.held,
        {
            o.name: Other(
                statistics.median(a.cpu / b.cpu for a, b in zip(o.spans, mine.spans, strict=True)), o.held / mine.held, o.values
            )
            for o in others
        },
    )


# --- telling -----------------------------------------------------------------------------------------------------------

HEAD = (
    "| method | layers | trained | LoRA rank | step, ms | step / LoRA | quartiles | wanted | memory / LoRA | "
    "peft / ours | LyCORIS / ours |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def row(r: Result) -> str:
    """One line of the table."""

    def other(name: str) -> str:
        found = r.others.get(name)
        if found is None:
            return ""
        differs = abs(found.values / r.values - 1) > NEAR
        return f"{found.step:.2f}" + (f" ({found.values / r.values:.2g}x values)" if differs else "")

    cells = (
        r.name,
        f"{r.sites}",
        f"{r.values:,}",
        f"{r.lora_rank}" + ("" if abs(r.lora_values / r.values - 1) <= 0.5 else f" ({r.lora_values / r.values:.2g}x values)"),
        f"{r.step_ms:.0f}",
        f"**{r.over_lora:.2f}**",
        f"{r.quartiles[0]:.2f} .. {r.quartiles[1]:.2f}",
        "" if r.target is None else f"{r.target:.2f}",
        f"{r.memory_over_lora:.2f}",
        other("peft"),
        other("lycoris"),
    )
    return "| " + " | ".join(cells) + " |"


def each_result(names: Sequence[str], base: Base, batch: int, rounds: int) -> Iterator[Result]:
    """Measure the cases in turn."""
    batches, known = examples(base, batch, 8), cases()
    for name in names:
        torch.manual_seed(0)
        yield measure(name, known[name], base, batches, rounds)
        gc.collect()


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=cast(str, __doc__).splitlines()[0])
    parser.add_argument("--methods", default="all", help=f"of {', '.join(cases())}")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--base", default="toybox", help=f"toybox, a folder, a hub id, or {STAND_IN}")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)  # LyCORIS tells the shape of every layer
    names = list(cases()) if args.methods == "all" else args.methods.split(",")
    missing = TABLE.keys() - {case.kind for case in cases().values()}
    if missing or set(names) - cases().keys():
        parser.error(f"no case for {', '.join(sorted(missing) or sorted(set(names) - cases().keys()))}")
    try:
        base = get_base(args.base, "cpu")
    except VgmError as error:
        parser.error(str(error))
    threads = f"{torch.get_num_threads()} thread(s), torch {torch.__version__}"
    print(f"base {args.base}, batch {args.batch}, {args.rounds} rounds, {threads}\n\n{HEAD}", flush=True)
    results: list[Result] = []
    for result in each_result(names, base, args.batch, args.rounds):
        results.append(result)
        print(row(result), flush=True)
    if args.json:
        told = {"base": args.base, "batch": args.batch, "rounds": args.rounds, "machine": threads}
        args.json.write_text(json.dumps({**told, "results": [asdict(r) for r in results]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
