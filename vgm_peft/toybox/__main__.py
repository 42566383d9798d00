"""`python -m vgm_peft.toybox`: render pictures, train the oracles and the base, evaluate a base, a delta or a side network."""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from vgm_peft.errors import VgmError
from vgm_peft.toybox.nouns import STYLES
from vgm_peft.toybox.world import SUBJECTS, caption, draw_scene


def _render(args: argparse.Namespace) -> int:
    if args.dataset:
        from vgm_peft.toybox.render import render_dataset

        render_dataset(args.output, args.count, args.seed, args.processes)
        return 0
    from vgm_peft.toybox.gallery import write_pictures, write_style, write_subject

    if args.subject:
        write_subject(args.output, args.subject, args.count, args.seed)
    elif args.style:
        write_style(args.output, args.style, args.count, args.seed)
    else:
        rng = random.Random(args.seed)
        scenes = [draw_scene(rng) for _ in range(args.count)]
        write_pictures(args.output, scenes, [caption(scene) for scene in scenes], args.size)
    print(f"{args.count} pictures with captions in {args.output}")
    return 0


def _pairs(args: argparse.Namespace) -> int:
    from vgm_peft.toybox.pairs import write_pairs

    folder = write_pairs(args.output, args.kind, args.count, args.seed, args.size)
    print(f"{args.count} pictures with captions and control pictures ({args.kind}) in {folder}")
    return 0


def _train_oracles(args: argparse.Namespace) -> int:
    import torch

    from vgm_peft.toybox.oracle_train import OracleSettings, train_oracles

    torch.set_num_threads(args.threads)
    train_oracles(args.output, OracleSettings(seed=args.seed))
    print((args.output / "card.json").read_text().rstrip())
    return 0


def _train_eye(args: argparse.Namespace) -> int:
    import torch

    from vgm_peft.toybox.eye_train import CARD, EyeSettings, train_eye

    torch.set_num_threads(args.threads)
    train_eye(args.output, EyeSettings(seed=args.seed, steps=args.steps, pictures=args.pictures))
    print((args.output / CARD).read_text().rstrip())
    return 0


def _train_base(args: argparse.Namespace) -> int:
    from vgm_peft.toybox.base_cli import run

    return run(args)


def _evaluate(args: argparse.Namespace) -> int:
    from vgm_peft.toybox.evaluate_cli import run

    run(args)
    return 0


def _evaluate_side(args: argparse.Namespace) -> int:
    from vgm_peft.toybox.evaluate_side_cli import run

    run(args)
    return 0


def _add_render(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the pictures")
    parser.add_argument("--count", type=int, default=16, help="pictures (default 16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=64, help="pixels a side of random scenes (default 64)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--subject", metavar="NAME", help="a held-out subject: " + ", ".join(s.name for s in SUBJECTS))
    what.add_argument("--style", metavar="NAME", help="a held-out style: " + ", ".join(STYLES))
    what.add_argument("--dataset", action="store_true", help="one array with captions and labels instead of PNGs")
    parser.add_argument("--processes", type=int, default=2, help="for --dataset (default 2)")


def _add_pairs(parser: argparse.ArgumentParser) -> None:
    kinds = "what steers: depth, normals, mask, edges; depth,mask: side by side"
    parser.add_argument("--kind", required=True, metavar="KIND", help=kinds)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the pictures")
    parser.add_argument("--count", type=int, default=1000, help="pairs (default 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=64, help="pixels a side (default 64)")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--delta", metavar="FILE", help="a trained delta to put on the base")
    parser.add_argument("--scale", type=float, default=1.0, help="its strength (default 1)")
    parser.add_argument("--subject", metavar="NAME", help="also measure identity with this held-out subject")
    parser.add_argument("--token", default="sks", help="the word that stands for the subject (default sks)")
    parser.add_argument("--alone", action="store_true", help="it stands there without its class after it, as new words do")
    parser.add_argument("--count", type=int, default=400, help="held-out prompts, 0 for none (default 400)")
    parser.add_argument("--subject-count", type=int, default=24, help="pictures of the subject (default 24)")
    _add_drawing(parser)


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", default="toybox", metavar="FOLDER", help="diffusers folder, or toybox (the default)")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, help="default: what suits toybox")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def _add_evaluate_side(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("network", type=Path, metavar="NETWORK", help="folder or file of a trained side network")
    parser.add_argument("--kind", required=True, choices=("depth", "mask", "edges", "image"), help="what steers it")
    parser.add_argument("--unplaced", action="store_true", help="prompts that leave out where the toy is and how large")
    parser.add_argument("--strength", type=float, default=1.0, help="of the network (default 1)")
    parser.add_argument("--count", type=int, default=100, help="held-out scenes (default 100)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, metavar="DIR", help="also write grid.png and scores.json there")
    _add_drawing(parser)


def _parser(command: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vgm_peft.toybox", description=(__doc__ or "").split(": ", 1)[1])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_render(commands.add_parser("render", help="pictures of random scenes, subjects or styles, with captions"))
    _add_pairs(commands.add_parser("pairs", help="random scenes with captions and exact control pictures, to learn from"))
    oracles = commands.add_parser("train-oracles", help="train and measure the oracles (minutes on one CPU thread)")
    oracles.add_argument("--output", type=Path, default=Path("assets/oracles"), metavar="DIR")
    oracles.add_argument("--seed", type=int, default=0)
    oracles.add_argument("--threads", type=int, default=1, help="CPU threads; the result depends on them (default 1)")
    eye = commands.add_parser("train-image-encoder", help="train what IP-Adapters of the base see with (minutes on a thread)")
    eye.add_argument("--output", type=Path, default=Path("assets/toybox/image_encoder"), metavar="DIR")
    eye.add_argument("--seed", type=int, default=0)
    eye.add_argument("--steps", type=int, default=900, help="batches (default 900)")
    eye.add_argument("--pictures", type=int, default=5000, help="renders to learn from (default 5000)")
    eye.add_argument("--threads", type=int, default=1, help="CPU threads; the result depends on them (default 1)")
    base = commands.add_parser("train-base", help="train the embedded base from nothing (resumes)")
    if command == "train-base":  # its flags live with it
        from vgm_peft.toybox.base_cli import add_flags

        add_flags(base)
    _add_evaluate(commands.add_parser("evaluate", help="measure a base, and a delta on it"))
    _add_evaluate_side(commands.add_parser("evaluate-side", help="measure how well a side network is followed"))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    # Before torch: threads that wait by spinning cost a factor of a hundred as soon as another process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = _parser(given[0] if given else None).parse_args(given)
    run = {
        "render": _render,
        "pairs": _pairs,
        "train-oracles": _train_oracles,
        "train-image-encoder": _train_eye,
        "train-base": _train_base,
        "evaluate": _evaluate,
        "evaluate-side": _evaluate_side,
    }
    try:
        return run[args.command](args)
    except VgmError as error:
        print(f"toybox: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
