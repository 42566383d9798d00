"""`python -m vgm_peft.toybox train-base`: train the embedded base from nothing, or go on with it."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vgm_peft.errors import ConfigError, nearest
from vgm_peft.toybox.nouns import CLASSES

if TYPE_CHECKING:
    from vgm_peft.toybox.base import BaseSettings

STAGES = ("render", "vae", "sharpen", "text", "latents", "unet", "decoder", "write")
USUAL = tuple(stage for stage in STAGES if stage != "sharpen")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--output", type=Path, default=Path("assets/toybox"), metavar="DIR", help="pipeline folder")
    parser.add_argument("--work", type=Path, default=Path(".work/toybox-base"), metavar="DIR", help="renders and states")
    parser.add_argument("--minutes", type=float, default=150.0, help="training time of all stages (default 150)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, and render processes (default: all)")
    parser.add_argument("--chunks", type=int, default=20, help="thousands of renders, by two (default 20: 40,000)")
    parser.add_argument("--widths", default="32,64,128,128", help="of the U-Net's four levels, multiples of 8")
    parser.add_argument("--vae-layers", type=int, default=1, help="blocks a level of the VAE (default 1)")
    parser.add_argument("--favour", default="", metavar="CLASS=N,..", help="draw these classes N times as often")
    parser.add_argument("--rates", type=float, default=1.0, help="of the U-Net, times this: 0.3 to train a base on")
    parser.add_argument("--batch", type=int, default=32, help="of the U-Net; twice as many while it is coarse")
    parser.add_argument(
        "--stages", default=",".join(USUAL), help="which to run (default: %(default)s); sharpen trains the VAE on"
    )
    parser.add_argument("--count", type=int, default=400, help="held-out prompts to measure, 0 for none (default 400)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, metavar="DIR", help="begin with a finished base's parts, not from nothing")
    parser.add_argument("--resume", action="store_true", help="go on with what the work folder holds")


def settings_of(args: argparse.Namespace) -> "BaseSettings":
    """Turn the flags into settings; raises `ConfigError` for a width or number that cannot be."""
    from vgm_peft.toybox.base import BaseSettings
    from vgm_peft.toybox.unet import UnetSettings
    from vgm_peft.toybox.vae import VaeSettings

    parts = str(args.widths).split(",")
    widths = tuple(int(part) for part in parts if part.strip().isdigit())
    if len(widths) != 4 or len(parts) != 4 or any(width % 8 or not width for width in widths):
        raise ConfigError(f"--widths {args.widths}", expected="four multiples of 8", fix="try 32,64,128,128")
    for flag in ("minutes", "chunks", "batch", "rates"):
        if getattr(args, flag) <= 0:
            raise ConfigError(f"--{flag} {getattr(args, flag)}", expected="more than nothing")
    unet = UnetSettings(widths=widths, batch=args.batch, coarse_batch=2 * args.batch, favour=favour_of(args.favour))
    unet = replace(unet, matrix_rate=unet.matrix_rate * args.rates, rate=unet.rate * args.rates)
    if args.start:
        unet = replace(unet, coarse_until=0.0)
    vae = VaeSettings(layers=args.vae_layers)
    settings = BaseSettings(output=args.output, work=args.work, minutes=args.minutes, device=args.device, unet=unet, vae=vae)
    return replace(settings, chunks=args.chunks, seed=args.seed, processes=args.threads or settings.processes)


def favour_of(text: str) -> dict[str, float]:
    """Read "duck=3,robot=2"; raises `ConfigError` for an unknown class or what is not a number above 0."""
    found: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        kind, _, times = part.partition("=")
        try:
            found[kind] = float(times)
        except ValueError:
            found[kind] = 0.0
        if kind not in CLASSES or not found[kind] > 0:
            raise ConfigError(f"--favour {part}", expected="CLASS=N of " + ", ".join(CLASSES), fix=nearest(kind, CLASSES))
    return found


def stages_of(args: argparse.Namespace) -> list[str]:
    """The stages asked for, in order; raises `ConfigError` for an unknown one."""
    asked = [part.strip() for part in str(args.stages).split(",")]
    unknown = [name for name in asked if name not in STAGES]
    if unknown:
        raise ConfigError(f"--stages {unknown[0]}", expected="some of " + ", ".join(STAGES))
    return [name for name in STAGES if name in asked]


def run(args: argparse.Namespace) -> int:
    """Train as the flags ask; returns the exit status."""
    import torch

    from vgm_peft.toybox import base
    from vgm_peft.toybox.base_card import write_measured
    from vgm_peft.toybox.state import say

    settings, stages = settings_of(args), stages_of(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda", expected="a GPU that torch can use", fix="leave the flag out")
    if not args.resume and any(settings.work.glob("*.safetensors")):
        fix = "add --resume to go on with them, or give another --work"
        raise ConfigError(f"{settings.work} holds the states of an earlier training", expected="none", fix=fix)
    if args.threads:
        torch.set_num_threads(args.threads)
    settings.work.mkdir(parents=True, exist_ok=True)
    if args.start and not args.resume:
        base.begin_from(settings, args.start)
    steps = {
        "render": base.render_stage,
        "vae": base.vae_stage,
        "sharpen": base.sharpen_stage,
        "text": base.text_stage,
        "latents": base.latents_stage,
        "unet": base.unet_stage,
        "decoder": base.decoder_stage,
    }
    for stage in stages:
        say(f"stage {stage}")
        if stage == "write":
            write_measured(settings, args.count)
        else:
            steps[stage](settings)
    return 0
