"""The ten toys as signed-distance functions in torch: each a tuple of parts, standing on y = 0 and facing +z.

x, y and z are separate tensors of one shape (three times as fast on a CPU as a trailing axis of three). A distance may
be too small but never too large, so sphere tracing never steps through a part. Distances, about: toy heights.
Primitives after Inigo Quilez, "Distance functions" (iquilezles.org).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Sdf = Callable[[Tensor, Tensor, Tensor], Tensor]
Vec = tuple[float, float, float]

# Tints of a part: the toy's own surface, or a neutral that cannot be taken for a palette colour.
BODY, DARK, GREY, CREAM, BROWN, GLASS = range(6)


@dataclass(frozen=True)
class Part:
    """A piece of a toy with one tint."""

    tint: int
    sdf: Sdf


@dataclass(frozen=True)
class Shape:
    """A toy: its parts, and a sphere around all of them (height of its centre, radius)."""

    parts: tuple[Part, ...]
    middle: float
    radius: float

    def distance(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Distance to the nearest part."""
        nearest = self.parts[0].sdf(x, y, z)
        for part in self.parts[1:]:
            nearest = torch.minimum(nearest, part.sdf(x, y, z))
        return nearest

    def tint(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Tint (int64) of the nearest part."""
        nearest = self.parts[0].sdf(x, y, z)
        tint = torch.full_like(nearest, self.parts[0].tint)
        for part in self.parts[1:]:
            other = part.sdf(x, y, z)
            closer = other < nearest
            nearest = torch.where(closer, other, nearest)
            tint = torch.where(closer, torch.full_like(tint, part.tint), tint)
        return tint.long()


def _length(*parts: Tensor) -> Tensor:
    total = parts[0] * parts[0]
    for part in parts[1:]:
        total = torch.addcmul(total, part, part)
    return total.sqrt_()


def _from(v: Tensor, c: float) -> Tensor:
    """v - c; small tensors are all overhead, so nothing is subtracted for 0."""
    return v - c if c else v


def sphere(c: Vec, r: float) -> Sdf:
    """A ball."""
    return lambda x, y, z: _length(_from(x, c[0]), _from(y, c[1]), _from(z, c[2])).sub_(r)


def ellipsoid(c: Vec, r: Vec) -> Sdf:
    """A stretched ball (Quilez's estimate, kept a little short)."""

    def sdf(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        x, y, z = (_from(x, c[0])) * (1 / r[0]), (_from(y, c[1])) * (1 / r[1]), (_from(z, c[2])) * (1 / r[2])
        k0 = _length(x, y, z)
        k1 = _length(x * (1 / r[0]), y * (1 / r[1]), z * (1 / r[2])).clamp_min_(1e-6)
        return (k0 - 1).mul_(k0).div_(k1).mul_(0.95)

    return sdf


def box(c: Vec, half: Vec, r: float = 0.03) -> Sdf:
    """A box with edges rounded by `r`; `half` is its outer half size."""
    a, b, d = (h - r for h in half)

    def sdf(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        qx = (_from(x, c[0])).abs().sub_(a).clamp_min_(0)
        qy = (_from(y, c[1])).abs().sub_(b).clamp_min_(0)
        qz = (_from(z, c[2])).abs().sub_(d).clamp_min_(0)
        return _length(qx, qy, qz).sub_(r)

    return sdf


def cylinder(c: Vec, radius: float, half: float, r: float = 0.02, axis: str = "y") -> Sdf:
    """A rounded cylinder along an axis."""

    def sdf(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        x, y, z = _from(x, c[0]), _from(y, c[1]), _from(z, c[2])
        along, u, v = {"x": (x, y, z), "y": (y, x, z), "z": (z, x, y)}[axis]
        across = _length(u, v).sub_(radius - r).clamp_min_(0)
        return _length(across, along.abs().sub_(half - r).clamp_min_(0)).sub_(r)

    return sdf


def cone(base: float, height: float, radius: float, top: float = 0.0, r: float = 0.02) -> Sdf:
    """An upright cone frustum on the axis, from y = `base`; `top` is its upper radius."""
    slope = (radius - top) / height
    norm = (1 + slope * slope) ** -0.5

    def sdf(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        side = (_length(x, z).sub_(radius - r).add_(y - base, alpha=slope)).mul_(norm)
        caps = (y - (base + height / 2)).abs_().sub_(height / 2 - r)
        return _length(side.clamp_min_(0), caps.clamp_min_(0)).sub_(r)

    return sdf


def rod(a: Vec, b: Vec, r: float) -> Sdf:
    """A capsule from `a` to `b`."""
    ba = (b[0] - a[0], b[1] - a[1], b[2] - a[2])
    inv = 1 / sum(v * v for v in ba)

    def sdf(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        x, y, z = x - a[0], y - a[1], z - a[2]
        h = (x * (ba[0] * inv)).add_(y, alpha=ba[1] * inv).add_(z, alpha=ba[2] * inv).clamp_(0, 1)
        return _length(x - h * ba[0], y - h * ba[1], z - h * ba[2]).sub_(r)

    return sdf


def torus(c: Vec, ring: float, r: float) -> Sdf:
    """A ring in the x-y plane."""

    def sdf(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return _length(_length(_from(x, c[0]), _from(y, c[1])).sub_(ring), _from(z, c[2])).sub_(r)

    return sdf


def cut(solid: Sdf, hole: Sdf) -> Sdf:
    """`solid` without `hole`."""
    return lambda x, y, z: torch.maximum(solid(x, y, z), hole(x, y, z).neg_())


def above(solid: Sdf, height: float) -> Sdf:
    """What of `solid` lies above y = `height`."""
    return lambda x, y, z: torch.maximum(solid(x, y, z), height - y)


def both(sdf: Sdf) -> Sdf:
    """`sdf` on the +x side and its mirror image."""
    return lambda x, y, z: sdf(x.abs(), y, z)


def deep(sdf: Sdf) -> Sdf:
    """`sdf` on the +z side and its mirror image."""
    return lambda x, y, z: sdf(x, y, z.abs())


def gable(c: Vec, half: Vec) -> Sdf:
    """A roof prism: ridge along x, `c` the middle of its eaves, `half` (x, height, z)."""
    norm = (half[1] ** 2 + half[2] ** 2) ** -0.5

    def sdf(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        y = _from(y, c[1])
        slant = ((_from(z, c[2])).abs().sub_(half[2]).mul_(half[1]).add_(y, alpha=half[2])).mul_(norm)
        ends = (_from(x, c[0])).abs().sub_(half[0])
        return torch.maximum(torch.maximum(slant, ends), -0.04 - y)

    return sdf


def _tail(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """A fish's tail fin: a flat wedge widening backwards."""
    side = ((y - 0.55).abs_().add_(x + 0.3, alpha=0.75)).mul_(0.8)
    return torch.maximum(torch.maximum(side, -0.66 - x), z.abs().sub_(0.05)).sub_(0.02)


ROBOT = Shape(
    (
        Part(BODY, box((0, 0.46, 0), (0.28, 0.24, 0.2), 0.05)),
        Part(BODY, box((0, 0.94, 0), (0.23, 0.18, 0.19), 0.05)),
        Part(GREY, cylinder((0, 0.73, 0), 0.09, 0.06)),
        Part(DARK, both(box((0.14, 0.11, 0.03), (0.1, 0.11, 0.14), 0.03))),
        Part(GREY, both(rod((0.36, 0.62, 0), (0.42, 0.34, 0.06), 0.07))),
        Part(DARK, both(sphere((0.1, 0.98, 0.18), 0.06))),
        Part(DARK, box((0, 0.85, 0.19), (0.11, 0.025, 0.02), 0.01)),
        Part(GREY, cylinder((0, 1.18, 0), 0.022, 0.08)),
        Part(GREY, sphere((0, 1.28, 0), 0.055)),
    ),
    0.66,
    0.74,
)
DUCK = Shape(
    (
        Part(BODY, ellipsoid((-0.08, 0.36, 0), (0.5, 0.35, 0.34))),
        Part(BODY, sphere((0.2, 0.84, 0), 0.27)),
        Part(BODY, ellipsoid((-0.5, 0.56, 0), (0.17, 0.12, 0.16))),
        Part(BODY, deep(ellipsoid((-0.12, 0.42, 0.27), (0.27, 0.17, 0.12)))),
        Part(BROWN, ellipsoid((0.5, 0.78, 0), (0.17, 0.07, 0.14))),
        Part(DARK, deep(sphere((0.3, 0.92, 0.21), 0.055))),
    ),
    0.55,
    0.78,
)
CAR = Shape(
    (
        Part(BODY, box((0, 0.33, 0), (0.66, 0.17, 0.31), 0.08)),
        Part(GLASS, box((-0.06, 0.6, 0), (0.36, 0.16, 0.26), 0.06)),
        Part(BODY, box((-0.06, 0.75, 0), (0.33, 0.05, 0.27), 0.04)),
        Part(DARK, both(deep(cylinder((0.37, 0.18, 0.28), 0.18, 0.07, 0.03, "z")))),
        Part(GREY, both(deep(cylinder((0.37, 0.18, 0.33), 0.085, 0.03, 0.01, "z")))),
        Part(CREAM, deep(sphere((0.63, 0.37, 0.18), 0.07))),
    ),
    0.4,
    0.76,
)
HOUSE = Shape(
    (
        Part(BODY, box((0, 0.33, 0), (0.46, 0.35, 0.38), 0.02)),
        Part(DARK, gable((0, 0.7, 0), (0.53, 0.4, 0.48))),
        Part(BROWN, box((0, 0.22, 0.375), (0.1, 0.22, 0.025), 0.01)),
        Part(GLASS, both(box((0.29, 0.4, 0.375), (0.09, 0.1, 0.025), 0.01))),
        Part(GREY, box((0.28, 0.98, -0.12), (0.07, 0.2, 0.07), 0.01)),
    ),
    0.52,
    0.78,
)
MUSHROOM = Shape(
    (
        Part(BODY, above(ellipsoid((0, 0.5, 0), (0.58, 0.58, 0.58)), 0.5)),
        Part(CREAM, cone(0.0, 0.56, 0.25, 0.19, 0.05)),
        Part(CREAM, sphere((0.02, 0.78, 0.46), 0.13)),
        Part(CREAM, both(sphere((0.42, 0.68, 0.28), 0.12))),
        Part(CREAM, sphere((-0.2, 1.0, 0.16), 0.11)),
        Part(CREAM, sphere((0.22, 0.98, -0.02), 0.11)),
    ),
    0.52,
    0.76,
)
ROCKET = Shape(
    (
        Part(BODY, ellipsoid((0, 0.74, 0), (0.28, 0.62, 0.28))),
        Part(DARK, both(box((0.27, 0.26, 0), (0.11, 0.22, 0.035), 0.02))),
        Part(DARK, deep(box((0, 0.26, 0.27), (0.035, 0.22, 0.11), 0.02))),
        Part(GREY, cone(0.06, 0.2, 0.2, 0.12)),
        Part(GREY, cylinder((0, 0.9, 0.2), 0.135, 0.07, 0.02, "z")),
        Part(GLASS, sphere((0, 0.9, 0.2), 0.115)),
    ),
    0.68,
    0.74,
)
MUG = Shape(
    (
        Part(BODY, cut(cylinder((-0.08, 0.46, 0), 0.42, 0.46, 0.04), cylinder((-0.08, 0.7, 0), 0.36, 0.5, 0.02))),
        Part(BODY, torus((0.4, 0.48, 0), 0.22, 0.065)),
        Part(BROWN, cylinder((-0.08, 0.7, 0), 0.37, 0.02, 0.01)),
    ),
    0.46,
    0.78,
)
TREE = Shape(
    (
        Part(BODY, cone(0.24, 0.46, 0.54, 0.1, 0.03)),
        Part(BODY, cone(0.56, 0.42, 0.44, 0.07, 0.03)),
        Part(BODY, cone(0.86, 0.46, 0.33, 0.0, 0.03)),
        Part(BROWN, cylinder((0, 0.13, 0), 0.12, 0.14)),
    ),
    0.6,
    0.78,
)
SNOWMAN = Shape(
    (
        Part(BODY, sphere((0, 0.32, 0), 0.36)),
        Part(BODY, sphere((0, 0.76, 0), 0.27)),
        Part(BODY, sphere((0, 1.08, 0), 0.2)),
        Part(DARK, cylinder((0, 1.23, 0), 0.23, 0.025, 0.01)),
        Part(DARK, cylinder((0, 1.34, 0), 0.15, 0.12, 0.02)),
        Part(DARK, both(sphere((0.075, 1.13, 0.175), 0.032))),
        Part(BROWN, rod((0, 1.06, 0.18), (0, 1.04, 0.34), 0.035)),
        Part(DARK, sphere((0, 0.82, 0.265), 0.036)),
        Part(DARK, sphere((0, 0.68, 0.26), 0.036)),
        Part(BROWN, both(rod((0.22, 0.82, 0), (0.5, 0.98, 0.04), 0.03))),
    ),
    0.7,
    0.8,
)
FISH = Shape(
    (
        Part(BODY, ellipsoid((0.08, 0.55, 0), (0.5, 0.34, 0.2))),
        Part(BODY, _tail),
        Part(BODY, ellipsoid((0.0, 0.86, 0), (0.22, 0.13, 0.05))),
        Part(BODY, deep(ellipsoid((0.02, 0.46, 0.2), (0.13, 0.07, 0.06)))),
        Part(CREAM, deep(sphere((0.34, 0.64, 0.12), 0.085))),
        Part(DARK, deep(sphere((0.36, 0.645, 0.175), 0.05))),
        Part(GREY, cylinder((0.04, 0.14, 0), 0.035, 0.16, 0.01)),
        Part(GREY, cylinder((0.04, 0.025, 0), 0.2, 0.03, 0.02)),
    ),
    0.5,
    0.74,
)

SHAPES: Mapping[str, Shape] = {
    "robot": ROBOT,
    "duck": DUCK,
    "car": CAR,
    "house": HOUSE,
    "mushroom": MUSHROOM,
    "rocket": ROCKET,
    "mug": MUG,
    "tree": TREE,
    "snowman": SNOWMAN,
    "fish": FISH,
}
