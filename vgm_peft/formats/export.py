"""A delta for another tool: planned, spelled, written aside, read back, compared with what it was, and only then reported.

`export` is the one verb; what a target can have is in `targets`, how a patch finds its way is in `plan`.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import torch

from vgm_peft.delta import Delta, Patch
from vgm_peft.errors import ConfigError
from vgm_peft.family import Base
from vgm_peft.formats import FORMATS, Meant, check_family, native, place_for, put
from vgm_peft.formats.plan import Plan, plan
from vgm_peft.formats.stamps import sealed
from vgm_peft.formats.targets import target_named

RANK = 32
"""Rank of approximations where they are allowed and no rank is named."""
THUMBNAIL = 256
"""The longest side of a thumbnail, pixels."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What may be asked of an export beyond its target."""

    dtype: torch.dtype | None = None
    """Round the values to it; None keeps theirs."""
    approximate: int | None = None
    """Write LoRAs of this rank where the target has no place for a change without loss."""
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    """`modelspec.*` and `ss_*` to say in the file, as they are given."""

    def __post_init__(self) -> None:
        if self.approximate is not None and not 1 <= self.approximate <= 1024:
            raise ConfigError(f"approximate = {self.approximate}", expected="a rank of 1 .. 1024")
        for key in self.metadata:
            if not key.startswith(("modelspec.", "ss_")):
                raise ConfigError(f'metadata "{key}"', expected="a name that begins with modelspec. or ss_, which UIs show")


@dataclass(frozen=True)
class Exported:
    """What was written, and how near it is."""

    files: list[Path]
    """The main one first."""
    plan: Plan


def export(
    delta: Delta, path: str | PathLike[str], target: str, base: Base | None = None, wishes: Wishes | None = None
) -> Exported:
    """Write a delta for a target and return what was written; nothing is left behind when it fails.

    Raises `ConfigError` for an unknown target, `DeltaError` when the target cannot have the delta (saying what would
    work) or what is read back is not what was meant, `SaveError` when the disk refuses.
    """
    wishes = wishes or Wishes()
    tool = target_named(target)
    format = FORMATS[tool.format]
    path = place_for(path, format)
    check_family("the delta", delta, base)
    if tool.format == native.FORMAT.name:  # the file's metadata is the delta's own, to the letter
        delta = Delta(delta.family, delta.patches, delta.words, {**delta.metadata, **wishes.metadata})
    made = plan(delta, tool, base, wishes.approximate)
    parcels = format.spell(made.delta, base, wishes.dtype)
    if tool.format != native.FORMAT.name:
        said = {"modelspec.title": delta.metadata.get("ss_output_name", path.stem)} if tool.is_tool else {}
        said |= {key: text for key, text in delta.metadata.items() if key == "modelspec.title"} | {**wishes.metadata}
        parcels = {name: sealed(parcel, said if parcel.titled else {}) for name, parcel in parcels.items()}
    return Exported(put(parcels, path, format, Meant(made.meant, base, wishes.dtype, format.by_part)), made)


def file_name(target: str, stem: str = "") -> str:
    """Return how a target's file is called by default: `comfyui.safetensors`, of `me` `me-comfyui.safetensors`; `peft`."""
    name = f"{stem}-{target}" if stem else target
    return name if FORMATS[target_named(target).format].folder else f"{name}.safetensors"


@torch.no_grad()
def foresee(delta: Delta, target: str, base: Base) -> None:
    """Raise now what `export` would raise for a fresh delta once it is trained: tried on a patch of every sort.

    Raises `ConfigError` for an unknown target, `DeltaError` when it cannot have such a delta.
    """
    samples: dict[tuple[object, ...], Patch] = {}
    for patch in delta:
        samples.setdefault((patch.kind, repr(patch.options), patch.site.op, patch.site.part, patch.site.shape), patch)
    trained = Delta(delta.family, {patch.site.name: deepcopy(patch) for patch in samples.values()})
    generator = torch.Generator().manual_seed(0)
    for _, parameter in trained.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    tool = target_named(target)
    made = plan(trained, tool, base)
    if not tool.is_tool:
        FORMATS[tool.format].spell(made.delta, base, None)


def thumbnail(picture: str | PathLike[str]) -> str:
    """Return a picture as the data URL of a small JPEG, for `modelspec.thumbnail`. Raises `ConfigError` when it is none."""
    from base64 import b64encode
    from io import BytesIO

    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(picture) as image:
            small = image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ConfigError(f"thumbnail {picture}: no picture that can be read ({error})") from None
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = BytesIO()
    small.save(file, "JPEG", quality=85)  # a new file: nothing of what the picture says of its making goes along
    return "data:image/jpeg;base64," + b64encode(file.getvalue()).decode("ascii")
