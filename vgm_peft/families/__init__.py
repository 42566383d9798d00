"""The table of base-model families, and how to find the family of a pipeline or load a base by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vgm_peft.errors import BaseModelError, ConfigError, nearest
from vgm_peft.families.bases import load_base, toybox_folder
from vgm_peft.families.outline import Outline, Size, outline_of, size_of
from vgm_peft.families.sd15 import StableDiffusion
from vgm_peft.families.sdxl import StableDiffusionXL
from vgm_peft.families.transformers import Flux, StableDiffusion3
from vgm_peft.family import Base, Family, Naming

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = [
    "KNOWN",
    "TABLE",
    "Outline",
    "Size",
    "family_named",
    "family_of",
    "load",
    "naming_of",
    "outline",
    "size_of",
    "toybox_folder",
]

TABLE: Mapping[str, Family] = {family.name: family for family in (StableDiffusion(), StableDiffusionXL())}
KNOWN: Mapping[str, Naming] = {**TABLE, **{family.name: family for family in (StableDiffusion3(), Flux())}}
"""Every family whose deltas are read; of those that are not in `TABLE` as well, no base is loaded yet."""


def family_named(name: str) -> Family:
    """Return a family of the table. Raises `ConfigError` with the nearest known name."""
    if name not in TABLE:
        raise ConfigError(f'unknown family "{name}"', fix=nearest(name, list(TABLE)))
    return TABLE[name]


def naming_of(name: str) -> Naming:
    """Return what is known of a family's names. Raises `ConfigError` with the nearest known name."""
    if name not in KNOWN:
        raise ConfigError(f'unknown family "{name}"', fix=nearest(name, list(KNOWN)))
    return KNOWN[name]


def family_of(pipe: "DiffusionPipeline") -> Family:
    """Return the family of a diffusers pipeline of any task. Raises `BaseModelError` naming what was found when none fits."""
    for family in TABLE.values():
        if family.recognises(pipe):
            return family
    parts = ", ".join(f"{name}: {type(part).__name__}" for name, part in pipe.components.items() if part is not None)
    raise BaseModelError(
        f"{type(pipe).__name__} ({parts}) is of no known family",
        expected="one of " + ", ".join(TABLE),
    )


def load(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: "torch.device | str" = "cpu",
    digest: bool = True,
) -> Base:
    """Load a base model, frozen and in evaluation mode.

    `source` is `toybox` (the embedded base), a folder in diffusers' layout, a single `.safetensors` checkpoint in the
    original layout, or a hub id. `digest` names the exact files by SHA-256 (a few seconds for a large base, once while it
    stays the same). Raises `BaseModelError` when it cannot be found, read, recognised, or would bring code of its own.
    """
    return load_base(TABLE, source, dtype, device, digest)


def outline(source: str | Path) -> Outline:
    """Return what is known of a base, named as for `load`, before its weights are read. Raises `BaseModelError`."""
    return outline_of(TABLE, source)
