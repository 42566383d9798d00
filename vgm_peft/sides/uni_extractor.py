"""What Uni-ControlNet reads control pictures with: an extractor of several resolutions, and the norms that hear of it.

Order of layers and names of tensors are those of the authors' code (ShihaoZhaoZSH/Uni-ControlNet, models/local_adapter.py).
"""

import torch
from torch import Tensor, nn

from vgm_peft.errors import DeltaError
from vgm_peft.side import Features


class FDN(nn.Module):
    """A group norm without values of its own: what it multiplies by and adds at every place comes from control pictures."""

    def __init__(self, norm: nn.GroupNorm, found: int) -> None:
        """In the place of a norm, for features of `found` channels."""
        super().__init__()
        self.param_free_norm = nn.GroupNorm(norm.num_groups, norm.num_channels, norm.eps, affine=False)
        self.conv_gamma = nn.Conv2d(found, norm.num_channels, 3, padding=1)
        self.conv_beta = nn.Conv2d(found, norm.num_channels, 3, padding=1)
        self.told: tuple[Tensor, Tensor] = (torch.zeros(()), torch.zeros(()))
        """Gamma and beta in the call under way; they stay, for a backward pass that computes parts of it again."""

    def read(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return gamma and beta, (B, C, h, w) each, of features (B, F, h, w)."""
        return self.conv_gamma(features), self.conv_beta(features)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, h, w) and give it what was told."""
        gamma, beta = self.told
        return self.param_free_norm(x) * (1.0 + gamma) + beta


class Extractor(nn.Module):
    """From n control pictures, concatenated in channels, to features for every level of the encoder."""

    def __init__(self, conditions: int, width: int, levels: int, factor: int) -> None:
        """`width` is that of the first layer, `factor` are the pixels to a latent. Raises `DeltaError` for a factor that
        three halvings cannot make."""
        super().__init__()
        if factor not in (1, 2, 4, 8):
            raise DeltaError(f"a base with {factor} pixels to a latent", expected="1, 2, 4 or 8")
        self.conditions, self.factor = conditions, factor
        self.widths = tuple(width * share for share in (6, 8, *(4 * n for n in range(3, levels + 1))))[:levels]
        """Channels of the features: 192, 256, 384, 512 where the first layer has 32."""
        self.norms: tuple[FDN, ...] = ()
        """Those that hear of it, in the order of what `forward` is given. A tuple, so that none is a part of it."""
        strides = [2 if factor >= 2 ** (n + 1) else 1 for n in range(3)]
        layers = ((3 * conditions, 1, 1), (1, 2, strides[0]), (2, 2, 1), (2, 4, strides[1]), (4, 4, 1))
        self.pre_extractor = nn.Sequential()
        for number, (before, after, stride) in enumerate(layers):
            inward = before if number == 0 else before * width
            self.pre_extractor.extend((nn.Conv2d(inward, after * width, 3, stride, 1), nn.SiLU()))
        befores, steps = (4 * width, *self.widths[:-1]), (strides[2], *[2] * (levels - 1))
        convolutions = [nn.Conv2d(b, a, 3, s, 1) for b, a, s in zip(befores, self.widths, steps, strict=True)]
        self.extractors = nn.ModuleList(nn.Sequential(convolution, nn.SiLU()) for convolution in convolutions)
        self.zero_convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for channels in self.widths)
        for parameter in self.zero_convs.parameters():
            nn.init.zeros_(parameter)

    def see(self, pictures: Tensor) -> list[Tensor]:
        """Return the features of pictures (B, 3 n, P, Q) in 0 .. 1, one tensor for each level, each half as large."""
        hidden: Tensor = self.pre_extractor(pictures)
        found: list[Tensor] = []
        for extractor, zero in zip(self.extractors, self.zero_convs, strict=True):
            hidden = extractor(hidden)
            found.append(zero(hidden))
        return found

    def forward(self, told: Features) -> Tensor:
        """Tell the norms what was read, gamma and beta of each in turn; to the network's input nothing is added."""
        for norm, pair in zip(self.norms, zip(told[::2], told[1::2], strict=True), strict=True):
            norm.told = pair
        return told[0].new_zeros(())
