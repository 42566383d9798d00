"""GLoRA: a low-rank change of the weight's inputs and one of the weight itself, dW = s * (W a1 a2 + b1 b2).

Generalized LoRA, Chavan et al. 2023 (arXiv 2306.07967), in the form that LyCORIS trains and the UIs read. (peft's
GLoRA multiplies elementwise, W * A + B, and changes the bias: another method of that name.)

Letters: `R` rank, `O` outputs, `I` inputs; a convolution's A acts on its channels alike at every place of the kernel.

| here | shape | LyCORIS |
|---|---|---|
| `a1`, `a2` | (I, R), (R, I); I/groups in a grouped convolution | `a1.weight`, `a2.weight`, conv with 1x1 kernels |
| `b1`, `b2` | (O, R), (R, I, *kernel) | `b1.weight`, `b2.weight` |

The first term rides on the layer's own product, W (x + s a1 a2 x), the second is added to the output as a LoRA is: no second
product with W, no dense dW. Being a multiple of W, the same file means another change on another base. LyCORIS' first releases
wrote the transposed order (`b2 b1 + W a2 a1`); such a file is told by its shapes, and refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vgm_peft.delta import Call, Patch, seeded
from vgm_peft.deltas.dropout import check_shares, hide_inputs, hide_ranks
from vgm_peft.deltas.thin import add_product, add_wide, check_scale, narrow, sketch
from vgm_peft.errors import DeltaError
from vgm_peft.site import Site

FACTORS = ("a1", "a2", "b1", "b2")


@dataclass(frozen=True, kw_only=True)
class GloraOptions:
    """Settings of one GLoRA. The defaults are those of LyCORIS, but for alpha, which is 1 there."""

    rank: int = 4
    """R of both terms; it has about twice the values of a LoRA of this rank."""
    alpha: float | None = None
    """The change is scaled by alpha / rank; None is alpha = rank, so no scaling."""
    dropout: float = 0.0
    """Share of the layer's inputs hidden from `a2` and `b2` while training."""
    rank_dropout: float = 0.0
    """Share of either term's ranks hidden from each picture while training; what is left is scaled up by 1 / (1 - p)."""
    module_dropout: float = 0.0
    """Share of the forwards of training in which the layer goes without the patch."""

    def __post_init__(self) -> None:
        check_scale(self.rank, self.alpha)
        check_shares(self)

    @property
    def scale(self) -> float:
        """s, what both terms are multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class Glora(Patch):
    """dW = s * (W a1 a2 + b1 b2) on a linear or conv layer; starts at zero because a2 and b2 do."""

    kind = "glora"
    Options = GloraOptions
    ops = frozenset({"linear", "conv"})
    examples = (GloraOptions(rank=2, alpha=3.0), GloraOptions(rank=3))
    base_free = False
    packs_alone = True
    acts = "input"
    joins = True
    options: GloraOptions

    def __init__(self, site: Site, options: GloraOptions, generator: torch.Generator | None = None) -> None:
        """Draw `a1` and `b1` from U(-b, b), b = 1/sqrt(rank) (Kaiming with a = sqrt 5), the rest zero."""
        super().__init__(site, options, generator)
        rank, generator = options.rank, seeded(generator)
        self.a1 = nn.Parameter(torch.empty(site.shape[1], rank))
        self.a2 = nn.Parameter(torch.zeros(rank, site.shape[1]))
        self.b1 = nn.Parameter(torch.empty(site.rows, rank))
        self.b2 = nn.Parameter(torch.zeros(rank, *site.shape[1:]))
        for factor in (self.a1, self.b1):
            nn.init.kaiming_uniform_(factor, a=sqrt(5), generator=generator)

    @classmethod
    def check(cls, site: Site, options: GloraOptions) -> None:
        """Refuse a rank that one of the two matrices cannot have."""
        limit = min(site.rows, site.shape[1])
        if options.rank > limit:
            raise DeltaError(
                f"{site}: rank {options.rank}",
                expected=f"1 .. {limit}, the smaller of its {site.rows} outputs and {site.shape[1]} inputs",
                fix="lower the rank or leave the layer out of the targets",
            )

    def change(self, base: Tensor) -> Tensor:
        """Return s * (W a1 a2 + b1 b2), in the shape of the weight."""
        weight, scale = base.to(self.a1.dtype), self.options.scale
        if weight.dim() == 2:
            return torch.addmm(self.b1 @ self.b2, weight @ self.a1, self.a2, beta=scale, alpha=scale)
        inputs = (weight.movedim(1, -1) @ self.a1 @ self.a2).movedim(-1, 1)
        return scale * (inputs + (self.b1 @ self.b2.flatten(1)).view(self.site.shape))

    def feed(self, x: Tensor, base: Tensor) -> Tensor:
        """Return s * a1(a2(x)) over the channels."""
        x, a1, a2 = hide_inputs(self, x), self.options.scale * self.a1.to(x.dtype), self.a2.to(x.dtype)
        if self.site.op == "linear":
            return F.linear(hide_ranks(self, F.linear(x, a2), len(x)), a1)
        hides = self.training and self.options.rank_dropout > 0
        if x.shape[1] == len(a1) and not x.is_contiguous() and not hides:  # channels last: pixels are rows
            return F.linear(F.linear(x.movedim(1, -1), a2), a1).movedim(-1, 1)
        groups = x.reshape(-1, len(a1), x[0, 0].numel())
        return torch.matmul(a1, hide_ranks(self, torch.matmul(a2, groups), len(groups))).view(x.shape)

    def add_feed(self, fed: Tensor, x: Tensor, base: Tensor, strength: float) -> Tensor:
        """Return `fed` + strength * s * a1(a2(x)), for tokens summed inside the product with a1."""
        if self.site.op != "linear":
            return super().add_feed(fed, x, base, strength)
        hidden = hide_ranks(self, F.linear(hide_inputs(self, x), self.a2.to(x.dtype)), len(x))
        return add_product(fed, hidden, self.a1.to(fed.dtype), strength * self.options.scale)

    def add_rest(self, output: Tensor, call: Call, strength: float) -> Tensor:
        """Return `output` + strength * s * b1(b2(x)), the term that W does not carry."""
        hidden = hide_ranks(self, narrow(hide_inputs(self, call.x), self.b2, call.layer), len(call.x))
        return add_wide(output, hidden, self.b1, call.layer, strength * self.options.scale)

    def pack(self, base: Tensor) -> dict[str, Tensor]:
        """Return the four factors, of a convolution with 1x1 kernels, and `alpha`, such that alpha / rank is our scale."""
        kernel = [1] * (len(self.site.shape) - 2)
        factors = {f"{name}.weight": getattr(self, name).detach() for name in FACTORS}
        wide = {name: t.view(*t.shape, *kernel) if t.dim() == 2 else t for name, t in factors.items()}
        return {**wide, "alpha": torch.tensor(self.options.scale * self.options.rank)}

    @classmethod
    def unpack(cls, site: Site, tensors: Mapping[str, Tensor]) -> Self | None:
        """Read the four factors and, where it is there and not 0, `alpha` (else alpha = rank)."""
        names = {f"{name}.weight" for name in FACTORS}
        if not names <= tensors.keys() <= names | {"alpha"}:
            return None
        rank = tensors["b1.weight"].shape[1] if tensors["b1.weight"].dim() > 1 else 0
        alpha = tensors.get("alpha", torch.zeros(()))
        if site.op not in cls.ops or not rank or alpha.numel() != 1:
            raise DeltaError(
                f"{site}: these are not the tensors of a GLoRA", fix="use the delta with the base it was trained on"
            )
        options = GloraOptions(rank=rank, alpha=float(alpha) or None)
        shapes = sketch(cls, site, options)
        for name in FACTORS:
            ours, theirs = getattr(shapes, name), tensors[f"{name}.weight"]
            if theirs.shape[:2] != ours.shape[:2] or theirs.numel() != ours.numel():
                raise DeltaError(
                    f"{site}: {name}.weight is {'x'.join(map(str, theirs.shape))}",
                    expected="x".join(map(str, ours.shape)),
                    fix="use the delta with the base it was trained on (files in LyCORIS' old order are not read)",
                )
        patch = cls(site, options)
        with torch.no_grad():
            for name in FACTORS:
                ours = getattr(patch, name)
                ours.copy_(tensors[f"{name}.weight"].reshape(ours.shape))
        return patch
