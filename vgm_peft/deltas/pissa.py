"""PiSSA: a LoRA that starts at the layer's principal singular parts instead of at noise and nothing.

Meng et al. 2024 (arXiv 2404.02948, equations 2 to 4; as a difference 9). With W = U S V^T the factors B = U_R sqrt(S_R / s) and
A = sqrt(S_R / s) V_R^T are trained in the place of that part of W. There the base keeps the rest, so that such a file is
useless on the base that everyone has. Here the base stays whole, and the delta is the difference to the start, of rank 2R and
zero to begin with: dW = s (B_now A_now - B A) = s (b A + (B + b) a), with a and b what training has added to A and B.

| here | shape | is | other tools |
|---|---|---|---|
| `start_down`, `start_up` | (R, I[, *kernel]), (O, R) | A, B: stored, not trained | `lora_down.weight` = [A; a] |
| `down`, `up` | as above | a, b | `lora_up.weight` = [b, B + b] |

Every tool reads that as an ordinary LoRA of rank 2R. The gradients are those of PiSSA; weight decay draws to the start. A
delta that was never shown its base (`Delta.start`) has B = 0 and is a LoRA.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vgm_peft.delta import seeded
from vgm_peft.deltas.lowrank import LowRank, LowRankOptions, Pair
from vgm_peft.errors import ConfigError
from vgm_peft.site import Site

EXTRA = 10
"""Directions that a quick decomposition follows beyond those asked for."""


@dataclass(frozen=True, kw_only=True)
class PissaOptions(LowRankOptions):
    """Settings of one PiSSA: those of a LoRA."""

    iterations: int | None = None
    """None: the exact decomposition, a second or so per large layer. Else a quick one by so many power iterations: 4 .. 16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations is not None and self.iterations < 0:
            raise ConfigError(f"iterations = {self.iterations}", expected="0 or more, or none for the exact decomposition")


class Pissa(LowRank):
    """dW = s (b A + (B + b) a) with A, B the principal parts of W; starts at zero because a and b do."""

    kind = "pissa"
    Options = PissaOptions
    examples = (PissaOptions(rank=3, alpha=2.0), PissaOptions(rank=2, iterations=4))
    joins = True
    options: PissaOptions

    def __init__(self, site: Site, options: PissaOptions, generator: torch.Generator | None = None) -> None:
        """Begin as a LoRA begins, until `start` knows better."""
        super().__init__(site, options, generator)
        self.start_down = nn.Parameter(self.down.detach().clone(), requires_grad=False)
        self.start_up = nn.Parameter(self.up.detach().clone(), requires_grad=False)
        nn.init.zeros_(self.down)

    @torch.no_grad()
    def start(self, base: Tensor) -> None:
        """Take the R largest singular values of the base's matrix, shared evenly between both factors."""
        rank, matrix = self.options.rank, base.flatten(1).to(self.up.device, torch.float32)
        if self.options.iterations is None or rank + EXTRA >= min(matrix.shape):
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        else:
            left, values, right = _quick_svd(matrix, rank + EXTRA, self.options.iterations)
        root = (values[:rank] / self.options.scale).sqrt()
        self.start_up.copy_(left[:, :rank] * root)
        self.start_down.copy_((root[:, None] * right[:rank]).view_as(self.start_down))

    def pair(self) -> Pair:
        """Return [A; a] and [b, B + b]."""
        down, up = torch.cat([self.start_down, self.down]), torch.cat([self.up, self.start_up + self.up], 1)
        return Pair(down, up, self.options.scale)

    def add_change(self, weight: Tensor, base: Tensor, strength: float) -> Tensor:
        """Return `weight` + strength * dW, summed inside the products b A and (B + b) a."""
        scale, up = strength * self.options.scale, self.up.to(weight.dtype)
        start_down, down = self.start_down.flatten(1).to(weight.dtype), self.down.flatten(1).to(weight.dtype)
        half = torch.addmm(weight.flatten(1), up, start_down, alpha=scale)
        return torch.addmm(half, self.start_up.to(weight.dtype) + up, down, alpha=scale).view(weight.shape)


def _quick_svd(matrix: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest `rank` singular parts, nearly (Halko et al. 2011, algorithms 4.4 and 5.1), the same at every call."""
    sketch = torch.randn(matrix.shape[1], rank, generator=seeded(None)).to(matrix.device)
    basis = torch.linalg.qr(matrix @ sketch).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return basis @ left, values, right
