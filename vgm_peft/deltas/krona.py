"""KronA: a change that is one Kronecker product, dW = A (x) B. No rank, no scale.

Edalati et al. 2022 (arXiv 2212.10650) for linear layers; DiffuseKronA, Marjit et al. 2024 (arXiv 2402.17412), for the
attention projections of diffusion models. For a weight of O outputs and I inputs, A is (a1, a2), B is (b1, b2[, *kernel]) with
a1 b1 = O and a2 b2 = I, and `dW[i*b1 + p, j*b2 + q] = A[i, j] * B[p, q]`.

| here | shape | LyCORIS and its readers | DiffuseKronA's code |
|---|---|---|---|
| `A` | (a1, a2) | `lokr_w1` | `down.weight`, transposed (a2, a1) |
| `B` | (O/a1, I/a2[, *kernel]) | `lokr_w2` | `up.weight` |

This kind owns the spelling of two full factors: LoKr files in "full matrix mode" are read as it, and their alpha is ignored
by every reader. The code released with DiffuseKronA flattens its output (b1, a1) where the product has (a1, b1), so what it
trains is dW = P (A (x) B), P a fixed permutation of the rows: `dW[p*a1 + i, j*b2 + q] = A[i, j] * B[p, q]`. That is
`layout = "released"`, which its files get when they are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self, cast

import torch
from torch import Tensor, nn

from vgm_peft.delta import Call, seeded
from vgm_peft.deltas.divisors import divisor
from vgm_peft.deltas.dropout import RowDropout, check_shares
from vgm_peft.deltas.kronecker import Kronecker, kron
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.site import Site

PUBLISHED = (64, 8)
"""a1, a2 of the SDXL recipe that was released with the paper."""
DOWN, UP = "lora_down.weight", "lora_up.weight"
"""What the factors are called in files of that code, whose shapes no LoRA can have."""


@dataclass(frozen=True, kw_only=True)
class KronaOptions:
    """Shape of the factor A; only a1 * a2 matters for the number of values, a1*a2 + O*I/(a1*a2)."""

    a1: int | None = None
    """Rows of A, a divisor of the layer's outputs. None: 64 as published, or the next smaller divisor."""
    a2: int | None = None
    """Columns of A, a divisor of the layer's inputs (channels). None: 8 as published, or the next smaller divisor."""
    layout: Literal["kron", "released"] = "kron"
    """`released` permutes the rows as the paper's code does: for its files; there is no reason to train so."""
    rank_dropout: float = 0.0
    """Share of the rows of dW hidden while training, for all pictures alike; the rest is scaled up by 1 / (1 - p)."""
    module_dropout: float = 0.0
    """Share of the forwards of training in which the layer goes without the patch."""

    def __post_init__(self) -> None:
        for name in ("a1", "a2"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} = {value}", expected="1 or more")
        check_shares(self)


class Krona(RowDropout):
    """dW = A (x) B on a linear or conv layer; starts at zero because B does."""

    kind = "krona"
    Options = KronaOptions
    ops = frozenset({"linear", "conv"})
    rate = 10.0
    examples = (KronaOptions(a1=4, a2=2), KronaOptions(a1=2, a2=4), KronaOptions(a1=2, a2=2, layout="released"))
    joins = True
    options: KronaOptions

    def __init__(self, site: Site, options: KronaOptions, generator: torch.Generator | None = None) -> None:
        """Draw A from N(0, 1/a1) (standard deviation). Raises `DeltaError` when a1 or a2 does not divide the layer."""
        a1 = divisor(site, "a1", options.a1, PUBLISHED[0], (site.rows, "outputs"))
        a2 = divisor(site, "a2", options.a2, PUBLISHED[1], (site.shape[1], "inputs"))
        super().__init__(site, replace(options, a1=a1, a2=a2), generator)
        self.A = nn.Parameter(torch.empty(a1, a2))
        self.B = nn.Parameter(torch.zeros(site.rows // a1, site.shape[1] // a2, *site.shape[2:]))
        nn.init.normal_(self.A, std=1.0 / a1, generator=seeded(generator))

    def change(self, base: Tensor) -> Tensor:
        """Return A (x) B, its rows in the order of the layout."""
        return self._ordered(kron(self.A, self.B), 0)

    def contribution(self, call: Call) -> Tensor:
        """Return (A (x) B) x as A X B^T, the cheaper product first; dense only for convolutions in groups."""
        x, product = call.x, Kronecker(self.A, (self.B,)).to(call.x.dtype)
        if self.site.op == "linear":
            return self._ordered(product.on_tokens(x), -1)
        if cast(nn.Conv2d, call.layer).groups > 1:
            return super().contribution(call)
        return self._ordered(product.on_pictures(x, call.layer), 1)

    def add_to(self, output: Tensor, call: Call, strength: float) -> Tensor:
        """Return `output + strength * contribution`, summed inside the last product where the layout allows."""
        if self.site.op == "linear" and self.options.layout == "kron" and not self.hides_rows:
            return Kronecker(self.A, (self.B,)).to(output.dtype).add_to_tokens(output, call.x, strength)
        return super().add_to(output, call, strength)

    def _ordered(self, outputs: Tensor, dim: int) -> Tensor:
        """Return outputs (a1, b1) along `dim` in the order of the layout."""
        if self.options.layout == "kron":
            return outputs
        blocks = outputs.movedim(dim, -1).unflatten(-1, (len(self.A), len(self.B)))
        return blocks.mT.flatten(-2).movedim(-1, dim)

    def pack(self, base: Tensor) -> dict[str, Tensor]:
        """Return `lokr_w1`, `lokr_w2` and an `alpha` of 1, which readers of two full factors ignore; permuted rows densely."""
        if self.options.layout == "released":
            return super().pack(base)
        return {"lokr_w1": self.A.detach(), "lokr_w2": self.B.detach(), "alpha": torch.tensor(1.0)}

    @classmethod
    def unpack(cls, site: Site, tensors: Mapping[str, Tensor]) -> Self | None:
        """Read `lokr_w1` and `lokr_w2`, both full (without regard to `alpha`), or the two factors of DiffuseKronA's code."""
        if set(tensors) == {DOWN, UP} and _is_released(site, tensors[DOWN], tensors[UP]):
            left, right = tensors[DOWN].t(), tensors[UP]
            patch = cls(site, KronaOptions(a1=left.shape[0], a2=left.shape[1], layout="released"))
        elif {"lokr_w1", "lokr_w2"} <= tensors.keys() <= {"lokr_w1", "lokr_w2", "alpha"}:
            left, right = tensors["lokr_w1"], tensors["lokr_w2"]
            shape = [m * n for m, n in zip(left.shape[:2], right.shape[:2], strict=False)]
            fits = left.numel() * right.numel() == site.rows * site.columns
            if site.op not in cls.ops or shape != list(site.shape[:2]) or not fits:
                raise DeltaError(
                    f"{site}: lokr_w1 {tuple(left.shape)} and lokr_w2 {tuple(right.shape)} do not multiply to its weight",
                    fix="use the delta with the base it was trained on",
                )
            patch = cls(site, KronaOptions(a1=left.shape[0], a2=left.shape[1]))
        else:
            return None
        with torch.no_grad():
            patch.A.copy_(left.reshape(patch.A.shape))
            patch.B.copy_(right.reshape(patch.B.shape))
        return patch


def _is_released(site: Site, down: Tensor, up: Tensor) -> bool:
    """Whether the pair is (a2, a1) and (b1, b2) of a linear layer. A LoRA's would be (R, I) and (O, R), which never fits."""
    if site.op != "linear" or down.dim() != 2 or up.dim() != 2:
        return False
    (a2, a1), (b1, b2) = down.shape, up.shape
    is_lora = a1 == site.columns and b1 == site.rows and a2 == b2
    return not is_lora and a1 * b1 == site.rows and a2 * b2 == site.columns
