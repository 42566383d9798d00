"""`vgm-delta count`: how many values a method trains on a published base, and what share of it that is."""

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from vgm_peft.config import Value, build, merge, parse_setting
from vgm_peft.errors import ConfigError, VgmError

if TYPE_CHECKING:
    from vgm_peft.delta import Patch
    from vgm_peft.families.shapes import Shape


@dataclass(frozen=True)
class Count:
    """One method on one base: layers changed, values trained, their share of the denoiser in percent, bytes in float32."""

    delta: str
    base: str
    sites: tuple[str, ...]
    options: Mapping[str, object]
    layers: int
    values: int
    share: float
    file_bytes: int


def run(args: argparse.Namespace) -> int:
    """Count as the flags ask; a method of several that does not fit says why in its line."""
    from vgm_peft.deltas import TABLE, method_named
    from vgm_peft.families.shapes import shape_of

    shape = shape_of(args.base_config)
    wanted = list(TABLE) if args.delta == "all" else [name.strip() for name in args.delta.split(",")]
    methods = [method_named(name) for name in wanted]
    settings = merge(*(parse_setting(text) for text in args.set))
    sites = [part.strip() for part in args.sites.split(",") if part.strip()]
    counts: list[Count] = []
    for method in methods:
        try:
            counts.append(count(method, shape, sites, settings, args.base_config))
        except VgmError as error:
            if len(methods) == 1:
                raise
            print(f"{method.kind}: {error}")
    if args.json:
        print(json.dumps([asdict(c) for c in counts], indent=2))
    else:
        print(_table(counts, shape, args.base_config))
    return 0


def count(method: "type[Patch]", shape: "Shape", sites: Sequence[str], settings: Mapping[str, Value], base: str) -> Count:
    """Count the values of a method on a base. Raises `ConfigError` or `DeltaError` as training would."""
    import torch

    from vgm_peft.delta import Delta
    from vgm_peft.site import choose

    known = [f.name for f in fields(method.Options)]
    if unknown := settings.keys() - set(known):
        raise ConfigError(f'{method.kind} has no option "{min(unknown)}"', expected=", ".join(known) or "none at all")
    options, patterns = build(method.Options, settings), tuple(sites) or method.where
    chosen = choose(shape.sites, patterns, shape.presets, method.ops)
    # One layer of each shape is made, on no device at all; the others are like it.
    alike = Counter((site.op, site.shape, site.tensor) for site in chosen)
    first = {(site.op, site.shape, site.tensor): site for site in reversed(chosen)}
    with torch.device("meta"):
        sizes = {key: Delta.fit(base, method, [site], options).count() for key, site in first.items()}
    values = sum(sizes[key] * many for key, many in alike.items())
    return Count(method.kind, base, patterns, asdict(options), len(chosen), values, 100 * values / shape.denoiser, 4 * values)


def _table(counts: Sequence[Count], shape: "Shape", base: str) -> str:
    lines = [f"{base}: denoiser {shape.denoiser:,} values, with text encoders {shape.whole:,}", ""]
    lines.append(f"{'method':12} {'layers':>6} {'values':>14} {'share of denoiser':>18} {'float32 file':>13}   sites")
    for c in counts:
        size = f"{c.file_bytes / 2**20:.2f} MiB"
        lines.append(f"{c.delta:12} {c.layers:>6} {c.values:>14,} {c.share:>16.4f} % {size:>13}   {', '.join(c.sites)}")
    return "\n".join(lines)
