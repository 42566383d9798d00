"""Control pictures by plain image processing, with OpenCV. What is measured in pixels is meant at 512 a side and scales.

Sources: canny at 100 and 200 as for the ControlNet of that name (Zhang et al. 2023, arXiv 2302.05543); scribbles as lines so
thick that only their course counts; the grid of mean colours of T2I-Adapter (Mou et al. 2023, arXiv 2302.08453, section 3.3);
tile as down and up by eight; standard line art as how much darker a pixel is than what lies around it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import cv2
import numpy as np
import numpy.typing as npt

from vgm_peft.digests import digest_of_file

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_SIDE = 512
_CANNY = (100, 200)
_COARSE = 8
"""By how much `tile` is brought down; and cells of `colour` along a short side of 512 pixels."""


def identity() -> str:
    """Return what decides what all of them draw: this code, and the versions of what it calls."""
    return f"{digest_of_file(Path(__file__))[:16]}, opencv {cv2.__version__}, numpy {np.__version__}"


def canny(picture: Pixels) -> Pixels:
    """Edges of Canny's detector, white on black."""
    return _three(cv2.Canny(picture, *_CANNY))


def softedge(picture: Pixels) -> Pixels:
    """The steepness of the lightly blurred picture, bright where it is steep; the steepest hundredth is white."""
    blurred = _blurred(picture.astype(np.float32), 1.5)
    steep = cast(Floats, np.hypot(cv2.Scharr(blurred, cv2.CV_32F, 1, 0), cv2.Scharr(blurred, cv2.CV_32F, 0, 1)).max(2))
    return _three(_bytes(steep * (255.0 / max(float(np.percentile(steep, 99)), 16.0))))


def scribble(picture: Pixels) -> Pixels:
    """The main outlines as thick white strokes on black."""
    low, high = _CANNY
    outlines = cv2.Canny(_bytes(_blurred(picture.astype(np.float32), 3.0)), low // 2, high // 2)
    width = max(2, round(5 * _scale(picture)))
    return _three(cv2.dilate(outlines, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))))


def colour(picture: Pixels) -> Pixels:
    """Mean colours in a grid of cells of 64 pixels, eight along the short side of a smaller picture."""
    height, width = picture.shape[:2]
    cell = min(_SIDE, height, width) / _COARSE
    grid = cv2.resize(picture, (max(1, round(width / cell)), max(1, round(height / cell))), interpolation=cv2.INTER_AREA)
    return _like(grid, picture, cv2.INTER_NEAREST)


def grey(picture: Pixels) -> Pixels:
    """The picture without its colours."""
    return _three(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY))


def tile(picture: Pixels) -> Pixels:
    """The picture brought down to an eighth and up again: what is left for a network that adds detail."""
    size = [max(1, round(side / _COARSE)) for side in picture.shape[1::-1]]
    return _like(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), picture, cv2.INTER_CUBIC)


def lineart_standard(picture: Pixels) -> Pixels:
    """Dark lines as bright ones on black: by how much the channel that says least is darker than what lies around."""
    floats = picture.astype(np.float32)
    darker = cast(Floats, (_blurred(floats, 6.0) - floats).min(2).clip(0.0))
    strong = darker[darker > 8.0]
    middle = float(np.median(strong)) if strong.size else 0.0
    return _three(_bytes(darker * (127.0 / max(16.0, middle))))


TABLE: Mapping[str, Callable[[Pixels], Pixels]] = {
    "canny": canny,
    "softedge": softedge,
    "scribble": scribble,
    "colour": colour,
    "grey": grey,
    "tile": tile,
    "lineart-standard": lineart_standard,
}


def _scale(picture: npt.NDArray[np.generic]) -> float:
    return min(picture.shape[:2]) / _SIDE


def _blurred(picture: Floats, sigma: float) -> Floats:
    return cast(Floats, cv2.GaussianBlur(picture, (0, 0), max(0.3, sigma * _scale(picture))))


def _like(small: npt.NDArray[np.generic], picture: Pixels, how: int) -> Pixels:
    return cast(Pixels, cv2.resize(cast(Pixels, small), (picture.shape[1], picture.shape[0]), interpolation=how))


def _bytes(values: Floats) -> Pixels:
    return np.rint(values.clip(0.0, 255.0)).astype(np.uint8)


def _three(plane: npt.NDArray[np.generic]) -> Pixels:
    return np.repeat(plane[..., None].astype(np.uint8), 3, axis=2)
