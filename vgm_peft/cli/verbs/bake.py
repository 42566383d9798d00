"""`vgm-delta bake`: deltas put into a base's own weights, for tools that load only bases."""

import argparse
from pathlib import Path

from vgm_peft.cli.verbs import Verbs, weighted


def add_verb(verbs: Verbs) -> None:
    """Declare the flags."""
    about = "Write a base with deltas in its own weights, tensor by tensor: a folder of a folder, a file of a file."
    verb = verbs.add_parser("bake", help="put deltas into a base for good", description=about)
    verb.add_argument("files", metavar="FILE[:STRENGTH]", nargs="+", help="deltas of the base's family, of any tools")
    verb.add_argument("--base", metavar="B", required=True, help="toybox, a diffusers folder or a .safetensors checkpoint")
    verb.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="the new folder or file")
    verb.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Bake, and say what was left out."""
    from vgm_peft.formats import read
    from vgm_peft.tools.bake import bake
    from vgm_peft.tools.checkpoint import Checkpoint

    uses = [(read(file), strength) for file, strength in map(weighted, args.files)]
    done = bake(uses, Checkpoint(args.base), args.output)
    print(f"{done.path}: {args.base} with {', '.join(args.files)}; {done.changed} stored tensors changed, the others copied")
    for name in done.left_out:
        print(f"  left out: {name} (pickled weights, which would be the old ones)")
    words = [token for delta, _ in uses for token in delta.words]
    if words:
        print(f"  not in it: {', '.join(map(ascii, words))}, trained words; vgm-delta export --for embedding writes them")
    return 0
