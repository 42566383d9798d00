"""OFT: the weight is rotated, block by block, dW = (R - I) W on the output side or W (R - I)^T on the input side.

Qiu et al. 2023 (arXiv 2306.07280, equations 2 and 3): R is block-diagonal, each block Cayley's map of a skew-symmetric Q
(section 3.3; see `rotation`), so that angles between neurons stay. Constrained OFT (equation 4) bounds the norm of all Q.
Strength interpolates between W and the rotated weight. Letters: `K` blocks of size `b`.

| here | shape | LyCORIS, kohya (output side) | peft (input side) |
|---|---|---|---|
| `skew` | (K, b (b - 1) / 2), the upper triangle of Q | `oft_blocks` (K, b, b) = B, Q = B - B^T | `oft_R.weight` |
| `stretch` (`rescale`) | (O,), begins at 0 | `rescale` (O, 1[, ...]) = 1 + stretch | - |

Conventions differ: on the output side the block is transposed, y -> R^T y, as in LyCORIS; on the input side it is x -> R^T x,
as in peft, whose exact mode (not its default) takes -Q. A kernel is rotated alike in all its places on both sides, while peft
rotates whole patches of a convolution on the input side: those files are not read, except for 1x1 kernels. `alpha` in files
is the constraint; tools differ over its unit, so `pack` writes the clamped Q and an alpha too large to act.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self, cast

import torch
from torch import Tensor, nn

from vgm_peft.delta import Call, along_outputs
from vgm_peft.deltas.divisors import divisor
from vgm_peft.deltas.dropout import check_shares, hide_blocks
from vgm_peft.deltas.rotation import block_of, bound_of, cayley, limited, neumann, skew, spelled, triangle, turn, wide
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.shares import Deriving, Source
from vgm_peft.site import Site

PEFT_TERMS = 5
"""Terms of the series by which peft rotates unless told otherwise."""


@dataclass(frozen=True, kw_only=True)
class OftOptions:
    """Settings of one OFT."""

    block: int | None = None
    """b, a divisor of the rotated side. None: 32 as in peft, or the next smaller divisor."""
    side: Literal["output", "input"] = "output"
    """What is rotated: the outputs as in LyCORIS (files that other tools read), or the inputs as in the paper and peft."""
    constraint: float | None = None
    """Constrained OFT: the norm of all Q is at most this times the size of the side; 1e-4 .. 1e-3 are usual."""
    rescale: bool = False
    """Train a factor for every output too (output side only)."""
    terms: int = 0
    """0 is Cayley's map itself; 4 or more that many terms of its series, quicker on a GPU and nearly orthogonal."""
    block_dropout: float = 0.0
    """Share of the blocks that rotate nothing while training, drawn in every forward (peft's multiplicative dropout)."""
    module_dropout: float = 0.0
    """Share of the forwards of training in which the layer goes without the patch."""

    def __post_init__(self) -> None:
        check_shares(self)
        if self.block is not None and self.block < 2:
            raise ConfigError(f"block = {self.block}", expected="2 or more")
        if self.constraint is not None and not self.constraint > 0:
            raise ConfigError(f"constraint = {self.constraint}", expected="above 0", fix="leave it out for plain OFT")
        if self.rescale and self.side == "input":
            raise ConfigError('rescale with side = "input"', expected='side = "output"')
        if self.terms not in (0, *range(4, 65)):
            raise ConfigError(f"terms = {self.terms}", expected="0, or 4 .. 64")


class Oft(Deriving):
    """A rotation of the outputs or inputs of a linear or conv layer; starts at the identity because Q is zero."""

    kind = "oft"
    Options = OftOptions
    ops = frozenset({"linear", "conv"})
    rate = 0.6
    examples = (
        OftOptions(block=4),
        OftOptions(block=2, side="input"),
        OftOptions(block=4, constraint=0.02, rescale=True),
        OftOptions(block=4, side="input", terms=6),
    )
    base_free = False
    joins = True
    options: OftOptions

    def __init__(self, site: Site, options: OftOptions, generator: torch.Generator | None = None) -> None:
        """Begin with Q = 0. Raises `DeltaError` when the block does not divide the side, or the side has but one channel."""
        size, noun = (site.rows, "outputs") if options.side == "output" else (site.shape[1], "inputs")
        block = divisor(site, "block", options.block, 32, (size, noun))
        if block < 2:
            raise DeltaError(f"{site}: no block divides its {size} {noun}", fix="leave the layer out of the targets")
        super().__init__(site, replace(options, block=block), generator)
        self.skew = nn.Parameter(torch.zeros(size // block, block * (block - 1) // 2))
        if options.rescale:
            self.stretch = nn.Parameter(torch.zeros(site.rows))
        self.acts = "output" if options.side == "output" else "input"
        self.packs_alone = options.side == "output" and not options.terms

    def source(self) -> Source:
        """Return the triangles of Q (K, b (b - 1) / 2), constrained, in float32 or wider."""
        options, values = self.options, wide(self.skew)
        block = cast(int, options.block)
        if options.constraint is not None:
            values = limited(values, options.constraint * len(values) * block)
        return Source((block, options.terms), values)

    @classmethod
    def derive(cls, sort: tuple[int, int], values: Tensor) -> tuple[Tensor]:
        """Return R - I (K, b, b) from triangles of Q."""
        block, terms = sort
        turned = neumann(skew(values, block), terms) if terms else cayley(values, block)
        return (turned.contiguous(),)  # each patch multiplies by its own blocks

    def turned(self) -> Tensor:
        """Return R - I (K, b, b), in float32 or wider."""
        return self.derived()[0]

    def change(self, base: Tensor) -> Tensor:
        """Return the rotated (and rescaled) weight minus the weight."""
        weight = base.to(self.skew.dtype)
        blocks = self.turned().to(weight.dtype).mT
        if self.options.side == "input":
            return turn(weight, blocks, 1)
        change = torch.bmm(blocks, weight.reshape(*blocks.shape[:2], -1)).view(base.shape)
        if self.options.rescale:
            change = change + self.stretch.view(-1, *[1] * (base.dim() - 1)) * (change + weight)
        return change

    def contribution(self, call: Call) -> Tensor:
        """Return the layer's own product times R - I, or W times what is fed."""
        if self.options.side == "input" or self._crosses_groups(call.layer):
            return super().contribution(call)
        product = call.product(self.site)
        change = turn(product, hide_blocks(self, self.turned()), -1 if self.site.op == "linear" else 1)
        if self.options.rescale:
            change = change + along_outputs(self.stretch.to(change.dtype), call.x, call.layer) * (change + product)
        return change

    def _crosses_groups(self, layer: nn.Module) -> bool:
        """Whether a block mixes outputs of different groups: each sees its own inputs, so their products do not mix."""
        return self.site.op == "conv" and self.site.rows // cast(nn.Conv2d, layer).groups % cast(int, self.options.block) > 0

    def feed(self, x: Tensor, base: Tensor) -> Tensor:
        """Return (R - I)^T x; in a convolution with groups every group's channels are rotated alike."""
        blocks = hide_blocks(self, self.turned())
        if self.site.op == "linear":
            return turn(x, blocks, -1)
        groups = x.shape[1] // self.site.shape[1]
        return turn(x, blocks if groups == 1 else blocks.repeat(groups, 1, 1), 1)

    def pack(self, base: Tensor) -> dict[str, Tensor]:
        """Return `oft_blocks` = Q / 2, an `alpha` that clamps nothing and `rescale`; the input side and series densely."""
        if not self.packs_alone:
            return super().pack(base)
        q = skew(self.source().values, cast(int, self.options.block)).to(self.skew.dtype)
        return spelled(self.site, q, self.stretch if self.options.rescale else None)

    def adapt(self) -> dict[str, Tensor] | None:
        """Return `oft_R.weight` and `oft_terms`, where inputs are rotated and there is no kernel."""
        if self.options.side == "output" or not _is_pointlike(self.site):
            return None
        values, terms = self.source().values.detach().to(self.skew.dtype), self.options.terms
        return {"oft_R.weight": values if terms else -values, "oft_terms": torch.tensor(terms)}

    @classmethod
    def unpack(cls, site: Site, tensors: Mapping[str, Tensor]) -> Self | None:
        """Read `oft_blocks` with three axes (LyCORIS, kohya), or `oft_R.weight` (peft, OneTrainer).

        `oft_terms` beside the latter is the length of its series, peft's default if it is missing; 0 is peft's exact mode.
        """
        if {"oft_R.weight"} <= tensors.keys() <= {"oft_R.weight", "oft_terms"}:
            return cls._of_peft(site, tensors["oft_R.weight"], int(tensors.get("oft_terms", torch.tensor(PEFT_TERMS))))
        if not {"oft_blocks"} <= tensors.keys() <= {"oft_blocks", "alpha", "rescale"} or tensors["oft_blocks"].dim() != 3:
            return None
        blocks, rescale = tensors["oft_blocks"], tensors.get("rescale")
        count, size, other = blocks.shape
        wrong = rescale is not None and rescale.numel() != site.rows
        if site.op not in cls.ops or size != other or size < 2 or count * size != site.rows or wrong:
            raise _misfit(site, "oft_blocks", blocks)
        patch = cls(site, OftOptions(block=size, constraint=bound_of(tensors), rescale=rescale is not None))
        with torch.no_grad():
            patch.skew.copy_((blocks - blocks.mT).flatten(1)[:, triangle(size)])
            if rescale is not None:
                patch.stretch.copy_(rescale.flatten() - 1)
        return patch

    @classmethod
    def _of_peft(cls, site: Site, values: Tensor, terms: int) -> Self:
        """Read triangles (K, b (b - 1) / 2), or (1, ...) shared by all blocks."""
        block = block_of(values.shape[1]) if values.dim() == 2 else None
        if block is None or not _is_pointlike(site) or site.columns % block or len(values) not in (1, site.columns // block):
            raise _misfit(site, "oft_R.weight", values)
        patch = cls(site, OftOptions(block=block, side="input", terms=terms))
        with torch.no_grad():
            patch.skew.copy_((values if terms else -values).expand_as(patch.skew))
        return patch


def _is_pointlike(site: Site) -> bool:
    """Whether a layer is one whose inputs peft rotates as we do: it has no kernel, or one of 1x1."""
    return site.op == "linear" or site.op == "conv" and site.columns == site.shape[1]


def _misfit(site: Site, name: str, tensor: Tensor) -> DeltaError:
    return DeltaError(
        f"{site}: {name} {'x'.join(map(str, tensor.shape))} does not rotate its weight",
        fix="use the delta with the base it was trained on",
    )
