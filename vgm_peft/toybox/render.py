"""Scenes to pixels: `render` gives pictures with their exact depth, normals, instance masks and edges.

Toys are traced class by class in small groups (`trace`), laid over their background (`backdrop`) by depth on a `canvas`,
and averaged down from `supersample` rays a side. A scene's pixels never depend on what else is rendered with it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from functools import partial
from json import dumps, loads
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from vgm_peft.errors import ConfigError, DataError
from vgm_peft.toybox import canvas, styles, trace
from vgm_peft.toybox.world import Attributes, Scene, attributes, caption, draw_scene

_CHUNK = 320  # scenes on a canvas at once: enough toys of each class for the tracer, some 200 MiB


@dataclass(frozen=True)
class Rendered:
    """Pictures (B, P, Q, 3) uint8 with depth (B, P, Q) along the camera axis, normals (B, P, Q, 3) in camera axes
    (x right, y up, z towards the camera) and instance ids (B, P, Q) uint8, 0 = background."""

    image: Tensor
    depth: Tensor
    normal: Tensor
    mask: Tensor

    @property
    def edges(self) -> Tensor:
        """Outlines and creases (B, P, Q) bool, from mask, depth and normals."""
        return styles.edges(self.depth, self.normal, self.mask)


def _chunk(scenes: Sequence[Scene], size: int, supersample: int) -> Rendered:
    drawn = canvas.painted(scenes, size, supersample)
    n, s, side = len(scenes), supersample, drawn.side
    light = drawn.colour.clamp_(0, 1).view(3, n, side, side)
    total = light[:, :, ::s, ::s].clone()
    for i, j in [(i, j) for i in range(s) for j in range(s)][1:]:
        total += light[:, :, i::s, j::s]
    image = ((total / (s * s)) ** (1 / 2.2) * 255 + 0.5).to(torch.uint8).permute(1, 2, 3, 0)
    middle = s // 2
    pick = (slice(None), slice(middle, None, s), slice(middle, None, s))
    return Rendered(
        image.contiguous(),
        drawn.depth.view(n, side, side)[pick].contiguous(),
        drawn.normal.view(3, n, side, side).permute(1, 2, 3, 0)[pick].contiguous(),
        drawn.mask.view(n, side, side)[pick].contiguous(),
    )


@torch.no_grad()
def render(scenes: Sequence[Scene], size: int = 64, supersample: int = 2) -> Rendered:
    """Pictures of `scenes`, `size` pixels a side; `size * supersample` must be a multiple of 4."""
    if size * supersample % trace.BLOCK:
        raise ConfigError(
            f"size {size} x supersample {supersample}", expected=f"a multiple of {trace.BLOCK}", fix="use for example 64 x 2"
        )
    if not scenes:
        raise ConfigError("no scene to render", expected="at least one")
    parts = [_chunk(scenes[i : i + _CHUNK], size, supersample) for i in range(0, len(scenes), _CHUNK)]
    done = Rendered(*(torch.cat([getattr(p, f) for p in parts]) for f in ("image", "depth", "normal", "mask")))
    if all(scene.style is None for scene in scenes):
        return done
    image = done.image.clone()
    for i, scene in enumerate(scenes):
        if scene.style is not None:
            image[i] = styles.apply(scene.style, done.image[i], done.depth[i], done.normal[i], done.mask[i])
    return Rendered(image, done.depth, done.normal, done.mask)


@dataclass(frozen=True)
class Dataset:
    """A rendered folder: pictures (N, P, Q, 3) uint8 mapped from disk, a caption each, labels (N, 6) by `Attributes`."""

    pictures: NDArray[np.uint8]
    captions: tuple[str, ...]
    labels: NDArray[np.int8]
    seed: int

    def scene(self, index: int) -> Scene:
        """The scene of a picture, drawn again."""
        return dataset_scene(self.seed, index)


def dataset_scene(seed: int, index: int) -> Scene:
    """Scene `index` of the dataset with this seed."""
    return draw_scene(random.Random(f"{seed}/{index}"))


def _render_part(path: str, count: int, seed: int, start: int) -> int:
    torch.set_num_threads(1)
    stop = min(start + _CHUNK, count)
    pictures = np.lib.format.open_memmap(path, mode="r+")
    pictures[start:stop] = render([dataset_scene(seed, i) for i in range(start, stop)]).image.numpy()
    return stop - start


def render_dataset(directory: Path | str, count: int, seed: int, processes: int = 2, quiet: bool = False) -> Dataset:
    """Render `count` random scenes into `directory`: `pictures.npy`, `captions.json` (with the seed), `labels.npy`."""
    if count < 1:
        raise ConfigError(f"a dataset of {count} pictures", expected="at least one")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pictures.npy"
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, 64, 64, 3)).flush()
    starts = range(0, count, _CHUNK)
    work = partial(_render_part, str(path), count, seed)
    with tqdm(total=count, unit="picture", desc="rendering", disable=quiet) as bar:
        if processes < 2 or len(starts) < 2:
            for start in starts:
                bar.update(work(start))
        else:  # spawned, since a forked torch may hang
            with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
                for done in pool.map(work, starts):
                    bar.update(done)
    scenes = [dataset_scene(seed, i) for i in range(count)]
    said = [caption(scene, random.Random(f"{seed}/{i}/caption")) for i, scene in enumerate(scenes)]
    np.save(folder / "labels.npy", np.array([astuple(attributes(scene)) for scene in scenes], dtype=np.int8))
    names = [field.name for field in fields(Attributes)]
    (folder / "captions.json").write_text(dumps({"seed": seed, "labels": names, "captions": said}))
    return open_dataset(folder)


def open_dataset(directory: Path | str) -> Dataset:
    """What `render_dataset` wrote."""
    folder = Path(directory)
    if not (folder / "captions.json").is_file():
        raise DataError(
            f"{folder} holds no finished Toybox dataset", expected="captions.json and pictures.npy", fix="render it again"
        )
    said = loads((folder / "captions.json").read_text())
    pictures = np.load(folder / "pictures.npy", mmap_mode="r")
    return Dataset(pictures, tuple(said["captions"]), np.load(folder / "labels.npy"), said["seed"])
