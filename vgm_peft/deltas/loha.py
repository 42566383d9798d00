"""LoHa: the elementwise product of two changes of low rank, dW = s * (up1 @ down1) * (up2 @ down2), of rank up to R^2.

Hyeon-Woo et al. 2022 (FedPara, arXiv 2108.06098, proposition 1) as LyCORIS has it (arXiv 2309.14859, equation 3). Letters: `R`
rank, `O` outputs, `I` inputs.

| here | shape | LyCORIS and its readers |
|---|---|---|
| `up1`, `up2` | (O, R) | `hada_w1_a`, `hada_w2_a`; in Tucker form (R, O) |
| `down1`, `down2` | (R, I[, *kernel]); in Tucker form (R, I) | `hada_w1_b`, `hada_w2_b`, kernel flattened |
| `core1`, `core2` (`tucker`) | (R, R, *kernel) | `hada_t1`, `hada_t2` |

The same dW is a product of rank R^2 whose factors are Khatri-Rao products, `U[o, pq] = up1[o, p] up2[o, q]` and
`V[pq, i] = down1[p, i] down2[q, i]`, so that the forward needs no dense matrix. Per token of a training step the three thin
products cost 3 R^2 (O + I), the dense ones 3 O I; with the weight changed in place of the output only one of these is left
(the gradient of dW), and that is how the patch acts once 3 R^2 (O + I) > O I, or when it is decomposed (see `decomposed`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from vgm_peft.delta import Call, seeded
from vgm_peft.deltas.decomposed import SCALE, Axis, Decomposable, check_axis, read_scale
from vgm_peft.deltas.dropout import check_shares
from vgm_peft.deltas.thin import add_wide, check_rank, check_scale, narrow, sketch, widen
from vgm_peft.errors import DeltaError
from vgm_peft.site import Site

HALVES = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
CORES = frozenset({"hada_t1", "hada_t2"})


@dataclass(frozen=True, kw_only=True)
class LohaOptions:
    """Settings of one LoHa. LyCORIS advises ranks up to 32 and an alpha between 1 and half the rank."""

    rank: int = 8
    """R of each half; dW has rank up to R^2. Above about the root of a sixth of the layer's side it is computed densely."""
    alpha: float | None = 1.0
    """The change is scaled by alpha / rank. Its factors begin large, so it learns fast: hence 1. None is alpha = rank."""
    tucker: bool = False
    """Keep the kernel of a convolution in a factor of its own (R, R, *kernel)."""
    decompose: Axis | None = None
    """Give every output or every input a magnitude of its own, as DoRA does (LyCORIS' `dora_wd`)."""
    absolute: bool = False
    """`magnitude` is the norm itself, as other tools' files have it, and not what is added to the norm of the base."""
    rank_dropout: float = 0.0
    """Share of the rows of dW hidden while training, for all pictures alike; the rest is scaled up by 1 / (1 - p)."""
    module_dropout: float = 0.0
    """Share of the forwards of training in which the layer goes without the patch."""

    def __post_init__(self) -> None:
        check_scale(self.rank, self.alpha)
        check_shares(self)
        check_axis("decompose", self.decompose)

    @property
    def scale(self) -> float:
        """s, what the product is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class Loha(Decomposable):
    """dW = s * (up1 @ down1) * (up2 @ down2) on a linear or conv layer; starts at zero because `up2` does."""

    kind = "loha"
    Options = LohaOptions
    ops = frozenset({"linear", "conv"})
    examples = (
        LohaOptions(rank=2, alpha=24.0),
        LohaOptions(rank=1),
        LohaOptions(rank=3),
        LohaOptions(rank=2, tucker=True),
        LohaOptions(rank=2, decompose="output"),
    )
    options: LohaOptions
    up1: Tensor
    up2: Tensor
    down1: Tensor
    down2: Tensor
    core1: Tensor
    core2: Tensor

    def __init__(self, site: Site, options: LohaOptions, generator: torch.Generator | None = None) -> None:
        """Draw as LyCORIS: `up1` from N(0, 0.1), `down1` and `down2` from N(0, 1), the cores from N(0, 0.1)."""
        kernel = site.shape[2:]
        options = replace(options, tucker=options.tucker and any(k != 1 for k in kernel))
        super().__init__(site, options, generator)
        rank, inputs, generator = options.rank, site.shape[1], seeded(generator)
        for half in "12":
            up, down = torch.zeros(site.rows, rank), torch.empty(rank, inputs, *(() if options.tucker else kernel))
            self.register_parameter(f"up{half}", nn.Parameter(up))
            self.register_parameter(f"down{half}", nn.Parameter(nn.init.normal_(down, generator=generator)))
            if options.tucker:
                core = nn.init.normal_(torch.empty(rank, rank, *kernel), std=0.1, generator=generator)
                self.register_parameter(f"core{half}", nn.Parameter(core))
        nn.init.normal_(self.up1, std=0.1, generator=generator)
        if 3 * rank**2 * (site.rows + site.columns) > site.rows * site.columns:
            self.acts = "weight"
        self.add_magnitude()

    @classmethod
    def check(cls, site: Site, options: LohaOptions) -> None:
        """Refuse a rank that no half of the layer's matrix can have."""
        check_rank(site, options.rank)

    def _halves(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return up (O, R) and down (R, I[, *kernel]) of both halves, the cores folded into the latter."""
        if not self.options.tucker:
            return (self.up1, self.down1), (self.up2, self.down2)
        down1 = torch.einsum("mn...,ni->mi...", self.core1, self.down1)
        return (self.up1, down1), (self.up2, torch.einsum("mn...,ni->mi...", self.core2, self.down2))

    def inner(self) -> Tensor:
        """Return s * (up1 @ down1) * (up2 @ down2) in the shape of the weight."""
        return self._product(None, 1.0)

    def total(self, base: Tensor) -> Tensor:
        """Return W + dW, summed inside the product."""
        return self._product(base.to(self.up1.dtype), 1.0)

    def add_change(self, weight: Tensor, base: Tensor, strength: float) -> Tensor:
        """Return `weight` + strength * dW, summed inside the product where nothing else is to be done."""
        if self.options.decompose is not None or self.hides_rows or weight.dtype != self.up1.dtype:
            return super().add_change(weight, base, strength)
        return self._product(weight, strength)

    def _product(self, weight: Tensor | None, strength: float) -> Tensor:
        """Return strength * s * (up1 @ down1) * (up2 @ down2) in the shape of the weight, added to one where given."""
        (up1, down1), (up2, down2) = self._halves()
        factors = (up1, down1.flatten(1), up2, down2.flatten(1))
        matrix = None if weight is None else weight.flatten(1)
        return cast(Tensor, _Product.apply(matrix, strength * self.options.scale, *factors)).view(self.site.shape)

    def _pair(self) -> tuple[Tensor, Tensor]:
        """Return V (R^2, I[, *kernel]) and s * U (O, R^2)."""
        (up1, down1), (up2, down2) = self._halves()
        down = (down1.unsqueeze(1) * down2.unsqueeze(0)).flatten(0, 1)
        return down, (self.options.scale * up1.unsqueeze(2) * up2.unsqueeze(1)).flatten(1)

    def contribution(self, call: Call) -> Tensor:
        """Return dW x as two thin products, or densely where R^2 is too large for that to pay."""
        if self._is_dense():
            return super().contribution(call)
        down, up = self._pair()
        return widen(narrow(call.x, down, call.layer), up, call.layer)

    def add_to(self, output: Tensor, call: Call, strength: float) -> Tensor:
        """Return `output + strength * contribution`, summed inside the second product."""
        if self.hides_rows or self._is_dense():
            return super().add_to(output, call, strength)
        down, up = self._pair()
        return add_wide(output, narrow(call.x, down, call.layer), up, call.layer, strength)

    def _is_dense(self) -> bool:
        rows, columns = self.site.rows, self.site.columns
        return self.options.decompose is not None or self.options.rank**2 * (rows + columns) > rows * columns

    def pack(self, base: Tensor) -> dict[str, Tensor]:
        """Return the factors under `hada_` names, `alpha`, and `dora_scale` of a decomposed one."""
        tensors = {"hada_w1_b": self.down1, "hada_w2_b": self.down2}
        if self.options.tucker:
            tensors |= {"hada_w1_a": self.up1.t().contiguous(), "hada_w2_a": self.up2.t().contiguous()}
            tensors |= {"hada_t1": self.core1, "hada_t2": self.core2}
        else:
            tensors = {name: down.flatten(1) for name, down in tensors.items()} | {"hada_w1_a": self.up1, "hada_w2_a": self.up2}
        scale = torch.tensor(self.options.scale * self.options.rank)
        return {**{name: t.detach() for name, t in tensors.items()}, "alpha": scale, **self.pack_magnitude(base)}

    @classmethod
    def unpack(cls, site: Site, tensors: Mapping[str, Tensor]) -> Self | None:
        """Read the `hada_` tensors, Tucker form and `dora_scale` too; a missing or zero alpha is alpha = rank."""
        names = frozenset(tensors) - {"alpha", SCALE}
        if names not in (HALVES, HALVES | CORES):
            return None
        tucker, down = bool(CORES & names), tensors["hada_w1_b"]
        rank = len(down) if down.dim() > 1 else 0
        alpha = float(tensors["alpha"]) if "alpha" in tensors else 0.0
        axis, g = read_scale(site, tensors[SCALE]) if SCALE in tensors and site.op in cls.ops else (None, None)
        options = LohaOptions(rank=max(rank, 1), alpha=alpha or None, tucker=tucker, decompose=axis, absolute=axis is not None)
        shapes = dict(sketch(cls, site, options).named_parameters()) if site.op in cls.ops else {}
        found: dict[str, Tensor] = {}
        for name in sorted(names):
            up, half = name.endswith("_a"), name[6]
            own = f"{'core' if 't' in name else 'up' if up else 'down'}{half}"
            mine = shapes.get(own)
            found[own] = tensors[name].t() if tucker and up and tensors[name].dim() == 2 else tensors[name]
            if mine is None or mine.numel() != found[own].numel() or mine.shape[0] != found[own].shape[0]:
                raise DeltaError(
                    f"{site}: {name} {tuple(tensors[name].shape)} is no factor of its weight",
                    fix="use the delta with the base it was trained on",
                )
        patch = cls(site, options)
        with torch.no_grad():
            for own, tensor in found.items():
                mine = patch.get_parameter(own)
                mine.copy_(tensor.reshape(mine.shape))
        patch.take_magnitude(g)
        return patch


class _Product(torch.autograd.Function):
    """s * (up1 @ down1) * (up2 @ down2), added to a matrix or not. Keeps the factors and makes the two halves once more."""

    @staticmethod
    def forward(
        ctx: Any, matrix: Tensor | None, scale: float, up1: Tensor, down1: Tensor, up2: Tensor, down2: Tensor
    ) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(up1, down1, up2, down2)
        with torch.autocast(up1.device.type, enabled=False):
            first, second = up1 @ down1, up2 @ down2
            return first.mul_(scale).mul_(second) if matrix is None else torch.addcmul(matrix, first, second, value=scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        up1, down1, up2, down2 = ctx.saved_tensors
        with torch.autocast(up1.device.type, enabled=False):
            scaled = ctx.scale * gradients[0]
            first, second = (up2 @ down2).mul_(scaled), (up1 @ down1).mul_(scaled)
            own = gradients[0] if ctx.needs_input_grad[0] else None
            return own, None, first @ down1.t(), up1.t() @ first, second @ down2.t(), up2.t() @ second
