"""`vgm-delta inspect`: what a delta file holds, from its header; with `--norms` or a picture, how large its changes are."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vgm_peft.cli.verbs import Verbs, bytes_in_words, checkpoint, on_one_line, table

if TYPE_CHECKING:
    from vgm_peft.tools.glance import Glance

DTYPES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def add_verb(verbs: Verbs) -> None:
    """Declare the flags."""
    about = "Say what a delta file holds, from its header alone; --norms and -o read the values too."
    verb = verbs.add_parser("inspect", help="say what a delta file holds", description=about)
    verb.add_argument("file", metavar="FILE", type=Path, help="a delta of any tool, or the folder of a run")
    verb.add_argument("--norms", action="store_true", help="read the values too: rank and |dW| of every layer")
    verb.add_argument("-o", "--output", metavar="PNG", type=Path, help="draw how |dW| spreads, and where it is large")
    verb.add_argument("--base", metavar="B", help="the base, for methods whose change depends on its weights")
    verb.add_argument("--json", action="store_true", help="print it as JSON")
    verb.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Look, and measure where that is asked for."""
    from vgm_peft.tools.glance import glance, together

    seen = together([glance(file) for file in _files(args.file)], args.file.name)
    layers = _layers(args) if args.norms or args.output is not None else None
    if args.json:
        measured = {} if layers is None else {"family": layers[0], "layers": layers[1]}
        print(json.dumps({**asdict(seen), **measured}, indent=2))
    else:
        print(_told(seen))
        if layers is not None:
            print(_measured(*layers))
    if args.output is not None and layers is not None:
        from vgm_peft.tools.chart import save

        values = {name: norm for name, (_, norm) in layers[1].items()}
        path = save(values, f"{args.file.name}: {' + '.join(seen.kinds)}, {len(values)} layers", "|dW|", args.output)
        if not args.json:
            print(f"{path}: drawn")
    return 0


def _files(path: Path) -> list[Path]:
    """The file itself, or those of a folder; only the latter takes the room of formats, and with it torch."""
    if not path.is_dir():
        return [path]
    from vgm_peft.formats import files_of

    return files_of(path)


def _layers(args: argparse.Namespace) -> tuple[str, dict[str, tuple[int | None, float]]]:
    """The delta's family, and rank and norm by layer."""
    from vgm_peft.formats import read
    from vgm_peft.tools.measure import norms, stored_rank

    delta = read(args.file)
    found = norms(delta, checkpoint(args.base))
    return delta.family, {name: (stored_rank(delta.patches[name]), norm) for name, norm in found.items()}


def _told(seen: "Glance") -> str:
    kinds = " + ".join(seen.kinds) or "words"
    base = f"for {seen.base}" if seen.base else "which does not say its base (--norms finds it out)"
    lines = [f"{seen.file}: {kinds} of {seen.tool}, {on_one_line(base)}"]
    dtypes = ", ".join(f"{values:,} {DTYPES.get(dtype, dtype)}" for dtype, values in seen.dtypes.items())
    lines.append(f"  size      {bytes_in_words(seen.size)}: {dtypes}")
    for word, counts in (("parts", seen.parts), ("kinds", seen.kinds if len(seen.kinds) > 1 else {})):
        if counts:
            lines.append(f"  {word:9} " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    if seen.ranks:
        lines.append("  ranks     " + ", ".join(f"{rank} on {count} layers" for rank, count in seen.ranks.items()))
    for group in seen.options:
        options = ", ".join(
            f"{k}={v}" for k, v in group.items() if k not in ("kind", "tensors") and v not in (None, False, 0.0)
        )
        lines.append(f"  {group['kind']:9} {group['tensors']} layers: {on_one_line(options)}")
    for token, rows in seen.words.items():
        shapes = ", ".join(f"{part} {'x'.join(map(str, shape))}" for part, shape in rows.items())
        lines.append(f"  word      {on_one_line(token)}: {shapes}")
    if seen.others:
        lines.append(f"  unknown   {seen.others} tensors whose names say nothing here")
    lines += [f"  metadata  {on_one_line(key)} = {on_one_line(text)}" for key, text in seen.metadata.items()]
    return "\n".join(lines)


def _measured(family: str, layers: Mapping[str, tuple[int | None, float]]) -> str:
    if not layers:
        return f"  family    {family}"
    ordered = sorted(norm for _, norm in layers.values())
    low, middle, high = ordered[0], ordered[len(ordered) // 2], ordered[-1]
    rows = [(name, "" if rank is None else str(rank), f"{norm:.4g}") for name, (rank, norm) in layers.items()]
    spread = f"  |dW|      {low:.3g} .. {middle:.3g} (median) .. {high:.3g}"
    return "\n".join([f"  family    {family}", spread, table(("layer", "rank", "|dW|"), rows)])
