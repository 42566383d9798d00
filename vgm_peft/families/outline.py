"""What can be known of a base before its weights are read: its family, and the sizes that its pictures should have.

So that pictures are judged, sorted into buckets and a recipe is chosen without waiting for gigabytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vgm_peft.errors import BaseModelError
from vgm_peft.families.bases import TOYBOX, toybox_folder
from vgm_peft.families.index import family_of_folder, family_of_index
from vgm_peft.families.original import configured
from vgm_peft.family import Base, Family
from vgm_peft.folders import HUB_ID, PICKLED, fetch_config, read_json


@dataclass(frozen=True)
class Size:
    """The side in pixels of the square that a base was made for, and what all sides must be multiples of."""

    resolution: int
    step: int


@dataclass(frozen=True)
class Outline:
    """The name of a base's family; its size where its configurations tell it."""

    family: str
    size: Size | None


def size_of(base: Base) -> Size:
    """Return the size of a loaded base."""
    config: Any = base.denoiser.config
    return Size(base.resolution, step_of(config, base.latent_factor))


def step_of(config: Mapping[str, Any], factor: int) -> int:
    """Return what sides in pixels must be multiples of: the VAE's `factor` times the denoiser's halvings."""
    levels = len(config.get("block_out_channels") or ())
    return factor * (2 ** (levels - 1) if levels else int(config.get("patch_size") or 1))


def outline_of(families: Mapping[str, Family], source: str | Path) -> Outline:
    """Return what a base's configurations say; `source` as for `families.load`, whose `BaseModelError`s it raises."""
    name = str(source)
    path = toybox_folder() if name == TOYBOX else Path(source).expanduser()
    if path.is_dir():
        return _of_folder(family_of_folder(families, path), path)
    if path.is_file() or path.suffix in (*PICKLED, ".safetensors"):
        with configured(families, path) as (family, folder):
            return _of_folder(family, folder)
    if HUB_ID.fullmatch(name):
        return _of_hub(families, name)
    raise BaseModelError(
        f'base "{name}": no such file or folder',
        expected="toybox, a diffusers folder, a .safetensors file, or a hub id (stabilityai/stable-diffusion-xl-base-1.0)",
    )


def _of_folder(family: Family, folder: Path) -> Outline:
    names = (folder / family.denoiser / "config.json", folder / "vae" / "config.json")
    return Outline(family.name, _size(*(read_json(name) for name in names)))


def _of_hub(families: Mapping[str, Family], name: str) -> Outline:
    family = family_of_index(families, read_json(fetch_config(name)), Path(name))
    files = (f"{family.denoiser}/config.json", "vae/config.json")
    return Outline(family.name, _size(*(read_json(fetch_config(name, file)) for file in files)))


def _size(denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> Size | None:
    """The size, or None where a configuration leaves it to the defaults of its class."""
    side, blocks = denoiser.get("sample_size"), vae.get("block_out_channels")
    if not isinstance(side, (int, list)) or not blocks:
        return None
    factor = 2 ** (len(blocks) - 1)
    return Size(int(side if isinstance(side, int) else max(side)) * factor, step_of(denoiser, factor))
