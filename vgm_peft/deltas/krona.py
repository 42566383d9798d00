"""KronA: a change that is one Kronecker product, dW = A (x) B. No rank, no scale.

Edalati et al. 2022 (arXiv 2212.10650) for linear layers; DiffuseKronA, Marjit et al. 2024 (arXiv 2402.17412), for the
attention projections of diffusion models. For a weight of O outputs and I inputs A is (a1, a2), B is (O/a1, I/a2[, kernel]) and
`dW[i*b1 + p, j*b2 + q] = A[i, j] * B[p, q]`. Other tools read it as a LoKr of two full factors, `lokr_w1` = A, `lokr_w2` = B.

The forward never builds dW. With the activation as a matrix X (a2, b2) per token the output is A X B^T (a1, b1): two small
products. A convolution is the same with B a convolution of b2 to b1 channels, run over the a2 blocks of channels as a batch;
only grouped convolutions go through the dense dW.

The code released with the paper returns these outputs flattened as (b1, a1), so what it trains is a fixed permutation of the
rows of A (x) B. Here it is the true product of the paper; files of that code hold A transposed as `down` (a2, a1) and B as
`up` (b1, b2), and need `dW[p*a1 + i, j*b2 + q] = down[j, i] * up[p, q]` to be read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vgm_peft.delta import Call, Patch, convolve, seeded
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.site import Site

RELEASED = (64, 8)
"""a1, a2 of the released SDXL recipe."""


@dataclass(frozen=True, kw_only=True)
class KronaOptions:
    """Shape of the factor A; only a1 * a2 matters for the number of values, a1*a2 + O*I/(a1*a2)."""

    a1: int | None = None
    """Rows of A, a divisor of the layer's outputs. None: 64 as released, or the next smaller divisor."""
    a2: int | None = None
    """Columns of A, a divisor of the layer's inputs (channels). None: 8 as released, or the next smaller divisor."""

    def __post_init__(self) -> None:
        for name in ("a1", "a2"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} = {value}", expected="1 or more")


class Krona(Patch):
    """dW = A (x) B on a linear or conv layer; starts at zero because B does."""

    kind = "krona"
    Options = KronaOptions
    ops = frozenset({"linear", "conv"})
    examples = (KronaOptions(a1=4, a2=2), KronaOptions(a1=2, a2=4))
    options: KronaOptions

    def __init__(self, site: Site, options: KronaOptions, generator: torch.Generator | None = None) -> None:
        """Draw A from N(0, 1/a1) (standard deviation). Raises `DeltaError` when a1 or a2 does not divide the layer."""
        a1 = _divisor(site, "a1", options.a1, RELEASED[0], site.rows)
        a2 = _divisor(site, "a2", options.a2, RELEASED[1], site.shape[1])
        super().__init__(site, replace(options, a1=a1, a2=a2), generator)
        self.A = nn.Parameter(torch.empty(a1, a2))
        self.B = nn.Parameter(torch.zeros(site.rows // a1, site.shape[1] // a2, *site.shape[2:]))
        nn.init.normal_(self.A, std=1.0 / a1, generator=seeded(generator))

    def change(self, base: Tensor) -> Tensor:
        """Return A (x) B; over a kernel, for every place in it."""
        return torch.kron(self.A.view(*self.A.shape, *[1] * (self.B.dim() - 2)), self.B)

    def contribution(self, call: Call) -> Tensor:
        """Return (A (x) B) x as A X B^T, the cheaper product first."""
        if self.site.op == "linear":
            return self._linear(call.x)
        if cast(nn.Conv2d, call.layer).groups > 1:
            return super().contribution(call)
        return self._conv(call.x, call.layer)

    def _linear(self, x: Tensor) -> Tensor:
        left, right = self.A.to(x.dtype), self.B.to(x.dtype)
        (a1, a2), (b1, b2) = left.shape, right.shape
        blocks = x.reshape(-1, a2, b2)
        if a2 * b1 * (b2 + a1) <= a1 * b2 * (a2 + b1):
            y = torch.matmul(left, F.linear(blocks, right))
        else:
            y = F.linear(torch.matmul(left, blocks), right)
        return y.reshape(*x.shape[:-1], a1 * b1)

    def _conv(self, x: Tensor, layer: nn.Module) -> Tensor:
        left, right = self.A.to(x.dtype), self.B.to(x.dtype)
        a1, a2 = left.shape
        batch, space = len(x), x.shape[2:]
        if a2 <= a1:
            blocks = convolve(layer, x.reshape(batch * a2, -1, *space), right)
            y = torch.matmul(left, blocks.reshape(batch, a2, -1))
            return y.reshape(batch, -1, *blocks.shape[2:])
        blocks = torch.matmul(left, x.reshape(batch, a2, -1))
        y = convolve(layer, blocks.reshape(batch * a1, -1, *space), right)
        return y.reshape(batch, -1, *y.shape[2:])

    def pack(self, base: Tensor) -> dict[str, Tensor]:
        """Return `lokr_w1`, `lokr_w2` and an `alpha` of 1, which readers of two full factors ignore."""
        return {"lokr_w1": self.A.detach(), "lokr_w2": self.B.detach(), "alpha": torch.tensor(1.0)}

    @classmethod
    def unpack(cls, site: Site, tensors: Mapping[str, Tensor]) -> Self | None:
        """Read `lokr_w1` and `lokr_w2`, both full (as every reader does, without regard to `alpha`)."""
        if not {"lokr_w1", "lokr_w2"} <= tensors.keys() <= {"lokr_w1", "lokr_w2", "alpha"}:
            return None
        left, right = tensors["lokr_w1"], tensors["lokr_w2"]
        shape = [m * n for m, n in zip(left.shape[:2], right.shape[:2], strict=False)]
        fits = left.numel() * right.numel() == site.rows * site.columns
        if site.op not in cls.ops or shape != list(site.shape[:2]) or not fits:
            raise DeltaError(
                f"{site}: lokr_w1 {tuple(left.shape)} and lokr_w2 {tuple(right.shape)} do not multiply to its weight",
                fix="use the delta with the base it was trained on",
            )
        patch = cls(site, KronaOptions(a1=left.shape[0], a2=left.shape[1]))
        with torch.no_grad():
            patch.A.copy_(left.reshape(patch.A.shape))
            patch.B.copy_(right.reshape(patch.B.shape))
        return patch


def _divisor(site: Site, name: str, asked: int | None, released: int, size: int) -> int:
    """Return the asked divisor of `size`, or the largest up to the released one. Raises `DeltaError` naming those allowed."""
    allowed = [n for n in range(1, size + 1) if size % n == 0]
    if asked is None:
        return max(n for n in allowed if n <= released)
    if asked not in allowed:
        side = "outputs" if name == "a1" else "inputs"
        raise DeltaError(
            f"{site}: {name} = {asked} does not divide its {size} {side}",
            expected="one of " + ", ".join(map(str, allowed)),
            fix=f"set {name} to one of them, or leave the layer out of the targets",
        )
    return asked
