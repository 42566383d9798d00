"""The networks of the oracles: small convolutional readers of 64x64 pictures.

All three see the picture as 12 channels of 32x32 (2x2 pixels each), which is four times cheaper and loses nothing.
Shapes: B pictures, P x Q pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as nf

from vgm_peft.toybox.nouns import BACKGROUNDS, CLASSES, COLOURS, MATERIALS, POSITIONS, SIZES, STYLES

HEADS: dict[str, tuple[str, ...]] = {
    "class": CLASSES,
    "colour": tuple(COLOURS),
    "material": MATERIALS,
    "background": BACKGROUNDS,
    "position": POSITIONS,
    "size": SIZES,
    "style": ("render", *STYLES),
}
WIDTH = 128
EMBEDDING = 64


def _layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Trunk(nn.Module):
    """Pictures (B, 3, 64, 64) in -1..1 to features: what is there (B, 2 * WIDTH) and where (B, 8 * 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.PixelUnshuffle(2), _layer(12, 48, 2), _layer(48, 64), _layer(64, 96, 2), _layer(96, WIDTH))
        self.where = nn.Conv2d(WIDTH, 32, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        h: Tensor = self.body(x)
        what = torch.cat((h.mean((2, 3)), h.amax((2, 3))), 1)
        columns: Tensor = self.where(h)
        return what, nf.relu(columns).amax(2).flatten(1)


class Reader(nn.Module):
    """The attribute reader: a head for each of `HEADS`."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.heads = nn.ModuleDict({name: nn.Linear(2 * WIDTH + 256, len(v)) for name, v in HEADS.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits by head."""
        features = torch.cat(self.trunk(x), 1)
        return {name: head(features) for name, head in self.heads.items()}


class Identity(nn.Module):
    """The subject embedding: unit vectors (B, EMBEDDING), near for one toy in different scenes."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.head = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, EMBEDDING))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        embedded: Tensor = self.head(self.trunk(x)[0])
        return nf.normalize(embedded, dim=1)


class Controls(nn.Module):
    """Reads nearness, mask and edge logits (B, 3, 64, 64) from pictures, to compare with a control picture."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.PixelUnshuffle(2), _layer(12, 24))
        self.coarse = nn.Sequential(_layer(24, 48, 2), _layer(48, 64, 2), _layer(64, 64), _layer(64, 40))
        self.join = nn.Sequential(_layer(24 + 40, 24), nn.Conv2d(24, 12, 3, 1, 1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        fine: Tensor = self.fine(x)
        coarse = nf.interpolate(self.coarse(fine), scale_factor=4.0, mode="bilinear")
        result: Tensor = self.join(torch.cat((fine, coarse), 1))
        return result


def to_input(images: Tensor) -> Tensor:
    """uint8 pictures (B, P, Q, 3) as network input (B, 3, 64, 64) in -1..1; other sizes are averaged or stretched."""
    x = images.permute(0, 3, 1, 2).float().div(127.5).sub(1)
    if x.shape[-2:] == (64, 64):
        return x
    return nf.interpolate(x, size=(64, 64), mode="bilinear", antialias=True, align_corners=False)
