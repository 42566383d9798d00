"""Look into delta files, and write them for other tools.

vgm-delta inspect me.safetensors
vgm-delta export me.safetensors --for comfyui -o me-comfyui.safetensors
vgm-delta count --base-config sdxl --delta krona --set a1=4 --set a2=64
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from vgm_peft.cli import Parser
from vgm_peft.errors import ConfigError

if TYPE_CHECKING:
    from vgm_peft.formats.summary import Summary

TARGETS = ("comfyui", "a1111", "forge", "invokeai", "kohya", "diffusers", "native", "embedding")
DTYPES = ("float32", "float16", "bfloat16")


def add_flags(parser: Parser) -> None:
    """Declare the verbs."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    inspect = verbs.add_parser("inspect", help="say what a delta file holds", description="Say what a delta file holds.")
    inspect.add_argument("file", metavar="FILE", type=Path, help="a delta of any tool, or the folder of a run")
    inspect.add_argument("--json", action="store_true", help="print it as JSON")
    export = verbs.add_parser("export", help="write a delta for another tool", description="Write a delta for another tool.")
    export.add_argument("file", metavar="FILE", type=Path, help="a delta of any tool, or the folder of a run")
    export.add_argument("--for", dest="target", metavar="TOOL", required=True, help="one of " + ", ".join(TARGETS))
    export.add_argument("-o", "--output", metavar="OUT", type=Path, help="the file to write (FILE-TOOL.safetensors)")
    export.add_argument("--base", metavar="B", help="the base, for methods whose change depends on its weights")
    export.add_argument("--dtype", metavar="D", help=f"round the values: {', '.join(DTYPES)} (as they were trained)")
    about = "Count what a method trains on a published base, without loading it."
    count = verbs.add_parser("count", help="count what a method would train", description=about)
    count.add_argument("--base-config", metavar="B", default="sd15", help="sd15 (the default), sdxl or dit-xl-2")
    count.add_argument("--delta", metavar="NAME,..", default="all", help="one or more methods (default: all)")
    count.add_argument("--sites", metavar="S,..", default="", help="presets or patterns (default: the method's own)")
    count.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="an option of the method; repeatable")
    count.add_argument("--json", action="store_true", help="print it as JSON")


def run(args: argparse.Namespace) -> int:
    """Inspect, export or count."""
    if args.verb == "count":
        from vgm_peft.cli.count import run

        return run(args)
    return _inspect(args.file, args.json) if args.verb == "inspect" else _export(args)


def _inspect(file: Path, as_json: bool) -> int:
    from dataclasses import asdict

    from vgm_peft.formats.summary import summarise

    summary = summarise(file)
    print(json.dumps(asdict(summary), indent=2) if as_json else _told(summary))
    return 0


def _told(summary: "Summary") -> str:
    kinds = " + ".join(dict.fromkeys(group.kind for group in summary.groups)) or "words"
    dtypes = ", ".join(summary.dtypes)
    lines = [f"{summary.file}: {kinds} of {summary.family}, {summary.format} format"]
    lines.append(f"  size      {_bytes(summary.size)}, {summary.values:,} trained values, {dtypes}")
    if summary.parts:
        lines.append("  parts     " + ", ".join(f"{part} {count} layers" for part, count in summary.parts.items()))
    for group in summary.groups:
        options = ", ".join(f"{name}={value}" for name, value in group.options.items() if value not in (None, False, 0.0))
        lines.append(f"  {group.kind:9} {group.layers} layers, {group.values:,} values: {options}")
    if len(summary.ranks) > 1:
        lines.append("  ranks     " + ", ".join(f"{rank} on {count} layers" for rank, count in summary.ranks.items()))
    if summary.norms is not None:
        n = summary.norms
        lines.append(f"  |dW|      {n.smallest:.3g} .. {n.median:.3g} (median) .. {n.largest:.3g}, the last at {n.at}")
    for token, rows in summary.words.items():
        shapes = ", ".join(f"{part} {vectors} x {width}" for part, (vectors, width) in rows.items())
        lines.append(f"  word      {_shown(token)}: {shapes}")
    lines += [f"  metadata  {_shown(key)} = {_shown(text)}" for key, text in summary.metadata.items()]
    return "\n".join(lines)


def _shown(text: str) -> str:
    """Text from a stranger's file on one line: control characters escaped, at most 100 letters."""
    plain = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:200])
    return plain if len(plain) <= 100 else plain[:97] + "..."


def _bytes(size: int) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{size} bytes"
        size /= 1024  # type: ignore[assignment]
    return f"{size:.3g} GiB"


def _export(args: argparse.Namespace) -> int:
    import torch

    from vgm_peft import formats

    if args.dtype is not None and args.dtype not in DTYPES:
        raise ConfigError(f"--dtype {args.dtype}", expected="one of " + ", ".join(DTYPES))
    target = formats.format_named(args.target)
    file: Path = args.file
    output: Path = args.output or file.with_name(f"{file.stem}-{args.target}.safetensors")
    if output.suffix != ".safetensors":
        raise ConfigError(f"--output {output}", expected="a name that ends in .safetensors, by which other tools find it")
    if output.resolve() == file.resolve():
        raise ConfigError(f"--output {output} is the file that is read", fix="choose another name")
    base = None
    if args.base is not None:
        from vgm_peft.families import load

        base = load(args.base, digest=False)
    delta = formats.read(file, base)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    formats.write(delta, output, target.name, base, dtype=dtype)
    for path in formats.names_of(delta, output, target.name):
        print(f"{path}: {target.name} ({target.about}), {_bytes(path.stat().st_size)}, read back and compared")
    return 0
