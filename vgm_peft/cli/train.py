"""Teach a base model something from pictures; the run's folder then holds the delta and all that remakes it.

vgm-train dreambooth --images me --class-prompt "a robot"     a subject, from about five pictures
vgm-train finetune --images pictures                          captioned pictures (.txt beside them, or metadata.jsonl)
vgm-train textual-inversion --images me --token "<toy>"       a new word (--init-word toy --vectors 2)
vgm-train dreambooth --images me --class-prompt "a robot" --token "<me>" --vectors 2   a new word and the weights (pivotal)
vgm-train controlnet --data pairs                             pictures with control pictures (folder control/)
vgm-train t2i-adapter --data pictures --annotator canny       pictures whose control pictures are computed
vgm-train --recipe two.toml                                   several subjects at once, a [[concept]] each (docs/data.md)
vgm-train --recipe runs/dreambooth-me-1/run.toml              the same run again
vgm-train --resume runs/dreambooth-me-1                       an interrupted run, to its end
"""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, cast

from vgm_peft.config import Table, merge, parse_setting

if TYPE_CHECKING:
    from vgm_peft.cli import Parser
    from vgm_peft.train import RunConfig, RunResult

SIDES = (
    "controlnet",
    "control-lora",
    "controlnet-xs",
    "uni-controlnet",
    "t2i-adapter",
    "controlnext",
    "ip-adapter",
    "uni-controlnet-global",
)
TASKS = ("dreambooth", "finetune", "textual-inversion", *SIDES)


def add_flags(parser: "Parser") -> None:
    """Declare what people change between two runs; `--set` reaches everything else."""
    parser.add_argument("task", nargs="?", metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--images", "--data", metavar="DIR", help="the folder of pictures")
    parser.add_argument("--base", help="toybox (the default), a diffusers folder, a .safetensors checkpoint, or a hub id")
    parser.add_argument("--delta", metavar="NAME", help="what kind of change is trained: lora (the default), krona")
    parser.add_argument("--steps", type=int, metavar="N", help="optimiser steps")
    parser.add_argument("--seed", type=int, metavar="S", help="everything random comes from it (default: 0)")
    parser.add_argument("--output", metavar="DIR", help="the run's folder (default: runs/TASK-PICTURES-N)")
    parser.add_argument("--recipe", metavar="FILE", help="a .toml with any of the settings; those shipped are in training/")
    parser.add_argument(
        "--export", metavar="TOOL,..", help="also write it for: comfyui, a1111, forge, invokeai, diffusers, peft ..."
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="KIND,..",
        help="go on in spite of such faults in the pictures: unreadable, tiny, transparent, animated, duplicate, "
        "near-duplicate, caption, orphan, stray, mask, profile",
    )
    parser.add_argument("--resume", metavar="RUN", help="go on with an interrupted run")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="any other setting; repeatable")
    thing = parser.add_argument_group("a subject, or a new word")
    thing.add_argument("--class-prompt", metavar="TEXT", help='what kind of thing the subject is: "a robot"')
    thing.add_argument("--token", metavar="WORD", help="the word that comes to mean it (default: sks)")
    thing.add_argument("--vectors", type=int, metavar="N", help="embedding rows of a new word; with dreambooth: pivotal tuning")
    thing.add_argument("--init-word", metavar="TEXT", help="what a new word begins as: what the thing roughly is")
    beside = parser.add_argument_group("a network beside the base")
    beside.add_argument("--network", metavar="NAME", help="which one, where the task knows several: full, light, plus ...")
    beside.add_argument("--annotator", metavar="NAME", help="compute the control pictures: canny, depth ... (docs/data.md)")


def run(args: argparse.Namespace) -> int:
    """Train, and say where everything is and what to type next."""
    flags = merge(_table(args), *(parse_setting(text) for text in cast("list[str]", args.set)))
    resume = Path(cast(str, args.resume)) if args.resume else None
    recipe = resume / "run.toml" if resume else Path(cast(str, args.recipe)) if args.recipe else None

    from vgm_peft.train.folder import check_run
    from vgm_peft.train.recipes import resolve
    from vgm_peft.train.run import train

    if resume:
        check_run(resume)
    resolved = resolve(flags, recipe)
    if resolved.recipe:
        print(f"recipe: {resolved.recipe}")
    for notice in resolved.notices:
        print(f"note: {notice}")
    result = train(resolved.config, resume=resume)
    if result.main:
        print(_farewell(resolved.config, result))
    return 0 if result.finished else 130


def _table(args: argparse.Namespace) -> Table:
    """The flags that were given, as a configuration."""
    places = {
        "task": "task.name",
        "images": "data.images",
        "base": "base",
        "delta": "delta.kind",
        "class_prompt": "task.class_prompt",
        "token": "task.token",
        "vectors": "task.vectors",
        "init_word": "task.init_word",
        "network": "task.network",
        "annotator": "data.annotator",
        "steps": "steps",
        "seed": "seed",
        "output": "output",
    }
    out: Table = {}
    for flag, place in places.items():
        value = cast("str | int | None", getattr(args, flag))
        if value is not None:
            section, _, key = place.rpartition(".")
            out = merge(out, {section: {key: value}} if section else {key: value})
    if args.allow:
        kinds = ",".join(cast("list[str]", args.allow)).split(",")
        out = merge(out, {"data": {"allow": [kind.strip() for kind in kinds if kind.strip()]}})
    if args.export:
        out["exports"] = [name.strip() for name in cast(str, args.export).split(",") if name.strip()]
    return out


def _farewell(config: "RunConfig", result: "RunResult") -> str:
    folder = result.folder
    if result.delta is None:
        again = shlex.join(["vgm-train", "--resume", str(folder)])
        return f"stopped after step {result.steps} of {config.steps}; a checkpoint is saved. Go on with\n  {again}"
    lines = [f"trained   {result.delta}", f"weights   {result.weights}"]
    exports = sorted((folder / "exports").glob("*"))
    lines += [f"exported  {path}" for path in exports]
    lines += [f"previews  {folder / 'samples'}"] if result.samples else []
    lines += [f"record    {folder / 'report.html'}, run.toml, manifest.json, metrics.jsonl"]
    prompt = result.prompts[0] if result.prompts else "..."
    use = [word.replace("{}", str(result.delta)) for word in config.task_class().used_by.split(" ")]
    command = ["vgm-generate", "--base", config.base, *use, "--prompt", prompt, "--output", "picture.png"]
    return "\n".join([*lines, "", "next:", f"  {shlex.join(command)}"])
