"""The network of ControlNeXt: a light module that reads the control picture, and increments of some of the base's weights.

As in the current code of its authors (dvlab-research/ControlNeXt, which differs from the paper, arXiv 2408.06070): names of
tensors, order of layers and the cross normalisation.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

EPS = 1e-12
TIME, EMBEDDED = 128, 256
"""Values of a timestep's sinusoids, and of what is made of them."""

Place = Literal["block", "stem"]


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a network must agree upon with its base, and what was chosen when it was made."""

    channels: int
    """Of the base's first block."""
    factor: int
    """Pixels to a latent: 1, 2, 4 or 8."""
    context: int
    """Width of the base's tokens."""
    place: Place
    """Where the module is heard: after the first block of the encoder, or before it."""
    width: int = 64
    """Channels of the module's first layers; later ones have two and four times as many."""
    scale: float = 1.0
    """What the normalised control is multiplied by, when it is trained and ever after."""


class Module(nn.Module):
    """F_c: from pictures (B, 3, P, Q) to control features (B, channels, P / factor, Q / factor).

    `see` is what does not depend on the timestep, `forward` the rest.
    """

    def __init__(self, form: Form) -> None:
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps
        from diffusers.models.resnet import ResnetBlock2D

        super().__init__()
        one, two, four = form.width, 2 * form.width, 4 * form.width
        strides = [2 if form.factor >= 2 ** (n + 1) else 1 for n in range(3)]
        self.stride = strides[0]
        """Pixels to a place of what `see` gives."""
        self.time_proj = Timesteps(TIME, True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(TIME, EMBEDDED)
        self.embedding = nn.Sequential(
            nn.Conv2d(3, one, 3, strides[0], 1), nn.GroupNorm(2, one), nn.ReLU(),
            nn.Conv2d(one, one, 3, 1, 1), nn.GroupNorm(2, one), nn.ReLU(),
            nn.Conv2d(one, two, 3, 1, 1), nn.GroupNorm(2, two), nn.ReLU(),
        )  # fmt: skip
        self.down_res = nn.ModuleList(
            ResnetBlock2D(in_channels=before, out_channels=after, temb_channels=EMBEDDED, groups=groups)
            for before, after, groups in ((two, two, 4), (two, four, 8))
        )
        self.down_sample = nn.ModuleList(_Down(width, stride) for width, stride in zip((two, four), strides[1:], strict=True))
        self.mid_convs = nn.ModuleList(
            (
                nn.Sequential(
                    nn.Conv2d(four, four, 3, 1, 1), nn.ReLU(), nn.GroupNorm(8, four),
                    nn.Conv2d(four, four, 3, 1, 1), nn.GroupNorm(8, four),
                ),
                nn.Conv2d(four, form.channels, 1),
            )
        )  # fmt: skip

    def see(self, pictures: Tensor) -> Tensor:
        """Return what the module makes of pictures before it is told the time."""
        return self.embedding(pictures)

    def forward(self, seen: Tensor, t: Tensor) -> Tensor:
        """Return the control features of pictures seen (B, ...), at timesteps of shape () or (B,)."""
        time = self.time_embedding(self.time_proj(t.expand(len(seen))).to(seen.dtype))
        for block, down in zip(self.down_res, self.down_sample, strict=True):
            seen = down(block(seen, time))
        return self.mid_convs[1](self.mid_convs[0](seen) + seen)


class _Down(nn.Module):
    """A convolution that halves the picture, or where a base has fewer pixels to a latent leaves its size."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride, 1)

    def forward(self, seen: Tensor) -> Tensor:
        return self.conv(seen)


class ControlNeXtNetwork(nn.Module):
    """The module and, under the names of the base's layers, what is added to their weights: zero at first."""

    def __init__(self, form: Form, layers: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        self.form = form
        self.module = Module(form)
        self.increments = nn.Module()
        for name, layer in layers.items():
            *path, last = name.split(".")
            node = self.increments
            for step in path:
                if step not in dict(node.named_children()):
                    node.add_module(step, nn.Module())
                node = node.get_submodule(step)
            node.add_module(last, _zero(layer))

    def changed(self) -> Iterator[tuple[str, nn.Linear]]:
        """The names of the base's layers whose weights grow, each with the layer of what is added."""
        return ((name, m) for name, m in self.increments.named_modules() if isinstance(m, nn.Linear))


def _zero(like: nn.Linear) -> nn.Linear:
    has_bias = "bias" in dict(like.named_parameters())
    layer = nn.Linear(like.in_features, like.out_features, has_bias, device=like.weight.device)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def normalised(control: Tensor, stream: Tensor) -> Tensor:
    """Cross normalisation as coded: bring control features to the size, the mean and the deviation of the main stream.

    c' = (c - mean(c)) std(m) / (std(c) + eps) + mean(m), over all values of a row, in float32. (Eq. 10 of the paper has the
    stream's own statistics on both sides instead, and a learned factor.)
    """
    height, width = stream.shape[-2:]
    control, stream = adaptive_avg_pool2d(control, (height, width)).float(), stream.float()
    (spread_c, mean_c), (spread_m, mean_m) = (torch.std_mean(x, dim=(1, 2, 3), keepdim=True) for x in (control, stream))
    return (control - mean_c) * (spread_m / (spread_c + EPS)) + mean_m
