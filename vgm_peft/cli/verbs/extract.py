"""`vgm-delta extract`: a delta out of two checkpoints."""

import argparse
from pathlib import Path
from statistics import fmean

from vgm_peft.cli.verbs import Verbs, table
from vgm_peft.cli.verbs.output import asked_for


def add_verb(verbs: Verbs) -> None:
    """Declare the flags."""
    about = "Make a delta of the difference between two checkpoints, and say what each layer misses."
    verb = verbs.add_parser("extract", help="make a delta out of two checkpoints", description=about)
    verb.add_argument("tuned", metavar="TUNED", help="a diffusers folder or a .safetensors checkpoint")
    verb.add_argument("base", metavar="BASE", help="what it was made of: a folder or a file too, or toybox")
    verb.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="the file to write")
    verb.add_argument("--kind", metavar="K", default="lora", help="lora (the default), lokr, svdiff or diff")
    verb.add_argument("--rank", metavar="R", type=int, help="of a lora (32)")
    verb.add_argument("--keep", metavar="SHARE", type=float, help="or the share of each spectrum that a lora keeps, 0.95")
    verb.add_argument("--factor", metavar="N", type=int, default=8, help="most rows and columns of a lokr's small factor (8)")
    verb.add_argument("--for", dest="target", metavar="TOOL", default="native", help="the tool to write for (native)")
    verb.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Extract, write, and print what is missed."""
    from vgm_peft.tools.checkpoint import Checkpoint
    from vgm_peft.tools.extract import Options, extract
    from vgm_peft.tools.resize import Target

    output = asked_for(args, [])
    rank = 32 if args.rank is None and args.keep is None else args.rank
    options = Options(args.kind, Target(rank, args.keep), args.factor)
    delta, missed = extract(Checkpoint(args.tuned), Checkpoint(args.base), options)
    size = output.write(delta)
    print(table(("layer", "missed"), [(name, f"{100 * error:.2f} %") for name, error in missed.items()]))
    worst, mean = max(missed.values()), fmean(missed.values())
    print(f"{output.path}: {len(missed)} layers, {size}; of the difference, ", end="")
    print(f"{100 * mean:.2f} % is missed on average, {100 * worst:.2f} % at most")
    return 0
