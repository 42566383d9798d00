"""`vgm-delta diff`: how far two deltas are apart, layer by layer."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from vgm_peft.cli.verbs import Verbs, checkpoint, table


def add_verb(verbs: Verbs) -> None:
    """Declare the flags."""
    about = "Compare two deltas layer by layer: relative distance and cosine of their changes."
    verb = verbs.add_parser("diff", help="compare two deltas", description=about)
    verb.add_argument("files", metavar="FILE", type=Path, nargs=2, help="two deltas of one family, of any tools")
    verb.add_argument("-o", "--output", metavar="PNG", type=Path, help="draw the distances")
    verb.add_argument("--base", metavar="B", help="the base, for methods whose change depends on its weights")
    verb.add_argument("--json", action="store_true", help="print it as JSON")
    verb.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare and print."""
    from vgm_peft.formats import read
    from vgm_peft.tools.compare import compare, overall

    one, other = map(read, args.files)
    apart = compare(one, other, checkpoint(args.base))
    if args.json:
        print(json.dumps({"overall": asdict(overall(apart)), "layers": {n: asdict(a) for n, a in apart.items()}}, indent=2))
    else:
        rows = [("all layers together", overall(apart)), *apart.items()]
        cells = [(n, f"{a.distance:.4f}", f"{a.cosine:+.4f}", f"{a.ours:.4g}", f"{a.theirs:.4g}") for n, a in rows]
        print(table(("layer", "distance", "cosine", "|A|", "|B|"), cells))
        words = sorted({*one.words} ^ {*other.words})
        if words:
            print(f"  words in one of them alone: {', '.join(map(ascii, words))}")
    if args.output is not None:
        from vgm_peft.tools.chart import save

        title = f"{args.files[0].name} and {args.files[1].name}: relative distance"
        save({name: a.distance for name, a in apart.items()}, title, "|A - B| / max(|A|, |B|)", args.output)
    return 0
