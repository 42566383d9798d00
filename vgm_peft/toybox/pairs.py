"""Rendered scenes with exact control pictures, as a folder that side networks learn from.

`0001.png` with its caption and `control/0001.png` in `metadata.jsonl`, which Hugging Face's image folders read as well.
Scenes and captions are drawn as for the base's own training, from a seed of their own: none is one that a base, an oracle or
a judgement has drawn.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from vgm_peft.data.look import same_look
from vgm_peft.data.pictures import examine
from vgm_peft.errors import ConfigError, SaveError, nearest
from vgm_peft.toybox.drawing import draw_scene
from vgm_peft.toybox.nouns import Scene
from vgm_peft.toybox.oracle_data import controls_of
from vgm_peft.toybox.render import Rendered, render
from vgm_peft.toybox.world import caption

_TOGETHER = 320
CONTROL, METADATA = "control", "metadata.jsonl"


def _plane(index: int) -> Callable[[Rendered], Tensor]:
    return lambda drawn: _bytes(controls_of(drawn)[:, index, :, :, None].expand(-1, -1, -1, 3))


def _bytes(values: Tensor) -> Tensor:
    return (values * 255.0).round().to(torch.uint8)


CONTROLS: Mapping[str, Callable[[Rendered], Tensor]] = {
    "depth": _plane(0),
    "normals": lambda drawn: _bytes((drawn.normal + 1.0) / 2.0),
    "mask": _plane(1),
    "edges": _plane(2),
}
"""Control pictures (B, P, Q, 3) uint8 of renders: bright is near; normals in camera axes (x right, y up, z towards it) as
-1 .. 1; white toys on black; white outlines and creases on black."""


def pair_scene(seed: int, index: int) -> tuple[Scene, str]:
    """Scene `index` of the pairs with this seed, and its caption, said in one of the ways the base has learned."""
    rng = random.Random(f"pairs {seed}/{index}")
    scene = draw_scene(rng)
    return scene, caption(scene, rng)


def write_pairs(folder: Path | str, kind: str, count: int, seed: int = 0, size: int = 64) -> Path:
    """Write `count` pictures of `size` pixels a side with control pictures of a kind of `CONTROLS`, or of several kinds
    between commas side by side; returns the folder.

    Raises `ConfigError` for an unknown kind, `SaveError` for a folder that cannot be written or holds something else.
    """
    kinds = kind.split(",")
    for name in kinds:
        if name not in CONTROLS:
            raise ConfigError(f'no control picture "{name}"', expected=", ".join(CONTROLS), fix=nearest(name, list(CONTROLS)))
    if count < 1:
        raise ConfigError(f"{count} pairs", expected="at least one")
    folder, digits = Path(folder), max(4, len(str(count)))
    pairs = {f"{i + 1:0{digits}d}.png": pair_scene(seed, i) for i in range(count)}
    _check_free(folder, {*pairs, CONTROL, METADATA})
    try:
        (folder / CONTROL).mkdir(parents=True, exist_ok=True)
        new = pairs
        further = itertools.count(count)
        while new:
            _draw(folder, kinds, {name: scene for name, (scene, _) in new.items()}, size)
            new = {name: pair_scene(seed, next(further)) for name in _repeated(folder, pairs)}
            pairs |= new
        rows = [{"file_name": name, "text": text, "control": f"{CONTROL}/{name}"} for name, (_, text) in pairs.items()]
        (folder / METADATA).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise SaveError(f"{folder}: {error.strerror or error}", fix="choose a folder that can be written") from error
    return folder


def _draw(folder: Path, kinds: Sequence[str], scenes: Mapping[str, Scene], size: int) -> None:
    names = list(scenes)
    for start in range(0, len(names), _TOGETHER):
        part = names[start : start + _TOGETHER]
        drawn = render([scenes[name] for name in part], size)
        controls = torch.cat([CONTROLS[kind](drawn) for kind in kinds], dim=2)
        for name, image, control in zip(part, drawn.image, controls, strict=True):
            Image.fromarray(image.numpy()).save(folder / name)
            Image.fromarray(control.numpy()).save(folder / CONTROL / name)


def _repeated(folder: Path, names: Iterable[str]) -> list[str]:
    """Pictures that by chance look like one before them (some three in 3000, mostly at night): training would refuse them."""
    groups = same_look({name: examine(folder / name) for name in names})
    return [name for group in groups for name in group[1:]]


def _check_free(folder: Path, ours: set[str]) -> None:
    """Refuse a folder in which something else would be taken for a part of the set."""
    if not folder.is_dir():
        return
    inside = folder / CONTROL
    found = [p.name for p in folder.iterdir()] + [p.name for p in (inside.iterdir() if inside.is_dir() else ())]
    other = sorted(set(found) - ours)
    if other:
        raise SaveError(f"{folder} holds {other[0]} already", expected="an empty folder", fix="choose another, or empty it")
