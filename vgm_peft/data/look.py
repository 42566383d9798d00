"""Pictures that show the same: by their bytes, or by a small thumbnail when one was saved anew, enlarged or recoloured a bit.

Measured on the subjects and styles that come with the package (344 pairs of different pictures of one thing): the nearest
two differ by 5.1 on average and by 84 at most, of 255; a picture saved as JPEG at quality 50, halved or enlarged by at
most 3.9 and 42.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from vgm_peft.data.pictures import LOOK, Picture

MEAN, LARGEST = 4.0, 45
"""How far thumbnails of one and the same picture lie apart, in values of 0 .. 255."""
_COARSE, _ROWS = 4, 256
Looks = npt.NDArray[np.int16]


def same_bytes(pictures: Mapping[str, Picture]) -> list[list[str]]:
    """Names of pictures whose files are equal, in groups."""
    groups: dict[str, list[str]] = {}
    for name, picture in pictures.items():
        groups.setdefault(picture.digest, []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def same_look(pictures: Mapping[str, Picture]) -> list[list[str]]:
    """Names of pictures that look the same though their files differ, in groups; of equal files the first stands for all."""
    first: dict[str, str] = {}
    for name, picture in pictures.items():
        first.setdefault(picture.digest, name)
    names = list(first.values())
    if len(names) < 2:
        return []
    looks = np.array([np.frombuffer(pictures[n].look, np.uint8) for n in names], np.int16).reshape(len(names), LOOK, LOOK, 3)
    groups = {i: [name] for i, name in enumerate(names)}
    for i, j in _pairs(looks):
        if groups[i] is not groups[j]:
            groups[i] += groups[j]
            groups |= dict.fromkeys((names.index(name) for name in groups[j]), groups[i])
    return [group for i, group in groups.items() if len(group) > 1 and group[0] == names[i]]


def _pairs(looks: Looks) -> Sequence[tuple[int, int]]:
    """Pairs of near thumbnails (N, LOOK, LOOK, 3). A coarser look, whose distance is never larger, sorts most out first."""
    count, side = len(looks), LOOK // _COARSE
    fine = looks.reshape(count, -1)
    coarse = looks.reshape(count, _COARSE, side, _COARSE, side, 3).mean((2, 4)).reshape(count, -1).astype(np.float32)
    found: list[tuple[int, int]] = []
    for start in range(0, count, _ROWS):
        rows = coarse[start : start + _ROWS]
        near = np.zeros((len(rows), count), np.float32)
        for column in range(coarse.shape[1]):
            near += np.abs(rows[:, column, None] - coarse[None, :, column])
        for i, j in np.argwhere(near <= MEAN * coarse.shape[1]):
            a, b = start + int(i), int(j)
            if a < b:
                apart = np.abs(fine[a] - fine[b])
                if apart.mean() <= MEAN and apart.max() <= LARGEST:
                    found.append((a, b))
    return found
