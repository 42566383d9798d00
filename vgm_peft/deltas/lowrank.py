"""What the LoRA family shares: the pair `down`, `up`, its training, its spelling in other tools' files. Products are `thin`'s.

Letters: `R` rank, `O` outputs, `I` inputs, `B` pictures. The pair multiplies to dW = s * up @ down. In a convolution `down`
has the layer's own kernel and `up` is 1x1; in one with groups each group of outputs has the same `down` for its own inputs.

| here | shape | kohya, LyCORIS | diffusers, peft |
|---|---|---|---|
| `down` | (R, I), conv (R, I/groups, *kernel) | `lora_down.weight` | `lora_A.weight` |
| `up` | (O, R) | `lora_up.weight`, conv (O, R, 1, 1) | `lora_B.weight`, conv (O, R, 1, 1) |

The scale s is no tensor here but follows from the options; `pack` writes it as `alpha`, such that alpha / rank is s. LoCon
files in Tucker form keep the kernel in a third factor, `lora_mid.weight` (R, R, *kernel), between two 1x1 convolutions;
folded into `down` it gives exactly the same dW at the same rank, and that is how they are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from vgm_peft.delta import Call, Patch, seeded
from vgm_peft.deltas.dropout import check_shares, hide_inputs, hide_ranks
from vgm_peft.deltas.thin import add_wide, check_product, check_rank, check_scale, narrow, widen
from vgm_peft.errors import DeltaError
from vgm_peft.site import Op, Site

DOWN, UP, MID, ALPHA = "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha"


@dataclass(frozen=True, kw_only=True)
class LowRankOptions:
    """Settings of one pair. The defaults are those of peft."""

    rank: int = 8
    """R: 4 .. 32 are usual; a higher rank learns more and generalises less."""
    alpha: float | None = None
    """The change is scaled by alpha / rank; None is alpha = rank, so no scaling."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, which keeps the step size alike over ranks."""
    dropout: float = 0.0
    """Share of the layer's inputs hidden from `down` while training."""
    rank_dropout: float = 0.0
    """Share of the ranks hidden from each picture while training; what is left is scaled up by 1 / (1 - p)."""
    module_dropout: float = 0.0
    """Share of the forwards of training in which the layer goes without the patch."""

    def __post_init__(self) -> None:
        check_scale(self.rank, self.alpha)
        check_shares(self)

    @property
    def scale(self) -> float:
        """s, what `up @ down` is multiplied by."""
        alpha = float(self.rank) if self.alpha is None else self.alpha
        return alpha / (sqrt(self.rank) if self.rslora else self.rank)


class Pair(NamedTuple):
    """Two factors and the scale of their product."""

    down: Tensor
    up: Tensor
    scale: float

    def product(self) -> Tensor:
        """Return s * up @ down as a matrix, (O, columns)."""
        return self.scale * (self.up @ self.down.flatten(1))


class Spelled(NamedTuple):
    """A pair as a file has it, in our shapes."""

    down: Tensor
    up: Tensor
    options: LowRankOptions
    """Its rank and alpha."""


class LowRank(Patch):
    """dW = s * up @ down; starts at zero because `up` does. Methods say which factors that are, and how ranks are weighed."""

    ops: ClassVar[frozenset[Op]] = frozenset({"linear", "conv"})

    def __init__(self, site: Site, options: LowRankOptions, generator: torch.Generator | None = None) -> None:
        """Draw `down` from U(-b, b), b = 1/sqrt(columns) (Kaiming with a = sqrt 5)."""
        super().__init__(site, options, generator)
        self.down = nn.Parameter(torch.empty(options.rank, *site.shape[1:]))
        self.up = nn.Parameter(torch.zeros(site.rows, options.rank))
        if not self.down.is_meta:  # where there is nothing to draw, drawing takes long all the same
            nn.init.kaiming_uniform_(self.down, a=sqrt(5), generator=seeded(generator))

    @classmethod
    def check(cls, site: Site, options: LowRankOptions) -> None:
        """Refuse a rank that the layer's matrix cannot have."""
        check_rank(site, options.rank)

    def pair(self) -> Pair:
        """Return the factors that dW is the product of."""
        return Pair(self.down, self.up, self.options.scale)

    def live_pair(self) -> Pair:
        """Return the factors of this one forward: others than `pair` only where training draws among them."""
        return self.pair()

    def weigh(self, hidden: Tensor, pictures: int) -> Tensor:
        """Return `down(x)` with its ranks weighed: (tokens of all pictures, R) or (B, groups * R, *spatial); as it is here."""
        return hidden

    def change(self, base: Tensor) -> Tensor:
        """Return s * up @ down in the shape of the weight."""
        return self.pair().product().view(self.site.shape)

    def contribution(self, call: Call) -> Tensor:
        """Return s * up(down(x)): two thin products in place of one wide."""
        down, up, scale = self.live_pair()
        wide = widen(self.hidden(call, down), up, call.layer)
        return scale * (wide.view(*call.x.shape[:-1], len(up)) if self.site.op == "linear" else wide)

    def add_to(self, output: Tensor, call: Call, strength: float) -> Tensor:
        """Return `output + strength * contribution`, scaled and summed inside the product with `up`."""
        down, up, scale = self.live_pair()
        return add_wide(output, self.hidden(call, down), up, call.layer, strength * scale)

    def hidden(self, call: Call, down: Tensor) -> Tensor:
        """Return down(x): (tokens of all pictures, R) for linear, (B, groups * R, *spatial) for conv."""
        x = hide_inputs(self, call.x)
        rows = x.reshape(-1, x.shape[-1]) if self.site.op == "linear" else x
        return self.weigh(hide_ranks(self, narrow(rows, down, call.layer), len(x)), len(x))

    def pack(self, base: Tensor) -> dict[str, Tensor]:
        """Return `lora_down.weight`, `lora_up.weight` and `alpha`, the latter such that alpha / rank is our scale."""
        down, up, scale = self.pair()
        up = up.detach()
        return {
            DOWN: down.detach(),
            UP: up.reshape(*up.shape, *[1] * (len(self.site.shape) - 2)),
            ALPHA: torch.tensor(scale * up.shape[1]),
        }

    def take(self, spelled: Spelled) -> Self:
        """Set the two factors to those of a file, in the dtype of this patch, and return self; one on meta gets its memory."""
        self.down, self.up = _filled(self.down, spelled.down), _filled(self.up, spelled.up)
        return self


def _filled(own: nn.Parameter, values: Tensor) -> nn.Parameter:
    memory = torch.empty(own.shape, dtype=own.dtype, device="cpu" if own.is_meta else own.device)
    return nn.Parameter(memory.copy_(values.detach()), own.requires_grad)


def read_pair(site: Site, tensors: Mapping[str, Tensor], others: frozenset[str] = frozenset()) -> Spelled | None:
    """Return the pair that `lora_down`, `lora_up` and, where they are there, `lora_mid` and `alpha` spell for a site.

    None unless these and all of `others` are the names. A missing or zero alpha is alpha = rank, as kohya has it. Raises
    `DeltaError` when the factors do not multiply to the site's weight.
    """
    if not {DOWN, UP} | others <= tensors.keys() <= {DOWN, UP, MID, ALPHA} | others:
        return None
    down, up, alpha = tensors[DOWN], tensors[UP], tensors.get(ALPHA, torch.zeros(()))
    if MID in tensors and min(down.dim(), tensors[MID].dim()) > 1 and tensors[MID].shape[1] == down.numel() // down.shape[1]:
        mid = tensors[MID].float()
        check_product(site, len(mid), mid[0, 0].numel() * down.shape[1])
        down = torch.einsum("mn...,ni->mi...", mid, down.flatten(1).float())
    rank = down.shape[0] if down.dim() else 0
    fits = down.shape[1:2] == site.shape[1:2] and down.numel() == rank * site.columns
    fits &= up.shape[:2] == (site.rows, rank) and up.numel() == site.rows * rank
    if site.op not in LowRank.ops or not rank or not fits:
        found = ", ".join(f"{name} {spell(tensors[name])}" for name in (DOWN, MID, UP) if name in tensors)
        raise DeltaError(
            f"{site}: {found} do not multiply to its weight",
            expected=f"Rx{'x'.join(map(str, site.shape[1:]))} and {site.rows}xR",
            fix="use the delta with the base it was trained on",
        )
    if alpha.numel() != 1:
        raise DeltaError(f"{site}: alpha {spell(alpha)}", expected="one number")
    options = LowRankOptions(rank=rank, alpha=float(alpha) or None)
    return Spelled(down.reshape(rank, *site.shape[1:]), up.reshape(site.rows, rank), options)


def spell(tensor: Tensor) -> str:
    """Return a shape as `4x320`."""
    return "x".join(map(str, tensor.shape)) or "scalar"
