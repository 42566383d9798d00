"""The layers of published bases without their values: what a count of trained values needs, and no download.

Every family knows its published base. DiT-XL/2 (Peebles & Xie 2022, arXiv 2212.09748, table 1), on which DiffFit reports,
is here by its layers only, under the names of the authors' own code; no family draws with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from vgm_peft.errors import ConfigError, nearest
from vgm_peft.families import TABLE
from vgm_peft.site import Site, find_sites

DIT_PRESETS: Mapping[str, tuple[str, ...]] = {
    "attention": ("transformer.blocks.*.attn.qkv", "transformer.blocks.*.attn.proj"),
    "attention+mlp": ("transformer.blocks.*.attn.*", "transformer.blocks.*.mlp.*"),
    "branches": ("transformer.blocks.*.attn.*.weight", "transformer.blocks.*.mlp.fc2.weight"),
    "weights": ("transformer.*", "-transformer.*.bias", "-transformer.y_embedder.*"),
    "biases": ("transformer.*.bias",),
    "norms": ("transformer.*norm*",),
    "classes": ("transformer.y_embedder.*",),
    "all": ("transformer.*",),
}


@dataclass(frozen=True)
class Shape:
    """A base by its layers: its sites, its presets of them, and the number of values in its denoiser and in all of it."""

    sites: tuple[Site, ...]
    presets: Mapping[str, Sequence[str]]
    denoiser: int
    whole: int


def names() -> tuple[str, ...]:
    """The bases whose layers are known."""
    return (*TABLE, "dit-xl-2")


@cache
def shape_of(name: str) -> Shape:
    """Return the layers of a published base. Raises `ConfigError` with the nearest known name."""
    if name in TABLE:
        family = TABLE[name]
        parts, presets = family.published(), family.presets
        return _shape(parts, presets, family.denoiser)
    if name == "dit-xl-2":
        return _shape({"transformer": dit()}, DIT_PRESETS, "transformer")
    raise ConfigError(f'the layers of "{name}" are not known', expected=", ".join(names()), fix=nearest(name, names()))


def _shape(parts: Mapping[str, nn.Module], presets: Mapping[str, Sequence[str]], denoiser: str) -> Shape:
    counts = {part: sum(p.numel() for p in root.parameters()) for part, root in parts.items()}
    sites = tuple(site for part, root in parts.items() for site in find_sites(part, root))
    return Shape(sites, presets, counts[denoiser], sum(counts.values()))


def dit(width: int = 1152, depth: int = 28, classes: int = 1000) -> nn.Module:
    """The layers of a DiT on the meta device; its position table is fixed and its norms have no values."""

    def block() -> nn.ModuleDict:
        return nn.ModuleDict(
            {
                "attn": nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}),
                "mlp": nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}),
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width)),
            }
        )

    with torch.device("meta"):
        return nn.ModuleDict(
            {
                "x_embedder": nn.ModuleDict({"proj": nn.Conv2d(4, width, 2, 2)}),
                "t_embedder": nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))}),
                "y_embedder": nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)}),
                "blocks": nn.ModuleList(block() for _ in range(depth)),
                "final_layer": nn.ModuleDict(
                    {
                        "linear": nn.Linear(width, 2 * 2 * 8),
                        "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
                    }
                ),
            }
        )
