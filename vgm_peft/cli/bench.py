"""Compare what methods learn, on the embedded base: the same subject, every method, several seeds.

vgm-bench methods                                            every method, three seeds: hours on a CPU
vgm-bench methods --methods lora,krona,dora --seeds 1        a quick look
vgm-bench methods --steps 400 --output runs/bench            goes on where it was stopped

One JSON per run is kept, with identity, prompt agreement, drift, trained values and file size; runs that have one are not
made again. In the end the methods are timed side by side, and there are a picture per subject and a table. Ctrl-C stops it
without harm.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

from vgm_peft.config import merge, parse_setting

if TYPE_CHECKING:
    from vgm_peft.cli import Parser


def add_flags(parser: "Parser") -> None:
    """Declare the verbs."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    about = "Train a subject with every method, judge, draw. Settings are those of the shipped recipes."
    methods = verbs.add_parser("methods", help="compare the weight deltas", description=about)
    methods.add_argument("--methods", metavar="NAME,..", default="all", help="which (default: all)")
    methods.add_argument("--subjects", metavar="NAME,..", default="robot", help="Toybox subjects (default: robot)")
    methods.add_argument("--seeds", type=int, metavar="N", default=3, help="runs per method and subject (default: 3)")
    methods.add_argument("--steps", type=int, metavar="N", help="optimiser steps (default: the recipe's, 400)")
    methods.add_argument("--output", type=Path, metavar="DIR", default=Path("runs/bench"), help="(default: runs/bench)")
    methods.add_argument("--pictures", type=int, metavar="N", default=24, help="pictures per measurement (default: 24)")
    methods.add_argument("--picture-steps", type=int, metavar="N", default=25, help="denoising steps of each (default: 25)")
    methods.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="as of vgm-train, for all")


def run(args: argparse.Namespace) -> int:
    """Do what is left, then write the sheets; say where they are."""
    settings = merge(*(parse_setting(text) for text in cast("list[str]", args.set)))
    from vgm_peft.bench.methods import Stopped
    from vgm_peft.bench.methods import run as compare
    from vgm_peft.bench.plan import Plan
    from vgm_peft.bench.sheet import write_sheets
    from vgm_peft.deltas import TABLE

    plan = Plan(
        methods=tuple(TABLE) if args.methods == "all" else _names(args.methods),
        subjects=_names(args.subjects),
        seeds=args.seeds,
        steps=args.steps,
        pictures=args.pictures,
        sampling_steps=args.picture_steps,
        settings=settings,
        output=args.output,
    )
    try:
        records = compare(plan, lambda line: print(line, flush=True))
    except (Stopped, KeyboardInterrupt):
        print("vgm-bench: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    for path in write_sheets(plan, records):
        print(f"wrote {path}")
    return 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
