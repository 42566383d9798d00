"""Aspect buckets that never drop a picture, and the pixels of one example cut for its bucket.

A bucket is a target size near `resolution` squared in area whose sides are multiples of what the network can halve. Each
picture goes to the bucket of the nearest proportions, is scaled until it covers it, and loses only what hangs over.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vgm_peft.data.pictures import decode, read_bytes, shown
from vgm_peft.data.report import Example
from vgm_peft.errors import ConfigError, DataError
from vgm_peft.family import Base

Sizes = tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class Crop:
    """How a picture becomes a training picture: scaled to `scaled`, then cut to `target` at `left`, `top`. Widths first."""

    original: tuple[int, int]
    scaled: tuple[int, int]
    left: int
    top: int
    target: tuple[int, int]

    @property
    def upscaled(self) -> bool:
        """Whether the picture is smaller than what it is trained at."""
        return self.scaled[0] > self.original[0]

    @property
    def lost(self) -> float:
        """The share of the picture's area that is cut away, 0 .. 1."""
        return 1 - self.target[0] * self.target[1] / (self.scaled[0] * self.scaled[1])

    def sizes(self, flip: bool = False) -> Sizes:
        """What SDXL is told (Podell et al. 2023, arXiv 2307.01952, section 2.2): original height and width, crop top and
        left (of the mirrored picture where `flip`), target height and width, pixels.
        """
        left = self.scaled[0] - self.target[0] - self.left if flip else self.left
        return (self.original[1], self.original[0], self.top, left, self.target[1], self.target[0])


def pixel_step(base: Base) -> int:
    """Return what both sides of a picture must be multiples of for a base: VAE factor times the denoiser's halvings."""
    config: Any = base.denoiser.config
    levels = len(config.get("block_out_channels") or ())
    return base.latent_factor * (2 ** (levels - 1) if levels else int(config.get("patch_size") or 1))


def plan_crops(
    sizes: Sequence[tuple[int, int]], resolution: int, step: int, *, square: bool = False, max_aspect: float = 4.0
) -> list[Crop]:
    """Plan the centred crop of every picture, given as (width, height) in pixels; one crop for each, in order.

    `resolution` is the side of the square bucket, `step` what all sides are multiples of; `square` allows that bucket only,
    `max_aspect` bounds the longer side over the shorter. Raises `ConfigError` when no bucket is possible.
    """
    if step < 1 or resolution < step or resolution % step:
        low = max(step, resolution // step * step) if step > 0 else 0
        raise ConfigError(f"resolution {resolution}", expected=f"a multiple of {step} pixels", fix=f"for example {low}")
    if max_aspect < 1:
        raise ConfigError(f"largest aspect {max_aspect}", expected="1 or more")
    targets = ((resolution, resolution),) if square else _targets(resolution, step, max_aspect)
    return [_crop(width, height, targets) for width, height in sizes]


def bucket_ids(crops: Sequence[Crop]) -> list[int]:
    """Number the buckets: crops of one target size have one number, numbers ascend with width."""
    known = {target: number for number, target in enumerate(sorted({crop.target for crop in crops}))}
    return [known[crop.target] for crop in crops]


def describe_crops(examples: Sequence[Example], crops: Sequence[Crop]) -> list[str]:
    """Say in lines for the report which buckets there are, and which pictures are enlarged or lose over a tenth."""
    counts: dict[tuple[int, int], int] = {}
    for crop in crops:
        counts[crop.target] = counts.get(crop.target, 0) + 1
    lines = ["buckets: " + ", ".join(f"{w} x {h}: {n}" for (w, h), n in sorted(counts.items()))]
    pairs = list(zip(examples, crops, strict=True))
    lines += [f"note: {_name(e)} ({e.width} x {e.height}) is enlarged to {_by(c.scaled)}" for e, c in pairs if c.upscaled]
    lines += [f"note: {_name(e)} loses {c.lost:.0%} of its area to the crop" for e, c in pairs if c.lost > 0.1]
    return lines


def load_pixels(example: Example, crop: Crop, flip: bool = False) -> Tensor:
    """Return the example's pixels for its crop, (3, P, Q) float32 in -1 .. 1; `flip` mirrors left and right.

    Raises `DataError` when the file is not the one that was scanned any more.
    """
    return _load(example.path, example.digest, crop, flip).div_(127.5).sub_(1.0)


def load_control(example: Example, crop: Crop, flip: bool = False) -> Tensor:
    """Return the control picture cut like its picture, (3, P, Q) float32 in 0 .. 1. Raises `DataError` without one."""
    if example.control is None:
        raise DataError(f"{_name(example)} has no control picture", fix="see control in metadata.jsonl, or a folder control/")
    return _load(example.control, example.control_digest, crop, flip).div_(255.0)


def _load(path: Path, digest: str, crop: Crop, flip: bool) -> Tensor:
    from hashlib import sha256

    raw = read_bytes(path)
    if sha256(raw).hexdigest() != digest:
        raise DataError(f"{shown(path.name)} has changed since the folder was read", fix="start again")
    box = (crop.left, crop.top, crop.left + crop.target[0], crop.top + crop.target[1])
    image = decode(raw).resize(crop.scaled, Image.Resampling.LANCZOS).crop(box)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).contiguous()


@lru_cache(maxsize=16)
def _targets(resolution: int, step: int, max_aspect: float) -> tuple[tuple[int, int], ...]:
    """Every size whose sides are multiples of `step`, of the largest area not above resolution squared for its shorter side."""
    found = {(resolution, resolution)}
    for short in range(step, resolution + 1, step):
        long = resolution * resolution // short // step * step
        if long <= max_aspect * short:
            found |= {(short, long), (long, short)}
    return tuple(sorted(found))


def _crop(width: int, height: int, targets: Sequence[tuple[int, int]]) -> Crop:
    if width < 1 or height < 1:
        raise DataError(f"a picture of {width} x {height} pixels", expected="at least one pixel")
    aspect = log(width / height)
    wide, high = min(targets, key=lambda t: (abs(log(t[0] / t[1]) - aspect), -t[0] * t[1], t))
    # Scaled to cover the target; rounding may not leave a side short.
    factor = max(wide / width, high / height)
    scaled = (max(wide, round(width * factor)), max(high, round(height * factor)))
    return Crop((width, height), scaled, (scaled[0] - wide) // 2, (scaled[1] - high) // 2, (wide, high))


def _name(example: Example) -> str:
    return shown(example.path.name)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
