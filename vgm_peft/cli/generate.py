"""Draw pictures with a base model and any number of deltas and side networks.

  vgm-generate --prompt "a red robot on grass" --delta runs/me/delta.safetensors:0.8 --output me.png
  vgm-generate --stack pipelines/two-subjects.toml --count 4
  vgm-generate --image sketch.png:0.6 --prompt "a toy car"
  vgm-generate --from me.png                       draws a picture again, byte for byte, from what it carries

A stack file (or a PNG made here) is read first; flags change it, and --delta and --control add to it. Every PNG carries
what remakes it. Strengths are factors on what was learned: 1 as trained, 0 nothing.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vgm_peft.cli import Parser
from vgm_peft.config import Table, Value, to_table
from vgm_peft.errors import ConfigError
from vgm_peft.stack.recipe import SCHEDULERS, Stack, parse_size
from vgm_peft.stack.uses import ControlUse

if TYPE_CHECKING:
    from vgm_peft.family import Base
    from vgm_peft.picture import Picture

PLAIN = ("base", "prompt", "negative", "steps", "guidance", "seed", "count", "scheduler")
"""Flags that are keys of the stack as they are."""


def add_flags(parser: Parser) -> None:
    """Declare the flags; those not given leave the stack (or its defaults) as it is."""
    parser.add_argument("--prompt", metavar="TEXT", help="what the picture shows")
    parser.add_argument("--negative", metavar="TEXT", help="what it should not show")
    parser.add_argument(
        "--base", metavar="B", help="toybox, a diffusers folder, a .safetensors file, or a hub id (default: toybox)"
    )
    parser.add_argument("--delta", metavar="FILE[:STRENGTH]", action="append", default=[], help="a trained delta; repeatable")
    parser.add_argument(
        "--control",
        metavar="NETWORK:IMAGE[:STRENGTH[:START-END]]",
        action="append",
        default=[],
        help="a side network and its picture, heard from one share of the steps to another; repeatable",
    )
    parser.add_argument(
        "--image-prompt",
        metavar="FILE:IMAGE[:STRENGTH]",
        action="append",
        default=[],
        help="a network that draws what another picture shows (an IP-Adapter), and that picture; repeatable",
    )
    parser.add_argument(
        "--image",
        metavar="FILE[:CHANGE]",
        help="a picture to begin from, and how much of it is drawn anew, 0 .. 1 (default: 0.75)",
    )
    parser.add_argument("--paint", metavar="MASK", help="draw that picture anew only where this one is white")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: 25)")
    parser.add_argument(
        "--guidance", type=float, metavar="G", help="how strictly the prompt is followed (default: the base's own)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="the first picture's seed, the next has S+1 (default: 0)")
    parser.add_argument("--count", type=int, metavar="N", help="number of pictures (default: 1)")
    parser.add_argument("--size", metavar="WxH", help="pixels, for example 768x512 or 512 (default: the base's own)")
    parser.add_argument("--scheduler", metavar="NAME", help=f"{', '.join(SCHEDULERS)} (default: dpmpp)")
    parser.add_argument("--stack", type=Path, metavar="FILE", help="a stack (.toml), or a PNG made here, to begin from")
    parser.add_argument(
        "--from", dest="origin", type=Path, metavar="PNG", help="a picture made here, to draw exactly that again"
    )
    parser.add_argument(
        "--library",
        type=Path,
        metavar="DIR",
        action="append",
        default=[],
        help="with --from: a folder to look for its files in, besides that of the picture, this one and runs/; repeatable",
    )
    parser.add_argument("--output", metavar="F", help="where to write: a .png, a folder, or a name with {seed} or {index}")


def run(args: argparse.Namespace) -> int:
    """Draw, write, and say what was written."""
    stack = described(args)
    places = Places(args.output, stack)
    from vgm_peft.stack.loading import load_base
    from vgm_peft.stack.runtime import Applied
    from vgm_peft.stack.sampling import draw

    record = stack.pinned()  # before the base: a mistyped file should not cost a minute
    base = load_base(stack)
    with Applied(base, stack) as applied, _Bar(stack) as bar:
        for notice in applied.notices:
            bar.say(f"note: {notice}")
        for picture in draw(applied, record, bar.step):
            path = places.write(picture)
            bar.say(_written(picture, path, base))
            if args.origin is not None:
                bar.say(_compared(path, args.origin))
    return 0


def described(args: argparse.Namespace) -> Stack:
    """Sum up the stack file and the flags. Raises `ConfigError` for whatever does not parse."""
    if args.origin is not None:
        return _remade(args)
    if args.library:
        raise ConfigError("--library without --from", fix="name the picture to draw again")
    stack = _begin(args.stack) if args.stack is not None else Stack()
    table: Table = {key: getattr(args, key) for key in PLAIN if getattr(args, key) is not None}
    if "base" in table:
        table["base_digest"] = ""
    if args.image is not None:
        file, change = parse_numbered(args.image, "--image", "change")
        table |= {"image": _placed(file, args), "image_digest": ""} | ({} if change is None else {"change": change})
    if args.paint is not None:
        table |= {"paint": _placed(args.paint, args), "paint_digest": ""}
    if args.size is not None:
        table["width"], table["height"] = parse_size(args.size)
    deltas: list[Value] = [dict(d) for d in _uses(stack, "deltas")]
    for text in args.delta:
        file, strength = parse_numbered(text, "--delta", "strength")
        deltas.append({"file": _placed(file, args), "strength": 1.0 if strength is None else strength})
    controls: list[Value] = [dict(c) for c in _uses(stack, "controls")]
    for flag, texts in (("--control", args.control), ("--image-prompt", args.image_prompt)):
        for use in (parse_control(text, flag) for text in texts):
            places = {"network": str(Path(use.network).absolute()), "image": str(Path(use.image).absolute())}
            controls.append({**to_table(use), **places})
    return stack.changed({**table, "deltas": deltas, "controls": controls})


def _remade(args: argparse.Namespace) -> Stack:
    """The stack of a picture, with which nothing is mixed: it would be another picture."""
    names = ("prompt", "negative", "delta", "control", "image_prompt", "image", "paint", "steps", "guidance", "seed", "count")
    mixed = [name for name in (*names, "size", "scheduler", "stack") if getattr(args, name) not in (None, [])]
    if mixed:
        raise ConfigError(
            f"--from with --{mixed[0].replace('_', '-')}",
            expected="at most --base, --library and --output, which say where things are",
            fix=f"begin from the picture with --stack {args.origin} to change something",
        )
    from vgm_peft.stack.library import remake

    return remake(args.origin, args.library, args.base or "")


def _compared(path: Path, origin: Path) -> str:
    """Say whether a picture drawn again is the one it was drawn from."""
    from PIL import Image, ImageChops

    if path.read_bytes() == origin.read_bytes():
        return f"{path} is {origin}, byte for byte"
    with Image.open(path) as new, Image.open(origin) as old:
        same = new.size == old.size and ImageChops.difference(new.convert("RGB"), old.convert("RGB")).getbbox() is None
    if same:
        return f"{path} shows what {origin} does, pixel for pixel; its files or programs go by other names or versions now"
    return f"note: {path} is not quite {origin}: another machine, another version of torch or diffusers draws otherwise"


def _begin(path: Path) -> Stack:
    if path.suffix.lower() != ".png":
        return Stack.read(path)
    from vgm_peft.picture import read_stack
    from vgm_peft.stack.library import locate

    return locate(read_stack(path), [path.absolute().parent, Path.cwd()])


def _uses(stack: Stack, key: str) -> list[Table]:
    uses = stack.table().get(key, [])
    return [use for use in uses if isinstance(use, dict)] if isinstance(uses, list) else []


def _placed(file: str, args: argparse.Namespace) -> str:
    """A file given by a flag begins where the command is, also beside a stack whose files begin where it lies."""
    return str(Path(file).absolute()) if args.stack else file


def parse_numbered(text: str, flag: str, number: str) -> tuple[str, float | None]:
    """Split `FILE[:NUMBER]`; a drive letter's colon is part of the file. Raises `ConfigError`."""
    file, colon, value = text.rpartition(":")
    if colon and len(file) > 1:
        try:
            return file, float(value)
        except ValueError:
            if Path(file).exists() and not Path(text).exists():
                raise ConfigError(f'{flag} {text}: the {number} "{value}"', expected=f"a number, as in {file}:0.8") from None
    if not text:
        raise ConfigError(f"{flag} is empty", expected=f"FILE or FILE:{number.upper()}")
    return text, None


def parse_control(text: str, flag: str = "--control") -> ControlUse:
    """Split `NETWORK:IMAGE[:STRENGTH[:START-END]]`; the colon of a drive letter (`C:\\` or `C:/`) does not split.

    Raises `ConfigError`.
    """
    fields = re.findall(r"(?:[A-Za-z]:(?=[\\/]))?[^:]+", text)
    span = fields[3].split("-") if len(fields) == 4 else ["0", "1"]
    if 2 <= len(fields) <= 4 and len(span) == 2:
        try:
            strength, start, end = (float(number) for number in (fields[2] if len(fields) > 2 else "1", *span))
        except ValueError:
            pass
        else:
            return ControlUse(network=fields[0], image=fields[1], strength=strength, start=start, end=end)
    raise ConfigError(f'{flag} "{text}"', expected="NETWORK:IMAGE, NETWORK:IMAGE:STRENGTH or NETWORK:IMAGE:STRENGTH:START-END")


class Places:
    """Where the pictures of one command go."""

    def __init__(self, output: str | None, stack: Stack) -> None:
        """Check the pattern. Without one, pictures go to `pictures/` and never over an older one."""
        slug = re.sub(r"[^a-z0-9]+", "-", stack.prompt.lower()).strip("-")[:40].rstrip("-") or "picture"
        self._fresh = output is None
        pattern = output or "pictures/"
        if pattern.endswith(("/", os.sep)) or Path(pattern).is_dir():
            pattern = str(Path(pattern) / f"{slug}-{{seed}}.png")
        elif Path(pattern).suffix.lower() != ".png":
            raise ConfigError(f'--output "{output}"', expected="a name that ends in .png, or a folder")
        if stack.count > 1 and "{seed}" not in pattern and "{index}" not in pattern:
            pattern = f"{pattern[:-4]}-{{index}}.png"
        self._pattern, self._index = pattern, 0

    def write(self, picture: "Picture") -> Path:
        """Write the next picture and return its place."""
        self._index += 1
        name = self._pattern.replace("{seed}", str(picture.stack.seed)).replace("{index}", str(self._index))
        path, number = Path(name), 1
        while self._fresh and path.exists():
            number += 1
            path = Path(f"{name[:-4]}-{number}.png")
        return picture.save(path)


def _written(picture: "Picture", path: Path, base: "Base") -> str:
    return f"wrote {path}  ({picture.image.width}x{picture.image.height}, seed {picture.stack.seed}, base {base.source})"


class _Bar:
    """One progress bar over all steps of all pictures, on the terminal's error stream."""

    def __init__(self, stack: Stack) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=stack.count * stack.done, unit="step", leave=False, disable=not sys.stderr.isatty())

    def step(self, progress: object) -> None:
        self._bar.update(1)

    def say(self, line: str) -> None:
        self._bar.write(line)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()
