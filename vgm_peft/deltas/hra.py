"""HRA: the weight times a chain of reflections on the input side, W' = W H_1 H_2 ... H_R with H = I - 2 u u^T / |u|^2.

Yuan et al. 2024 (arXiv 2405.17484, equation 1). Letters: `R` reflections, `O` outputs, `I` inputs.

| here | shape | peft |
|---|---|---|
| `u` | (I, R), conv (I * prod(kernel), R) | `hra_u` |

Reflections begin in equal pairs, which cancel, so R is even. In pairs they also are cheap and exactly zero at the start: for
vectors of length 1 and d = v - u it is H_u H_v - I = u p^T - 2 d v^T with p = 2 d - 2 |d|^2 v. A product of such, each
I + A_k B_k^T, is I + A T B^T with A and B all of them side by side and T = (1 - L)^-1, L the part of B^T A above its 2x2
blocks: the compact WY form of a product of reflections. So dW = W A T B^T, a change of rank R: two thin products on the
layer's input. Over a kernel larger than 1x1 the patch is reflected, as in peft; that is a thin pair on the output, up = W A
and down = T B^T.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Self

import torch
from torch import Tensor, nn

from vgm_peft.delta import Call, seeded
from vgm_peft.deltas.rotation import wide
from vgm_peft.deltas.thin import add_wide, narrow, widen
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.shares import Deriving, Source
from vgm_peft.site import Site


@dataclass(frozen=True, kw_only=True)
class HraOptions:
    """Settings of one HRA. The default is that of peft."""

    rank: int = 8
    """R, the number of reflections, even: 8 .. 32 are usual."""

    def __post_init__(self) -> None:
        if self.rank < 2 or self.rank % 2:
            raise ConfigError(f"rank = {self.rank}", expected="an even number, for reflections begin in pairs that cancel")


class Hra(Deriving):
    """A chain of reflections of the inputs of a linear or conv layer; starts at the identity because pairs are equal."""

    kind = "hra"
    Options = HraOptions
    ops = frozenset({"linear", "conv"})
    examples = (HraOptions(rank=4), HraOptions(rank=2))
    base_free = False
    joins = True
    options: HraOptions

    def __init__(self, site: Site, options: HraOptions, generator: torch.Generator | None = None) -> None:
        """Draw one vector of every pair from U(-b, b), b = 1/sqrt(R/2) (Kaiming with a = sqrt 5, as peft)."""
        super().__init__(site, options, generator)
        half = torch.empty(site.columns, options.rank // 2)
        nn.init.kaiming_uniform_(half, a=sqrt(5), generator=seeded(generator))
        self.u = nn.Parameter(half.repeat_interleave(2, dim=1))
        self.acts = "input" if site.columns == site.shape[1] else "output"

    @classmethod
    def check(cls, site: Site, options: HraOptions) -> None:
        """Refuse more reflections than there are inputs."""
        if options.rank > site.columns:
            raise DeltaError(
                f"{site}: rank {options.rank}",
                expected=f"an even number up to {site.columns}, its inputs",
                fix="lower the rank or leave the layer out of the targets",
            )

    def source(self) -> Source:
        """Return u (1, C, R) in float32 or wider."""
        return Source(None, wide(self.u).unsqueeze(0))

    @classmethod
    def derive(cls, sort: None, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return A (N, C, R) and T B^T (N, R, C) of N chains of reflections."""
        # For u = v all that is said in terms of d is zero to the last bit.
        u, v = (side / torch.linalg.vector_norm(side, dim=1, keepdim=True) for side in (values[..., 0::2], values[..., 1::2]))
        d = v - u
        left = torch.stack([u, d], 3).flatten(2)
        right = torch.stack([2 * d - 2 * (d * d).sum(1, keepdim=True) * v, -2 * v], 3).flatten(2)
        with torch.autocast(values.device.type, enabled=False):
            number = torch.arange(values.shape[2], device=values.device) // 2
            above = (number.unsqueeze(1) < number).to(right.dtype)
            chain = (right.mT @ left) * -above
            return left, torch.linalg.solve_triangular(chain, right.mT, upper=True, unitriangular=True)

    def _pair(self) -> tuple[Tensor, Tensor]:
        """Return A (columns, R) and T B^T (R, columns), in float32 or wider."""
        left, right = self.derived()
        return left[0], right[0]

    def change(self, base: Tensor) -> Tensor:
        """Return W A T B^T in the shape of the weight."""
        left, right = (factor.to(self.u.dtype) for factor in self._pair())
        return (base.to(self.u.dtype).flatten(1) @ left @ right).view(base.shape)

    def feed(self, x: Tensor, base: Tensor) -> Tensor:
        """Return A T B^T x; every group of a convolution's channels is reflected alike."""
        left, right = (factor.to(x.dtype) for factor in self._pair())
        if self.site.op == "linear":
            return (x @ right.mT) @ left.mT
        channels = x.reshape(-1, self.site.columns, x.shape[2:].numel())
        return (left @ (right @ channels)).view(x.shape)

    def contribution(self, call: Call) -> Tensor:
        """Return W times what is fed, or over a kernel two thin products."""
        if self.acts == "input":
            return super().contribution(call)
        down, up = self._thin(call)
        return widen(narrow(call.x, down, call.layer), up, call.layer)

    def add_to(self, output: Tensor, call: Call, strength: float) -> Tensor:
        """Return `output + strength * contribution`, over a kernel summed inside the second product."""
        if self.acts == "input":
            return super().add_to(output, call, strength)
        down, up = self._thin(call)
        return add_wide(output, narrow(call.x, down, call.layer), up, call.layer, strength)

    def _thin(self, call: Call) -> tuple[Tensor, Tensor]:
        """Return T B^T as a kernel (R, I, *kernel), and W A (O, R)."""
        left, right = self._pair()
        return right.view(-1, *self.site.shape[1:]), call.base.to(left.dtype).flatten(1) @ left

    def adapt(self) -> dict[str, Tensor]:
        """Return `hra_u`."""
        return {"hra_u": self.u.detach()}

    @classmethod
    def unpack(cls, site: Site, tensors: Mapping[str, Tensor]) -> Self | None:
        """Read `hra_u` (peft without Gram-Schmidt)."""
        if set(tensors) != {"hra_u"}:
            return None
        u = tensors["hra_u"]
        if site.op not in cls.ops or u.dim() != 2 or len(u) != site.columns or u.shape[1] % 2 or not u.numel():
            raise DeltaError(
                f"{site}: hra_u {'x'.join(map(str, u.shape))} does not reflect its inputs",
                expected=f"{site.columns}xR with R even",
                fix="use the delta with the base it was trained on",
            )
        patch = cls(site, HraOptions(rank=u.shape[1]))
        with torch.no_grad():
            patch.u.copy_(u)
        return patch
