"""`vgm-delta export`: a delta for another tool, as exactly as that tool can have it, and what was done to it on the way."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vgm_peft.cli.verbs import Verbs, bytes_in_words
from vgm_peft.cli.verbs.output import DTYPES, checked, dtype_named, told
from vgm_peft.errors import ConfigError

if TYPE_CHECKING:
    from vgm_peft.formats.export import Wishes

TARGETS = ("native", "comfyui", "a1111", "forge", "invokeai", "kohya", "diffusers", "peft", "lycoris", "embedding")
RANK, LAST = 32, "LAST"


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
    from vgm_peft.formats.export import export, file_name
    from vgm_peft.formats.targets import target_named

    target, wishes = target_named(args.target), _wishes(args)
    usual = args.file.with_name(file_name(target.name, args.file.stem))
    output = checked(args.output or usual, [args.file], target.name)
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
    from vgm_peft.formats.export import Wishes, thumbnail

    said: dict[str, str] = {}
    for text in args.meta:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--meta {text}", expected="KEY=VALUE, such as modelspec.author=me")
        said[key] = value
    if args.thumbnail is not None:
        said["modelspec.thumbnail"] = thumbnail(_last_preview(args.file) if args.thumbnail == LAST else args.thumbnail)
    return Wishes(dtype=dtype_named(args.dtype), approximate=args.approximate, metadata=said)


def _last_preview(file: Path) -> Path:
    """The first picture that the run of a file drew when it drew last: the first prompt is that of what it learned."""
    folder = (file if file.is_dir() else file.parent) / "samples"
    pictures = sorted(folder.glob("*-0.png"))
    if not pictures:
        raise ConfigError(f"--thumbnail: no preview in {folder}", fix="name the picture")
    return pictures[-1]
