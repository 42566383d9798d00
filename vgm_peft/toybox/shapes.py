"""Signed-distance functions in torch: primitives, and toys as tuples of parts standing on y = 0 and facing +z.

x, y and z are separate tensors of one shape (three times as fast on a CPU as a trailing axis of three). A distance may
be too small but never too large, so sphere tracing never steps through a part. Distances, about: toy heights.
Primitives after Inigo Quilez, "Distance functions" (iquilezles.org).
"""

from __future__ import annotations

from collections.abc import Callable
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
