"""The Toybox's yardsticks: what a picture shows, whose toy it is, its style, and whether it follows a control picture.

Their weights (`assets/oracles/oracles.safetensors`) are trained by `python -m vgm_peft.toybox train-oracles`, which
also measures each on fresh renders first (`card.json`): a yardstick is only worth its own accuracy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from vgm_peft.errors import BaseModelError, DataError
from vgm_peft.toybox.assets import asset_folder
from vgm_peft.toybox.oracle_net import HEADS, Controls, Identity, Reader, to_input

Pictures = Tensor | Sequence[Image.Image]
WEIGHTS, CARD = "oracles.safetensors", "card.json"


def as_tensor(images: Pictures) -> Tensor:
    """Pictures as uint8 (B, P, Q, 3)."""
    if isinstance(images, Tensor):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            shape = "x".join(map(str, images.shape))
            raise DataError(f"pictures of {images.dtype} {shape}", expected="a uint8 tensor (B, P, Q, 3)")
        return images
    if not images:
        raise DataError("no pictures to look at", expected="at least one")
    arrays = [np.asarray(image.convert("RGB")) for image in images]
    if len({array.shape for array in arrays}) > 1:
        raise DataError("pictures of different sizes", expected="one size", fix="measure them one by one")
    return torch.from_numpy(np.stack(arrays))


@dataclass(frozen=True)
class Reading:
    """What the reader saw: by head (`HEADS`) the most likely label (B,) and all probabilities (B, values)."""

    labels: Mapping[str, Tensor]
    probabilities: Mapping[str, Tensor]

    def words(self, head: str) -> tuple[str, ...]:
        """The labels of a head as words."""
        return tuple(HEADS[head][i] for i in cast(list[int], self.labels[head].tolist()))


@dataclass(frozen=True)
class Agreement:
    """How well pictures follow their controls, each (B,): depth correlation -1..1, mask IoU and edge F1 0..1."""

    depth: Tensor
    mask: Tensor
    edges: Tensor


def likeness(a: Tensor, b: Tensor) -> Tensor:
    """Mean cosine of each embedding in `a` with the third of `b` that is nearest: references show other sides, too."""
    cosines = a @ b.T
    return cosines.topk(max(1, round(cosines.shape[1] / 3)), 1).values.mean(1)


@dataclass(frozen=True)
class Oracles:
    """The three trained networks; `span` is the likeness of look-alikes and of one toy across scenes."""

    reader: Reader
    embedder: Identity
    controls: Controls
    span: tuple[float, float]

    @staticmethod
    def load(folder: Path | str | None = None) -> Oracles:
        """The trained oracles of the project, or those in `folder`."""
        path = (asset_folder("oracles", WEIGHTS) if folder is None else Path(folder)) / WEIGHTS
        if not path.is_file():
            raise BaseModelError(f"no oracles in {path.parent}", expected=WEIGHTS)
        state = load_file(path)
        span = cast(list[float], state.pop("span").tolist())
        nets: dict[str, nn.Module] = {"reader": Reader(), "embedder": Identity(), "controls": Controls()}
        for name, net in nets.items():
            part = {k.removeprefix(name + "."): v for k, v in state.items() if k.startswith(name + ".")}
            net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in part.items()})
            net.eval().requires_grad_(False)
        return Oracles(
            cast(Reader, nets["reader"]),
            cast(Identity, nets["embedder"]),
            cast(Controls, nets["controls"]),
            (span[0], span[1]),
        )

    @torch.no_grad()
    def read(self, images: Pictures) -> Reading:
        """Class, colour, material, background, position, size and style of the toy in each picture."""
        parts = [self.reader(to_input(chunk)) for chunk in as_tensor(images).split(256)]
        chances = {name: torch.cat([part[name] for part in parts]).softmax(1) for name in HEADS}
        return Reading({name: p.argmax(1) for name, p in chances.items()}, chances)

    @torch.no_grad()
    def embed(self, images: Pictures) -> Tensor:
        """Unit vectors (B, 64) of the toys in the pictures."""
        return torch.cat([self.embedder(to_input(chunk)) for chunk in as_tensor(images).split(256)])

    def identity(self, images: Pictures, references: Pictures) -> Tensor:
        """How surely each picture (B,) shows the toy of the references, 0..1.

        Linear in the cosine with the nearest third of the references: 0 is what look-alikes of one class reach, 1 what
        one toy reaches across scenes, on average.
        """
        low, high = self.span
        return ((likeness(self.embed(images), self.embed(references)) - low) / (high - low)).clamp(0, 1)

    def style(self, images: Pictures) -> tuple[str, ...]:
        """The style of each picture: "render" or one of the four."""
        return self.read(images).words("style")

    @torch.no_grad()
    def see(self, images: Pictures) -> Tensor:
        """Nearness, mask and edges (B, 3, 64, 64) in 0..1 as far as they can be read from pictures."""
        parts = [self.controls(to_input(chunk)) for chunk in as_tensor(images).split(128)]
        return torch.cat(parts).sigmoid()

    def agreement(self, images: Pictures, controls: Tensor) -> Agreement:
        """How well pictures follow nearness, mask and edges (B, 3, 64, 64) in 0..1."""
        return agreement(self.see(images), controls)

    @staticmethod
    def card(folder: Path | str | None = None) -> dict[str, object]:
        """What the oracles measured about themselves."""
        text = ((asset_folder("oracles", WEIGHTS) if folder is None else Path(folder)) / CARD).read_text()
        return cast(dict[str, object], json.loads(text))


def agreement(seen: Tensor, wanted: Tensor) -> Agreement:
    """Compare two sets of controls (B, 3, 64, 64) in 0..1; an edge one pixel aside still counts."""
    a, b = (c[:, 0].flatten(1).double() for c in (seen, wanted))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    depth = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-9)
    m, n = seen[:, 1] > 0.5, wanted[:, 1] > 0.5
    mask = (m & n).sum((1, 2)) / (m | n).sum((1, 2)).clamp_min(1)
    e, f = (seen[:, 2] > 0.5).float(), (wanted[:, 2] > 0.5).float()
    near_e, near_f = (nn.functional.max_pool2d(x[:, None], 3, 1, 1)[:, 0] for x in (e, f))
    precision = (e * near_f).sum((1, 2)) / e.sum((1, 2)).clamp_min(1)
    recall = (f * near_e).sum((1, 2)) / f.sum((1, 2)).clamp_min(1)
    return Agreement(depth.float(), mask.float(), 2 * precision * recall / (precision + recall).clamp_min(1e-9))
