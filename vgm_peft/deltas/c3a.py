"""C3A: a change made of circulant blocks, applied by the fast Fourier transform.

Chen et al. 2024 (arXiv 2407.19342, equations 3 and 4). The weight is cut into square blocks of side b, each told by one row of
b values: within a block `dW[j, t] = kernel[(t - j) mod b] / I`, so a rank up to full for O I / b values. A convolution has
such blocks at every place of its kernel, and I counts them all.

| here | shape | peft |
|---|---|---|
| `kernel` | (O/b, I/b, b), conv (O/b, I/b, b, *kernel) | `c3a_kernel` (linear only) |

peft begins at random kernels, so small that it hardly shows; here they begin at zero, and the fresh delta changes nothing.
b must divide both sides; the default is the largest such side up to 256 of every layer by itself. Side 1 is full training and
must be asked for. Rates are high, since dW is the kernel divided by I: 1e-1 and more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Self

import torch
from torch import Tensor, nn

from vgm_peft.delta import Call, Patch
from vgm_peft.deltas.divisors import divisors
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.site import Site

USUAL = 256
"""Side of a block in peft, where it fits."""


@dataclass(frozen=True, kw_only=True)
class C3aOptions:
    """Size of the blocks."""

    block: int | None = None
    """Side b, a divisor of the layer's inputs and outputs. None: the largest that fits, from 2 up to 256."""

    def __post_init__(self) -> None:
        if self.block is not None and self.block < 1:
            raise ConfigError(f"block = {self.block}", expected="1 or more")


class C3a(Patch):
    """dW of circulant blocks on a linear or conv layer; starts at zero."""

    kind = "c3a"
    Options = C3aOptions
    ops = frozenset({"linear", "conv"})
    rate = 10.0
    examples = (C3aOptions(block=4), C3aOptions())
    joins = True
    options: C3aOptions

    def __init__(self, site: Site, options: C3aOptions, generator: torch.Generator | None = None) -> None:
        """Begin at zero. Raises `DeltaError` when the block does not divide the layer."""
        side = _side(site, options.block)
        super().__init__(site, replace(options, block=side), generator)
        self.kernel = nn.Parameter(torch.zeros(site.rows // side, site.shape[1] // side, side, *site.shape[2:]))
        if site.op == "conv":
            self.acts = "weight"

    def change(self, base: Tensor) -> Tensor:
        """Return the blocks in full, each row the one above shifted by one."""
        side = self.kernel.shape[2]
        steps = torch.arange(side, device=self.kernel.device)
        blocks = self.kernel[:, :, (steps - steps[:, None]) % side]  # (O/b, I/b, b, b, *kernel)
        return blocks.transpose(1, 2).reshape(self.site.shape) / self.site.columns

    def contribution(self, call: Call) -> Tensor:
        """Return the correlation of x with the kernels, block by block, as a product of spectra (float32 or wider)."""
        if self.site.op != "linear":
            return super().contribution(call)
        x = call.x
        wide = torch.promote_types(x.dtype, torch.float32)
        rows, columns, side = self.kernel.shape
        given = torch.fft.rfft(x.reshape(-1, columns, side).to(wide))
        kernels = torch.fft.rfft(self.kernel.to(wide) / self.site.columns)
        made = torch.matmul(given.permute(2, 0, 1), kernels.conj().permute(2, 1, 0))  # frequency by frequency
        return torch.fft.irfft(made.permute(1, 2, 0), n=side).reshape(*x.shape[:-1], rows * side).to(x.dtype)

    def adapt(self) -> dict[str, Tensor] | None:
        """Return `c3a_kernel` of a linear layer."""
        return {"c3a_kernel": self.kernel.detach()} if self.site.op == "linear" else None

    @classmethod
    def unpack(cls, site: Site, tensors: Mapping[str, Tensor]) -> Self | None:
        """Read `c3a_kernel` (peft)."""
        if set(tensors) != {"c3a_kernel"}:
            return None
        kernel = tensors["c3a_kernel"]
        side = kernel.shape[2] if kernel.dim() == 3 else 0
        if site.op != "linear" or not side or tuple(kernel.shape[:2]) != (site.rows // side, site.columns // side):
            raise DeltaError(
                f"{site}: c3a_kernel {'x'.join(map(str, kernel.shape))} does not cover its weight with square blocks",
                fix="use the delta with the base it was trained on",
            )
        patch = cls(site, C3aOptions(block=side))
        with torch.no_grad():
            patch.kernel.copy_(kernel)
        return patch


def _side(site: Site, asked: int | None) -> int:
    """Return the asked side of a block, or the largest usual one above 1. Raises `DeltaError` naming those that fit."""
    allowed = divisors(gcd(site.rows, site.shape[1]))
    usual = max(n for n in allowed if n <= USUAL)
    if asked is None and usual > 1:
        return usual
    if asked is None:
        raise DeltaError(
            f"{site}: only blocks of side 1 divide its {site.rows} outputs and {site.shape[1]} inputs, which is full training",
            fix="leave the layer out of the targets, or ask for it with block = 1",
        )
    if asked not in allowed:
        raise DeltaError(
            f"{site}: block = {asked} does not divide its {site.rows} outputs and {site.shape[1]} inputs",
            expected="one of " + ", ".join(map(str, allowed)),
            fix="set block to one of them, or leave the layer out of the targets",
        )
    return asked
