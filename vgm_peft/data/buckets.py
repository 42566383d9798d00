"""Aspect buckets that never drop a picture, and the pixels of one example cut for its bucket.

A bucket is a target size near `resolution` squared in area whose sides are multiples of what the network can halve. Each
picture goes to the bucket of the nearest proportions, is scaled until it covers it, and loses only what hangs over.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise
from math import log

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vgm_peft.data.member import Place
from vgm_peft.data.pictures import decode, decode_mask, read_bytes, shown
from vgm_peft.data.report import Example
from vgm_peft.errors import ConfigError, DataError

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


def further_crops(crop: Crop, digest: str, count: int, zoom: float) -> tuple[Crop, ...]:
    """Return up to `count` different crops of one picture to the target of `crop`, the given, centred one first.

    The others are enlarged by up to `zoom`, never beyond the picture's own pixels, and cut anywhere. They depend on the
    picture's `digest` alone, so every run finds them in the cache.
    """
    (wide, high), largest = crop.target, max(1.0, min(zoom, crop.original[0] / crop.scaled[0]))
    out = [crop]
    for number in range(1, count):
        chance = random.Random(f"{digest}/{number}")
        factor = chance.uniform(1.0, largest)
        scaled = (max(wide, round(crop.scaled[0] * factor)), max(high, round(crop.scaled[1] * factor)))
        left, top = chance.randint(0, scaled[0] - wide), chance.randint(0, scaled[1] - high)
        out.append(replace(crop, scaled=scaled, left=left, top=top))
    return tuple(dict.fromkeys(out))


def load_pixels(example: Example, crop: Crop, flip: bool = False) -> Tensor:
    """Return the example's pixels for its crop, (3, P, Q) float32 in -1 .. 1; `flip` mirrors left and right.

    Raises `DataError` when the file is not the one that was scanned any more.
    """
    image = decode(_unchanged(example.path, example.digest))
    return _pixels(_cut(image, crop, flip)).div_(127.5).sub_(1.0)


def load_control(example: Example, crop: Crop, flip: bool = False, count: int = 1) -> Tensor:
    """Return the control picture cut like its picture, (3 n, P, Q) float32 in 0 .. 1, where `count` = n lie side by side in it.

    Raises `DataError` without one.
    """
    if example.control is None:
        raise DataError(f"{_name(example)} has no control picture", fix="see control in metadata.jsonl, or a folder control/")
    image = decode(_unchanged(example.control, example.control_digest))
    edges = [round(i * image.width / count) for i in range(count + 1)]
    parts = [image.crop((left, 0, right, image.height)) for left, right in pairwise(edges)]
    return torch.cat([_pixels(_cut(part, crop, flip)) for part in parts]).div_(255.0)


def load_mask(example: Example, crop: Crop, flip: bool, factor: int) -> Tensor:
    """Return where a picture counts, cut like it: (1, P / factor, Q / factor) float32 in 0 .. 1, ones where it has no mask.

    Each value is the mean over the pixels that one latent stands for, in 255ths. All are 0 where a crop shows nothing of it.
    """
    wide, high = crop.target
    if example.mask is None:
        return torch.ones(1, high // factor, wide // factor)
    image = decode_mask(_unchanged(example.mask, example.mask_digest), alpha=example.mask == example.path)
    grey = torch.from_numpy(np.array(_cut(image, crop, flip))).to(torch.float32).div_(255.0)
    return grey.reshape(high // factor, factor, wide // factor, factor).mean((1, 3))[None].mul_(255).round_().div_(255)


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).contiguous()


def _unchanged(path: Place, digest: str) -> bytes:
    raw = read_bytes(path)
    if sha256(raw).hexdigest() != digest:
        raise DataError(f"{shown(path.name)} has changed since the folder was read", fix="start again")
    return raw


def _cut(image: Image.Image, crop: Crop, flip: bool) -> Image.Image:
    box = (crop.left, crop.top, crop.left + crop.target[0], crop.top + crop.target[1])
    image = image.resize(crop.scaled, Image.Resampling.LANCZOS).crop(box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


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
