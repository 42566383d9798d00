"""`vgm-delta merge`: several deltas made into one file."""

import argparse
from pathlib import Path

from vgm_peft.cli.verbs import Verbs, checkpoint, weighted
from vgm_peft.cli.verbs.output import asked_for


def add_verb(verbs: Verbs) -> None:
    """Declare the flags."""
    about = "Make several deltas into one: their weighted sum exactly (concat), at a rank (svd), or thinned out (ties, dare)."
    verb = verbs.add_parser("merge", help="make several deltas into one", description=about)
    verb.add_argument("files", metavar="FILE[:WEIGHT]", nargs="+", help="deltas of one family, of any tools")
    verb.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="the file to write")
    verb.add_argument("--method", metavar="M", default="concat", help="concat (the default), svd, ties or dare")
    verb.add_argument("--rank", metavar="R", type=int, help="the rank of the result: for svd, ties and dare")
    verb.add_argument("--density", metavar="SHARE", type=float, default=0.2, help="share of values ties and dare keep (0.2)")
    verb.add_argument("--seed", metavar="N", type=int, default=0, help="of what dare drops (0)")
    verb.add_argument("--for", dest="target", metavar="TOOL", help="the tool to write for (the spelling of the first)")
    verb.add_argument("--base", metavar="B", help="the base, for methods whose change depends on its weights")
    verb.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Merge and write."""
    from vgm_peft.formats import read
    from vgm_peft.tools.merge import Options, merge

    uses = [weighted(text) for text in args.files]
    output = asked_for(args, [file for file, _ in uses])
    options = Options(args.method, args.rank, args.density, args.seed)
    delta = merge([(read(file), weight) for file, weight in uses], options, checkpoint(args.base))
    size = output.write(delta)
    told = " + ".join(f"{weight:g} x {file.name}" for file, weight in uses)
    print(f"{output.path}: {told}, {args.method}, {len(delta.patches)} layers, {size}, read back")
    return 0
