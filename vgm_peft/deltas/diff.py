"""Full training of a tensor, kept as a difference: dW is itself the parameter. BitFit and norm tuning are site choices of it.

`diff` trains anything; `bitfit` the biases alone (Ben Zaken et al. 2022, arXiv 2106.10199); `norm` the weights and biases of
normalisations (LN tuning, arXiv 2312.11420), which the site pattern must choose, for instance
`unet.*norm*`: a bias does not know what it belongs to.

| here | shape | LyCORIS |
|---|---|---|
| `diff` | that of the tensor | `diff`, of a normalisation `w_norm`; of a bias `diff_b` or `b_norm` |

A weight of float32 takes dW in for the length of the forward, so that only its gradient is paid for; in half precision dW is
applied to the input by itself, since a small difference would be rounded away in the sum.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from vgm_peft.errors import DeltaError
from vgm_peft.site import Site
from vgm_peft.sums import Vector

SUFFIXES = {"weight": ("diff", "w_norm"), "bias": ("diff_b", "b_norm")}
"""Tensor of a module -> what other tools call a difference to it."""


@dataclass(frozen=True, kw_only=True)
class DiffOptions:
    """There is nothing to set."""


class Diff(Vector):
    """dW trained value by value, on any tensor; starts at zero."""

    kind = "diff"
    Options = DiffOptions
    ops = frozenset({"linear", "conv", "norm", "bias", "embedding"})
    where = ("key+value",)
    rate = 0.1
    examples = (DiffOptions(),)

    def __init__(self, site: Site, options: DiffOptions, generator: torch.Generator | None = None) -> None:
        """Begin at dW = 0."""
        super().__init__(site, options, generator)
        self.diff = nn.Parameter(torch.zeros(site.shape))
        # A few rows looked up cost less than a sum over the whole table.
        self.acts = "output" if site.op in ("bias", "embedding") else "weight"
        self.joins = site.op == "bias"
        self.vector = "diff" if site.op in ("norm", "bias") else ""

    def change(self, base: Tensor) -> Tensor:
        """Return the difference as it is."""
        return self.diff

    @classmethod
    def unpack(cls, site: Site, tensors: Mapping[str, Tensor]) -> Self | None:
        """Read `diff` or `w_norm` at a weight, `diff_b` or `b_norm` at a bias."""
        if len(tensors) != 1 or site.op not in cls.ops:
            return None
        ((suffix, diff),) = tensors.items()
        if suffix not in SUFFIXES[site.tensor]:
            return None
        if tuple(diff.shape) != site.shape:
            raise DeltaError(
                f"{site}: {suffix} is {'x'.join(map(str, diff.shape)) or 'a scalar'}",
                expected="the shape of the base's tensor",
                fix="use the delta with the base it was trained on",
            )
        patch = cls(site, DiffOptions())
        with torch.no_grad():
            patch.diff.copy_(diff)
        return patch


class BitFit(Diff):
    """The biases alone."""

    kind = "bitfit"
    ops = frozenset({"bias"})
    where = ("biases",)
    rate = 10.0


class NormTuning(Diff):
    """Weights and biases of normalisations."""

    kind = "norm"
    ops = frozenset({"norm", "bias"})
    where = ("norms",)
    rate = 10.0
