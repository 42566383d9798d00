"""`vgm-delta resize`: make low-rank changes smaller, and say what each layer loses."""

import argparse
from pathlib import Path
from statistics import fmean

from vgm_peft.cli.verbs import Verbs, checkpoint, table
from vgm_peft.cli.verbs.output import asked_for


def add_verb(verbs: Verbs) -> None:
    """Declare the flags."""
    about = "Make a delta smaller: to a rank, or to the rank that keeps a share of every layer's spectrum."
    verb = verbs.add_parser("resize", help="make a delta smaller", description=about)
    verb.add_argument("file", metavar="FILE", type=Path, help="a delta of any tool")
    verb.add_argument("--rank", metavar="R", type=int, help="the rank of every layer")
    verb.add_argument("--keep", metavar="SHARE", type=float, help="or the share of each spectrum to keep, 0.95")
    verb.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="the file to write")
    verb.add_argument("--for", dest="target", metavar="TOOL", help="the tool to write for (the spelling of FILE)")
    verb.add_argument("--base", metavar="B", help="the base, for methods whose change depends on its weights")
    verb.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Resize, write, and print the error of every layer."""
    from vgm_peft.formats import read
    from vgm_peft.tools.resize import Target, resize

    output, target = asked_for(args, [args.file]), Target(args.rank, args.keep)
    delta, steps = resize(read(args.file), target, checkpoint(args.base))
    size = output.write(delta)
    rows = [
        (n, "full" if s.before is None else str(s.before), str(s.after), f"{100 * s.error:.2f} %") for n, s in steps.items()
    ]
    print(table(("layer", "rank", "now", "lost"), rows))
    lost = [step.error for step in steps.values()]
    print(f"{output.path}: {size}; of |dW|, {100 * fmean(lost):.2f} % is lost on average", end="")
    print(f", {100 * max(lost):.2f} % at most; read back and compared")
    return 0
