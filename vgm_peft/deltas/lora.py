"""LoRA: a change of low rank, dW = s * up @ down.

Hu et al. 2021 (arXiv 2106.09685, section 4.1) for linear layers; LoCon (LyCORIS) for convolutions, where `down` has the
layer's own kernel and `up` is 1x1; rank-stabilised scale alpha / sqrt(rank) from Kalajdzievski 2023 (arXiv 2312.03732).

Letters: `R` rank, `O` outputs, `I` inputs. Parameters and what other tools call them:

| here | shape | kohya, LyCORIS | diffusers, peft |
|---|---|---|---|
| `down` | (R, I), conv (R, I/groups, *kernel) | `lora_down.weight` | `lora_A.weight` |
| `up` | (O, R) | `lora_up.weight`, conv (O, R, 1, 1) | `lora_B.weight`, conv (O, R, 1, 1) |

The scale is no tensor of ours but follows from `options` (`rank`, `alpha`, `rslora`); `pack` writes it as `alpha`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vgm_peft.delta import Call, Patch, convolve, seeded
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.site import Site

PAIR = frozenset({"lora_down.weight", "lora_up.weight"})


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Settings of one LoRA. The defaults are those of peft."""

    rank: int = 8
    """R: 4 .. 32 are usual; a higher rank learns more and generalises less."""
    alpha: float | None = None
    """The change is scaled by alpha / rank; None is alpha = rank, so no scaling."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, which keeps the step size alike over ranks."""
    dropout: float = 0.0
    """Share of the layer's inputs hidden from `down` while training."""
    rank_dropout: float = 0.0
    """Share of the ranks switched off per picture while training (kohya); what is left is scaled up by 1 / (1 - p)."""
    module_dropout: float = 0.0
    """Share of steps in which the whole patch is left out while training (kohya)."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank = {self.rank}", expected="1 or more")
        if self.alpha is not None and not self.alpha > 0:
            raise ConfigError(f"alpha = {self.alpha}", expected="above 0", fix="leave it out for alpha = rank")
        for name in ("dropout", "rank_dropout", "module_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name} = {getattr(self, name)}", expected="0 or more and below 1")

    @property
    def scale(self) -> float:
        """s, what `up @ down` is multiplied by."""
        alpha = float(self.rank) if self.alpha is None else self.alpha
        return alpha / (sqrt(self.rank) if self.rslora else self.rank)


class Lora(Patch):
    """dW = s * up @ down on a linear or conv layer; starts at zero because `up` does."""

    kind = "lora"
    Options = LoraOptions
    ops = frozenset({"linear", "conv"})
    examples = (LoraOptions(rank=3, alpha=2.0), LoraOptions(rank=4, rslora=True))
    options: LoraOptions

    def __init__(self, site: Site, options: LoraOptions, generator: torch.Generator | None = None) -> None:
        """Draw `down` from U(-b, b), b = 1/sqrt(columns) (Kaiming with a = sqrt 5)."""
        super().__init__(site, options, generator)
        self.down = nn.Parameter(torch.empty(options.rank, *site.shape[1:]))
        self.up = nn.Parameter(torch.zeros(site.rows, options.rank))
        nn.init.kaiming_uniform_(self.down, a=sqrt(5), generator=seeded(generator))

    @classmethod
    def check(cls, site: Site, options: LoraOptions) -> None:
        """Refuse a rank that the layer's matrix cannot have."""
        limit = min(site.rows, site.columns)
        if options.rank > limit:
            raise DeltaError(
                f"{site}: rank {options.rank}",
                expected=f"1 .. {limit}, the smaller side of its {site.rows}x{site.columns} matrix",
                fix="lower the rank or leave the layer out of the targets",
            )

    def change(self, base: Tensor) -> Tensor:
        """Return s * up @ down in the shape of the weight."""
        return (self.options.scale * (self.up @ self.down.flatten(1))).view(self.site.shape)

    def contribution(self, call: Call) -> Tensor:
        """Return s * up(down(x)): two thin products in place of one wide."""
        x, layer = call.x, call.layer
        hidden = self._hidden(x, layer)
        up = self.up.to(hidden.dtype)
        if self.site.op == "linear":
            return self._scale() * F.linear(hidden, up).view(*x.shape[:-1], len(up))
        return self._scale() * _pointwise(hidden, up, layer)

    def add_to(self, output: Tensor, call: Call, strength: float) -> Tensor:
        """Return `output + strength * contribution`, scaled and summed inside the product with `up`."""
        x, layer = call.x, call.layer
        hidden, up = self._hidden(x, layer).to(output.dtype), self.up.to(output.dtype)
        scale = strength * self._scale()
        if self.site.op == "linear":
            return _add_product(output, hidden, up, scale)
        if cast(nn.Conv2d, layer).groups > 1:
            return torch.add(output, _pointwise(hidden, up, layer), alpha=scale)
        if not output.is_contiguous():  # channels last: pixels are rows
            return _add_product(output.movedim(1, -1), hidden.movedim(1, -1), up, scale).movedim(-1, 1)
        many = up.expand(len(hidden), -1, -1)
        return torch.baddbmm(output.flatten(2), many, hidden.flatten(2), alpha=scale).view(output.shape)

    def _hidden(self, x: Tensor, layer: nn.Module) -> Tensor:
        """Return down(x): (tokens of all pictures, R) for linear, (B, groups * R, *spatial) for conv."""
        down, options = self.down.to(x.dtype), self.options
        batch = x.shape[0]
        if self.training and options.dropout:
            x = F.dropout(x, options.dropout)
        if self.site.op == "linear":
            hidden = F.linear(x.reshape(-1, x.shape[-1]), down)
        else:
            groups = cast(nn.Conv2d, layer).groups
            hidden = convolve(layer, x, down if groups == 1 else down.repeat(groups, *[1] * (down.dim() - 1)))
        if self.training and options.rank_dropout:
            # One draw for every picture and rank, shared by the tokens or pixels.
            keep = F.dropout(hidden.new_ones(batch, hidden.shape[1]), options.rank_dropout)
            keep = keep.repeat_interleave(len(hidden) // batch, 0)
            hidden = hidden * keep.view(*keep.shape, *[1] * (hidden.dim() - 2))
        return hidden

    def _scale(self) -> float:
        """Return s, or 0 in a step that leaves the patch out; it stays in the graph, so that every parameter has a gradient."""
        p = self.options.module_dropout
        return 0.0 if self.training and p and float(torch.rand(())) < p else self.options.scale

    def pack(self, base: Tensor) -> dict[str, Tensor]:
        """Return `lora_down.weight`, `lora_up.weight` and `alpha`, the latter such that alpha / rank is our scale."""
        up = self.up.detach()
        return {
            "lora_down.weight": self.down.detach(),
            "lora_up.weight": up.reshape(*up.shape, *[1] * (len(self.site.shape) - 2)),
            "alpha": torch.tensor(self.options.scale * self.options.rank),
        }

    @classmethod
    def unpack(cls, site: Site, tensors: Mapping[str, Tensor]) -> Self | None:
        """Read `lora_down.weight`, `lora_up.weight` and, where it is there and not 0, `alpha` (else alpha = rank, as kohya)."""
        if not PAIR <= tensors.keys() <= PAIR | {"alpha"}:
            return None
        down, up, alpha = tensors["lora_down.weight"], tensors["lora_up.weight"], tensors.get("alpha", torch.zeros(()))
        rank = down.shape[0] if down.dim() else 0
        fits = down.shape[1:2] == site.shape[1:2] and down.numel() == rank * site.columns
        fits &= up.shape[:2] == (site.rows, rank) and up.numel() == site.rows * rank
        if site.op not in cls.ops or not rank or not fits:
            raise DeltaError(
                f"{site}: lora_down.weight {_spell(down)} and lora_up.weight {_spell(up)} do not multiply to its weight",
                expected=f"Rx{'x'.join(map(str, site.shape[1:]))} and {site.rows}xR",
                fix="use the delta with the base it was trained on",
            )
        if alpha.numel() != 1:
            raise DeltaError(f"{site}: alpha {_spell(alpha)}", expected="one number")
        patch = cls(site, LoraOptions(rank=rank, alpha=float(alpha) or None))
        with torch.no_grad():
            patch.down.copy_(down.reshape(patch.down.shape))
            patch.up.copy_(up.reshape(patch.up.shape))
        return patch


def _pointwise(hidden: Tensor, up: Tensor, layer: nn.Module) -> Tensor:
    """Apply `up` (O, R) as a 1x1 convolution to `hidden` (B, groups * R, *spatial), each group of outputs to its own ranks."""
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[hidden.dim() - 2]
    return function(hidden, up.view(*up.shape, *[1] * (hidden.dim() - 2)), groups=cast(nn.Conv2d, layer).groups)


def _add_product(output: Tensor, hidden: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return `output` (..., O) + scale * `hidden` (..., R) @ up.T in one product."""
    rows, rank = up.shape
    return torch.addmm(output.reshape(-1, rows), hidden.reshape(-1, rank), up.t(), alpha=scale).view(output.shape)


def _spell(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
