"""What a toy's surface looks like at a point: tints, materials and patterns, in toy coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vgm_peft.toybox.world import RGB, Toy

_TINTS: tuple[RGB, ...] = ((0, 0, 0), (52, 52, 58), (140, 142, 148), (232, 222, 200), (118, 82, 56), (70, 92, 112))


def linear(rgb: RGB) -> tuple[float, float, float]:
    """Display bytes as linear light."""
    return ((rgb[0] / 255) ** 2.2, (rgb[1] / 255) ** 2.2, (rgb[2] / 255) ** 2.2)


def companion(rgb: RGB, material: str) -> RGB:
    """The second colour of stripes (lighter) and checks (darker); pale toys are striped with grey."""
    luma = (0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2]) / 255
    if material == "checkered":
        return (round(rgb[0] * 0.4), round(rgb[1] * 0.4), round(rgb[2] * 0.4))
    if luma > 0.85:
        return (150, 152, 158)
    return (round(rgb[0] * 0.2 + 204), round(rgb[1] * 0.2 + 202), round(rgb[2] * 0.2 + 198))


def _mask(toy: Toy, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where the second (and third) colour shows."""
    if toy.pattern is None:
        if toy.material == "striped":
            return (y * 4.2).frac() > 0.58, None
        cells = (x * 4.4 + 40.5).floor() + (y * 4.4 + 40).floor() + (z * 4.4 + 40.5).floor()
        return cells.remainder(2) > 0.5, None
    kind, scale, phase = toy.pattern.kind, toy.pattern.scale, toy.pattern.phase
    angle = torch.atan2(x, z) * (0.5 / math.pi)
    if kind == "dots":
        row = (y * scale + phase).floor()
        u = (angle * 7 + 0.5 * row.remainder(2) + 10).frac() - 0.5
        v = (y * scale + phase).frac() - 0.5
        return u * u + v * v < 0.1, (y * scale + phase).remainder(2) < 1
    if kind == "rings":
        level = (y * scale * 0.75 + phase).remainder(3)
        return level < 2, level < 1
    if kind == "patches":
        p = 6.28 * phase
        wave = (x * 5.1 + p).sin() + (y * 5.7 - p).sin() + (z * 4.7 + 2 * p).sin()
        return wave > 0.15, wave > 1.2
    if kind == "halves":
        side = x * (2 * phase - 1) + (y - 0.5)
        return side > 0, (side > 0) & (z > 0.0) & (x > 0.0)
    if kind == "zigzag":
        level = (y * scale * 0.8 + (angle * 6 + phase).frac().sub(0.5).abs() * 1.3).remainder(3)
        return level < 2, level < 1
    if kind == "spiral":
        level = (y * scale * 0.6 + angle * 3 + phase + 10).remainder(3)
        return level < 2, level < 1
    if kind == "tartan":
        across, up = (x * scale + phase).remainder(1), (y * scale + phase).remainder(1)
        return (across < 0.3) | (up < 0.3), (across < 0.3) & (up < 0.3)
    ring = ((x * x + (y - 0.5) ** 2).sqrt() * scale * 1.5 + phase).remainder(3)  # bullseye
    return ring < 2, ring < 1


def albedo(toys: Sequence[Toy], owner: Tensor, tint: Tensor, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    """Linear r, g, b at points of `toys`: `owner` says whose (ascending), `tint` which kind of part."""
    table = torch.tensor([linear(rgb) for rgb in _TINTS])
    colours = [table[:, c].contiguous().index_select(0, tint) for c in range(3)]
    ends = torch.bincount(owner, minlength=len(toys)).cumsum(0).tolist()
    for i, toy in enumerate(toys):
        part = slice(ends[i - 1] if i else 0, ends[i])
        body = tint[part] == 0
        paint = [torch.full_like(x[part], v) for v in linear(toy.rgb)]
        if toy.pattern is not None or toy.material in ("striped", "checkered"):
            second, third = _mask(toy, x[part], y[part], z[part])
            other = toy.pattern.second if toy.pattern else companion(toy.rgb, toy.material)
            paint = [torch.where(second, v, p) for v, p in zip(linear(other), paint, strict=True)]
            if third is not None and toy.pattern is not None:
                third = third & second
                paint = [torch.where(third, v, p) for v, p in zip(linear(toy.pattern.third), paint, strict=True)]
        for c in range(3):
            colours[c][part] = torch.where(body, paint[c], colours[c][part])
    return tuple(colours)


def gloss(toys: Sequence[Toy]) -> Tensor:
    """How strongly each toy mirrors: 1 for glossy ones."""
    return torch.tensor([1.0 if toy.material == "glossy" else 0.0 for toy in toys])
