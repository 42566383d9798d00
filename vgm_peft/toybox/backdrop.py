"""The six backgrounds: colour of the ground and of what is above the horizon, for rays of one scene."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Mood:
    """How a background lights the toys: key and ambient strength with a linear tint each, and shadow depth."""

    key: float
    ambient: float
    tint: tuple[float, float, float]
    shadow: float


MOODS = {
    "studio": Mood(0.78, 0.42, (1.0, 1.0, 1.0), 0.5),
    "grass": Mood(0.8, 0.4, (0.97, 1.0, 0.99), 0.6),
    "sand": Mood(0.82, 0.4, (1.02, 1.0, 0.95), 0.5),
    "night": Mood(0.6, 0.34, (0.9, 0.94, 1.08), 0.55),
    "sky": Mood(0.8, 0.44, (0.97, 1.0, 1.03), 0.38),
    "wood": Mood(0.78, 0.4, (1.02, 1.0, 0.96), 0.55),
}


_TILE = 8.0  # world units after which a texture repeats
_TEXELS = 512


def _noise(cells: int, salt: int, stretch: int = 1) -> Tensor:
    """Smooth periodic value noise (_TEXELS, _TEXELS) in 0..1 with `cells` cells a tile (`cells * stretch` across)."""
    rng = random.Random(salt)
    table = torch.tensor([[rng.random() for _ in range(cells * stretch)] for _ in range(cells)])

    def spread(t: Tensor, n: int) -> Tensor:
        place = torch.arange(_TEXELS) * (n / _TEXELS)
        i = place.floor().long()
        f = place - i
        f = f * f * (3 - 2 * f)
        return torch.lerp(t[i], t[(i + 1) % n], f[:, None])

    return spread(spread(table, cells).T.contiguous(), cells * stretch).T.contiguous()


def _mix(a: tuple[float, float, float], b: tuple[float, float, float], t: Tensor) -> Tensor:
    return torch.stack([x + (y - x) * t for x, y in zip(a, b, strict=True)])


def _ground_texture(kind: str) -> Tensor:
    """Linear colour (3, rows z, columns x) of a tile of ground."""
    if kind == "studio":
        return torch.full((3, _TEXELS, _TEXELS), 0.54)
    if kind == "grass":
        return _mix((0.07, 0.22, 0.03), (0.2, 0.45, 0.07), 0.65 * _noise(72, 1) + 0.35 * _noise(18, 2))
    if kind == "sand":
        wind = torch.arange(_TEXELS)[:, None] * (2 * math.pi * 11 / _TEXELS) + 2.5 * _noise(10, 3)
        return _mix((0.58, 0.41, 0.2), (0.76, 0.58, 0.33), 0.3 + 0.3 * wind.sin() + 0.4 * _noise(48, 4))
    if kind == "night":
        return _mix((0.012, 0.016, 0.05), (0.03, 0.04, 0.11), _noise(16, 5))
    if kind == "sky":
        puffs = ((0.6 * _noise(12, 6) + 0.4 * _noise(27, 7)) * 2.6 - 0.8).clamp(0, 1)
        return _mix((0.32, 0.56, 0.86), (0.88, 0.92, 0.97), puffs)
    rng = random.Random(8)
    planks = torch.tensor([rng.random() for _ in range(20)])
    across = torch.arange(_TEXELS) * (20 / _TEXELS)
    shade = 0.55 * planks[across.long()] + 0.45 * _noise(11, 9, stretch=10)
    seam = torch.where((across.frac() - 0.5).abs() > 0.46, 0.4, 1.0)
    return _mix((0.27, 0.12, 0.045), (0.47, 0.24, 0.1), shade) * seam


def _sky_texture(kind: str) -> Tensor:
    """How white (1, rows, columns) the sky is: clouds or stars. A tile is 2 high and 2 wide as tangents of angles."""
    if kind == "sky":
        return ((_noise(22, 10) * 0.7 + _noise(48, 11) * 0.3) * 3 - 1.35).clamp(0, 1)[None]
    sky = torch.zeros(_TEXELS, _TEXELS)
    if kind != "night":
        return sky[None]
    # Few, large stars: small ones vanish at 64 pixels and cost a VAE dearly.
    rng = random.Random(12)
    rows, columns = torch.arange(_TEXELS)[:, None] + 0.5, torch.arange(_TEXELS)[None] + 0.5
    cell = _TEXELS // 12
    for i in range(12):
        for j in range(12):
            if rng.random() < 0.55:
                radius = cell * rng.uniform(0.13, 0.23)
                y, x = (i + rng.uniform(0.3, 0.7)) * cell, (j + rng.uniform(0.3, 0.7)) * cell
                far = ((rows - y) ** 2 + (columns - x) ** 2).sqrt()
                sky = torch.maximum(sky, ((radius - far) / 3).clamp(0, 1))
    return sky[None]


@cache
def _texture(kind: str, which: str) -> Tensor:
    tile = _ground_texture(kind) if which == "ground" else _sky_texture(kind)
    return F.pad(tile[None], (0, 1, 0, 1), mode="circular")


def _sample(texture: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The texture at (u, v) in tiles: (channels, N)."""
    place = torch.stack((u - u.floor(), v - v.floor()), -1).mul_(2).sub_(1)
    return F.grid_sample(texture, place[None, None], align_corners=True)[0, :, 0]


_SKY: dict[str, tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]] = {
    # at the horizon, overhead, clouds or stars
    "studio": ((0.62, 0.62, 0.63), (0.5, 0.5, 0.52), (1, 1, 1)),
    "grass": ((0.75, 0.87, 0.95), (0.42, 0.66, 0.92), (1, 1, 1)),
    "sand": ((0.93, 0.87, 0.78), (0.66, 0.8, 0.88), (1, 1, 1)),
    "night": ((0.04, 0.06, 0.2), (0.008, 0.012, 0.06), (0.95, 0.93, 0.8)),
    "sky": ((0.4, 0.65, 0.92), (0.1, 0.33, 0.76), (0.95, 0.96, 0.98)),
    "wood": ((0.72, 0.62, 0.47), (0.8, 0.71, 0.56), (1, 1, 1)),
}


def _column(rgb: tuple[float, float, float]) -> Tensor:
    return torch.tensor(rgb)[:, None]


def paint(
    kind: str, origin: tuple[float, float, float], place: tuple[float, float], rays: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Linear colour (3, N) and distance (N; 0 above the horizon) of what rays from `origin` meet behind the toys.

    The rays come in rows from the top of the picture, the camera is level: the horizon is one row.
    """
    dx, dy, dz = rays
    horizon, overhead, cloud = (_column(c) for c in _SKY[kind])
    split = int((dy >= -1e-3).sum())  # rows from the top: a level camera sees all of the sky first
    t = -origin[1] / dy[split:]
    x, z = origin[0] + t * dx[split:] + place[0], origin[2] + t * dz[split:] + place[1]
    low = _sample(_texture(kind, "ground"), x / _TILE, z / _TILE)
    haze = 1 - (-(t - 3).clamp_min(0) * (0.3 if kind == "studio" else 0.12)).exp()
    low = low + (horizon - low) * haze
    side, height = dx[:split] / -dz[:split], dy[:split] / -dz[:split]
    high = horizon + (overhead - horizon) * (height * 2.2).clamp(0, 1)
    if kind in ("sky", "night"):
        white = _sample(_texture(kind, "sky"), side * 0.5 + place[0], height * 0.5 + place[1])
        high = high + (cloud - high) * white
    return torch.cat((high, low), 1), torch.cat((torch.zeros_like(side), t))
