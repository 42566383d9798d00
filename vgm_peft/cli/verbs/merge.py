"""`vgm-delta merge`: several deltas made into one file."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vgm_peft.cli.verbs import Verbs, checkpoint, weighted
from vgm_peft.cli.verbs.output import asked_for
from vgm_peft.errors import ConfigError

if TYPE_CHECKING:
    from vgm_peft.delta import Delta


def add_verb(verbs: Verbs) -> None:
    """Declare the flags."""
    about = (
        "Make several deltas into one: their weighted sum exactly (concat), at a rank (svd), thinned out (ties, dare), "
        "or what answers their prompts as each alone does (fusion)."
    )
    verb = verbs.add_parser("merge", help="make several deltas into one", description=about)
    verb.add_argument("files", metavar="FILE[:WEIGHT]", nargs="+", help="deltas of one family, of any tools")
    verb.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="the file to write")
    verb.add_argument("--method", metavar="M", default="concat", help="concat (the default), svd, ties, dare or fusion")
    verb.add_argument("--rank", metavar="R", type=int, help="the rank of the result: for all but concat")
    verb.add_argument("--density", metavar="SHARE", type=float, default=0.2, help="share of values ties and dare keep (0.2)")
    verb.add_argument("--seed", metavar="N", type=int, default=0, help="of what dare drops, of what fusion draws (0)")
    verb.add_argument("--prompts", metavar="TEXT", nargs="+", help="fusion: a prompt for every delta that calls its subject")
    verb.add_argument("--steps", metavar="N", type=int, default=8, help="fusion: denoising steps to listen to (8)")
    verb.add_argument("--ridge", metavar="SHARE", type=float, default=1e-3, help="fusion: how much to keep to the base (0.001)")
    verb.add_argument("--for", dest="target", metavar="TOOL", help="the tool to write for (the spelling of the first)")
    verb.add_argument("--base", metavar="B", help="the base: for fusion, and for changes that depend on its weights")
    verb.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Merge and write."""
    uses = [weighted(text) for text in args.files]
    output = asked_for(args, [file for file, _ in uses])
    delta = _fused(args, uses) if args.method == "fusion" else _merged(args, uses)
    size = output.write(delta)
    told = " + ".join(f"{weight:g} x {file.name}" for file, weight in uses)
    print(f"{output.path}: {told}, {args.method}, {len(delta.patches)} layers, {size}, read back")
    return 0


def _merged(args: argparse.Namespace, uses: Sequence[tuple[Path, float]]) -> "Delta":
    from vgm_peft.formats import read
    from vgm_peft.tools.merge import Options, merge

    if args.prompts:
        raise ConfigError(f"--method {args.method} draws nothing", fix="leave --prompts out, or use --method fusion")
    options = Options(args.method, args.rank, args.density, args.seed)
    return merge([(read(file), weight) for file, weight in uses], options, checkpoint(args.base))


def _fused(args: argparse.Namespace, uses: Sequence[tuple[Path, float]]) -> "Delta":
    """Draw with the base, and say how far the result is from what each delta answers alone."""
    from vgm_peft.families import load
    from vgm_peft.formats import read
    from vgm_peft.stack.loading import best_device
    from vgm_peft.tools.fusion import Concept, Options, fuse

    prompts: list[str] = args.prompts or []
    if args.base is None or len(prompts) != len(uses):
        raise ConfigError(
            f"--method fusion of {len(uses)} deltas with {len(prompts)} prompts and {'no' if args.base is None else 'a'} base",
            expected="--base, and after --prompts a prompt for every delta, in their order",
        )
    options = Options(rank=args.rank, steps=args.steps, seed=args.seed, ridge=args.ridge)
    device, dtype = best_device()
    base = load(args.base, dtype=dtype, device="cpu" if device == "mps" else device, digest=False)  # mps has no float64
    concepts = [Concept(read(file, base), weight, (prompt,)) for (file, weight), prompt in zip(uses, prompts, strict=True)]
    delta, missed = fuse(concepts, base, options)
    shares = [sum(getattr(one, way) for one in missed.values()) / max(len(missed), 1) for way in ("fused", "added")]
    told = f"{shares[0]:.1%} (added up: {shares[1]:.1%})"
    print(f"  missed of what each answers to its prompt, mean of {len(missed)} layers: {told}")
    return delta
