"""The ten toys, put together from parts: the toy's own surface, and neutral pieces no palette colour is taken for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vgm_peft.toybox.shapes import (
    BODY,
    BROWN,
    CREAM,
    DARK,
    GLASS,
    GREY,
    Part,
    Shape,
    above,
    both,
    box,
    cone,
    cut,
    cylinder,
    deep,
    ellipsoid,
    gable,
    rod,
    sphere,
    torus,
)


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
