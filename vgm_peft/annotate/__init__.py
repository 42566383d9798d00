"""Annotators: what computes a control picture from the picture itself, for training and for drawing alike.

Our own need nothing but OpenCV. Those of `controlnet_aux` are imported one at a time when they are asked for; their weights
come from a folder or from the hub. A picture is RGB, (P, Q, 3) uint8, and so is what is made of it, at the same size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vgm_peft.annotate import learned, plain
from vgm_peft.errors import ConfigError, DataError, nearest

Pixels = npt.NDArray[np.uint8]
NAMES = (*plain.TABLE, *learned.TABLE)


@dataclass(frozen=True)
class Annotator:
    """One way to make control pictures; called with a picture, it returns another of the same size."""

    name: str
    identity: str
    """All that decides what it makes of a picture: code, versions, settings and weights. A cache keys what it made by it."""
    draw: Callable[[Pixels], Pixels]

    def __call__(self, picture: Pixels) -> Pixels:
        """Return the control picture. Raises `DataError` for what is no RGB picture, and where none came of it."""
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise DataError(f"{picture.dtype} {picture.shape} for {self.name}", expected="an RGB picture (P, Q, 3) of uint8")
        drawn = self.draw(picture)
        if drawn.dtype != np.uint8 or drawn.shape != picture.shape:
            raise DataError(f"{self.name} made {drawn.dtype} {drawn.shape}", expected=f"uint8 {picture.shape}")
        return np.ascontiguousarray(drawn)


def names_in(text: str) -> list[str]:
    """Return the annotators named in a text, between commas: what several control pictures in a row are made by."""
    return [name.strip() for name in text.split(",")]


def check_name(name: str) -> None:
    """Raise `ConfigError` for an unknown annotator, with the nearest known name."""
    if name not in NAMES:
        raise ConfigError(f'unknown annotator "{name}"', expected="one of " + ", ".join(NAMES), fix=nearest(name, list(NAMES)))


def open_annotator(name: str, weights: str = "", device: str = "cpu") -> Annotator:
    """Return an annotator, ready to use. `weights` is a folder or hub id, where it has any, in place of its authors'.

    Raises `ConfigError` for an unknown name or weights of one that has none, or when the package that it is from is missing;
    `DataError` for weights that are not there.
    """
    check_name(name)
    if name in plain.TABLE:
        if weights:
            raise ConfigError(f'weights "{weights}" of {name}', expected="none: it has no network")
        return Annotator(name, plain.identity(), plain.TABLE[name])
    return Annotator(name, *learned.open_detector(name, weights, device))
