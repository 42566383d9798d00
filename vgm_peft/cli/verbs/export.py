"""`vgm-delta export`: a delta for another tool, as exactly as that tool can have it, and what was done to it on the way."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vgm_peft.cli.verbs import Verbs, bytes_in_words, table
from vgm_peft.errors import ConfigError

if TYPE_CHECKING:
    from vgm_peft.formats.export import Exported, Wishes
    from vgm_peft.formats.plan import Plan

TARGETS = ("native", "comfyui", "a1111", "forge", "invokeai", "kohya", "diffusers", "peft", "lycoris", "embedding")
DTYPES = ("float32", "float16", "bfloat16")
RANK, LAST, WORST = 32, "LAST", 8


def add_verb(verbs: Verbs) -> None:
    """Declare the flags."""
    about = "Write a delta for another tool: exactly, or not at all unless --approximate allows a loss, which is then told."
    verb = verbs.add_parser("export", help="write a delta for another tool", description=about)
    verb.add_argument("file", metavar="FILE", type=Path, help="a delta of any tool, or the folder of a run")
    verb.add_argument("--for", dest="target", metavar="TOOL", required=True, help="one of " + ", ".join(TARGETS))
    verb.add_argument(
        "-o", "--output", metavar="OUT", type=Path, help="what to write (FILE-TOOL.safetensors; a folder for peft)"
    )
    verb.add_argument("--base", metavar="B", help="the base, for methods whose change depends on its weights")
    verb.add_argument("--dtype", metavar="D", help=f"round the values: {', '.join(DTYPES)} (as they were trained)")
    help = f"write LoRAs of this rank ({RANK}) where the tool has no other place; the error of each layer is printed"
    verb.add_argument("--approximate", metavar="RANK", type=int, nargs="?", const=RANK, help=help)
    help = "say it in the file, such as modelspec.author=me or modelspec.date=2026-01-01; repeatable"
    verb.add_argument("--meta", metavar="KEY=VALUE", action="append", default=[], help=help)
    help = "put a small picture into the file, which UIs show (the run's last preview)"
    verb.add_argument("--thumbnail", metavar="PICTURE", nargs="?", const=LAST, help=help)
    verb.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read, export, and say what became of it."""
    from vgm_peft import formats
    from vgm_peft.formats.export import export
    from vgm_peft.formats.targets import target_named

    target, wishes, output = target_named(args.target), _wishes(args), _output(args)
    base = None
    if args.base is not None:
        from vgm_peft.families import load

        base = load(args.base, digest=False)
    made = export(formats.read(args.file, base), output, target.name, base, wishes)
    for path in made.files:
        print(f"{path}: for {target.about}, {bytes_in_words(path.stat().st_size)}, read back and compared")
    print(told(made), end="")
    return 0


def _wishes(args: argparse.Namespace) -> "Wishes":
    import torch

    from vgm_peft.formats.export import Wishes, thumbnail

    if args.dtype is not None and args.dtype not in DTYPES:
        raise ConfigError(f"--dtype {args.dtype}", expected="one of " + ", ".join(DTYPES))
    said: dict[str, str] = {}
    for text in args.meta:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--meta {text}", expected="KEY=VALUE, such as modelspec.author=me")
        said[key] = value
    if args.thumbnail is not None:
        said["modelspec.thumbnail"] = thumbnail(_last_preview(args.file) if args.thumbnail == LAST else args.thumbnail)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    return Wishes(dtype=dtype, approximate=args.approximate, metadata=said)


def _last_preview(file: Path) -> Path:
    """The first picture that the run of a file drew when it drew last: the first prompt is that of what it learned."""
    folder = (file if file.is_dir() else file.parent) / "samples"
    pictures = sorted(folder.glob("*-0.png"))
    if not pictures:
        raise ConfigError(f"--thumbnail: no preview in {folder}", fix="name the picture")
    return pictures[-1]


def _output(args: argparse.Namespace) -> Path:
    """Where to write: what `--output` names, or beside the file. Raises `ConfigError` when it is none that other tools find."""
    from vgm_peft.formats.export import file_name

    file: Path = args.file
    usual = file_name(args.target, file.stem)
    output: Path = args.output or file.with_name(usual)
    if usual.endswith(".safetensors") and output.suffix != ".safetensors":
        raise ConfigError(f"--output {output}", expected="a name that ends in .safetensors, by which other tools find it")
    if output.resolve() == file.resolve():
        raise ConfigError(f"--output {output} is the file that is read", fix="choose another name")
    return output


def told(made: "Exported") -> str:
    """What became of the layers, the errors of what is only near, what to know of the tool; nothing if all went as it is."""
    plan = made.plan
    ways = Counter(plan.ways.values())
    lines = [] if set(ways) <= {"as it is"} else [", ".join(f"{count} layers {way}" for way, count in ways.items())]
    if plan.losses:
        lines += [f"approximated: {plan.loss:.2%} of the change is lost in all (Frobenius norm)", _losses(plan)]
    lines += [f"note: {remark}" for remark in plan.remarks]
    return "".join(f"  {line}\n" for line in lines)


def _losses(plan: "Plan") -> str:
    worst = sorted(plan.losses.items(), key=lambda item: -item[1].share)
    rows: list[Sequence[str]] = [(name, str(loss.rank), f"{loss.share:.2%}") for name, loss in worst[:WORST]]
    more = [] if len(worst) <= WORST else [(f"and {len(worst) - WORST} layers that lose less", "", "")]
    return table(("layer", "rank", "lost"), [*rows, *more], "    ").lstrip()
