"""BOFT: a side is rotated by a product of sparse rotations, in the pattern of the fast Fourier transform's butterflies.

Liu et al. 2024 (arXiv 2311.06243, section 4, equation 2). With M = R_m ... R_2 R_1 it is dW = (M - I) W on the output side, as
LyCORIS has it, or W (M - I)^T on the input side, as the paper and peft. Each R_i is, up to a fixed order of the C channels of
that side, block-diagonal with blocks of even size b, which are Cayley's maps of skew-symmetric Q (see `rotation`); the number
of blocks K = C / b can be halved m - 1 times, and with m = 1 + log2(K) factors every channel is mixed with every other.

| here | shape | LyCORIS and its readers (output side) | peft (input side) |
|---|---|---|---|
| `skew` | (m, K, b (b - 1) / 2), the upper triangles of Q | `oft_blocks` (m, K, b, b) = B, Q = B - B^T | `boft_R` = X |
| `stretch` (`rescale`) | (O,), begins at 0 | `rescale` (O, 1[, ...]) = 1 + stretch | `boft_s` (O, 1) |

In a block LyCORIS and we count l before the bit of u (see `butterfly`), peft the bit first, and its Q is -(X - X^T) / 2.
A kernel is rotated alike in all its places, while peft rotates whole patches of a convolution: of those files, only 1x1
kernels are read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, cast

import torch
from torch import Tensor, nn

from vgm_peft.delta import Call, along_outputs, apply_dense
from vgm_peft.deltas.butterfly import change, merged, weight_changes
from vgm_peft.deltas.channels import along_rows
from vgm_peft.deltas.divisors import divisors
from vgm_peft.deltas.dropout import check_shares, hide_blocks
from vgm_peft.deltas.rotation import bound_of, cayley, limited, skew, spelled, triangle, wide
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.shares import Deriving, Source
from vgm_peft.site import Site


@dataclass(frozen=True, kw_only=True)
class BoftOptions:
    """Settings of one BOFT."""

    block: int | None = None
    """b, even, such that C / b is a power of two, or with `factors` can be halved that often less one. None: 4, or near it."""
    factors: int | None = None
    """m, 1 .. 1 + log2(C / b). None: all, as in LyCORIS; 1 is OFT."""
    side: Literal["output", "input"] = "output"
    """What is rotated: the outputs as in LyCORIS (files that other tools read), or the inputs as in the paper and peft."""
    constraint: float | None = None
    """The norm of all Q is at most this times C; 1e-4 .. 1e-3 are usual."""
    rescale: bool = False
    """Train a factor for every output too."""
    block_dropout: float = 0.0
    """Share of the blocks that rotate nothing while training, drawn in every forward (peft's multiplicative dropout)."""
    module_dropout: float = 0.0
    """Share of the forwards of training in which the layer goes without the patch."""

    def __post_init__(self) -> None:
        check_shares(self)
        if self.side not in ("output", "input"):
            raise ConfigError(f'side = "{self.side}"', expected="output or input")
        if self.block is not None and (self.block < 2 or self.block % 2):
            raise ConfigError(f"block = {self.block}", expected="an even number")
        if self.factors is not None and self.factors < 1:
            raise ConfigError(f"factors = {self.factors}", expected="1 or more")
        if self.constraint is not None and not self.constraint > 0:
            raise ConfigError(f"constraint = {self.constraint}", expected="above 0", fix="leave it out for plain BOFT")


class Boft(Deriving):
    """A butterfly rotation of the outputs or inputs of a linear or conv layer; starts at the identity because Q is zero."""

    kind = "boft"
    Options = BoftOptions
    ops = frozenset({"linear", "conv"})
    rate = 0.6
    examples = (
        BoftOptions(),
        BoftOptions(constraint=0.02, rescale=True),
        BoftOptions(factors=1),
        BoftOptions(side="input", rescale=True),
    )
    base_free = False
    joins = True
    makes_changes = True
    options: BoftOptions

    def __init__(self, site: Site, options: BoftOptions, generator: torch.Generator | None = None) -> None:
        """Begin with Q = 0. Raises `DeltaError` when block or factors do not fit the side."""
        size, noun = (site.rows, "outputs") if options.side == "output" else (site.shape[1], "inputs")
        block = _block(site, options, (size, noun))
        count = size // block
        most = (count & -count).bit_length()
        if options.factors is not None and options.factors > most:
            raise DeltaError(
                f"{site}: {options.factors} butterfly factors of {count} blocks", expected=f"1 .. {most}", fix="lower factors"
            )
        factors = options.factors or most
        super().__init__(site, replace(options, block=block, factors=factors), generator)
        self.skew = nn.Parameter(torch.zeros(factors, count, block * (block - 1) // 2))
        if options.rescale:
            self.stretch = nn.Parameter(torch.zeros(site.rows))
        self.packs_alone = options.side == "output"
        self.acts = "output" if options.side == "output" else "weight"

    def source(self) -> Source:
        """Return the triangles of Q (K, m, b (b - 1) / 2), constrained, in float32 or wider."""
        options, values = self.options, wide(self.skew)
        if options.constraint is not None:
            values = limited(values, options.constraint * len(values[0]) * cast(int, options.block))
        return Source((options.side, options.block), values.transpose(0, 1))

    @classmethod
    def derive(cls, sort: tuple[str, int], values: Tensor) -> tuple[Tensor, ...]:
        """Return the blocks of every pass from triangles of Q."""
        return merged(cayley(values.transpose(0, 1), sort[1]))

    def _values(self) -> Tensor:
        """Return the triangles of Q (m, K, b (b - 1) / 2), constrained, in float32 or wider."""
        return self.source().values.transpose(0, 1)

    def q(self) -> Tensor:
        """Return Q (m, K, b, b), constrained, in float32 or wider."""
        return skew(self._values(), cast(int, self.options.block))

    def _live(self) -> tuple[Tensor, ...]:
        """Return the blocks of every pass, without those blocks of factors that training hides now."""
        hides = self.training and self.options.block_dropout
        return merged(hide_blocks(self, cayley(self._values(), cast(int, self.options.block)))) if hides else self.derived()

    def _change(self, y: Tensor, blocks: tuple[Tensor, ...]) -> Tensor:
        """Return what the factors add to `y` (B, C, N): channels are reordered in whole rows of tokens or pixels."""
        return change(y, blocks, cast(int, self.options.factors), cast(int, self.options.block) // 2)

    def change(self, base: Tensor) -> Tensor:
        """Return the rotated (and rescaled) weight minus the weight."""
        weight = self._sides(base.to(self.skew.dtype))
        change = self._change(weight.flatten(1).unsqueeze(0), self.derived())
        return self._rescaled(self._sides(change.view(weight.shape)), base)

    def live_change(self, base: Tensor) -> Tensor:
        """Return the same to the rounding of the weight, in training without the blocks that are hidden now."""
        shared = self.shared_change()
        return self.changes([self], self._live(), [base])[0] if shared is None else shared

    @classmethod
    def changes(cls, patches: Sequence[Deriving], derived: tuple[Tensor, ...], bases: Sequence[Tensor]) -> list[Tensor]:
        """Return what joins the weights of patches whose rotations were derived together."""
        mine = cast(Sequence[Boft], patches)
        sides = [patch._sides(base.to(patch.skew.dtype)) for patch, base in zip(mine, bases, strict=True)]
        factors, half = cast(int, mine[0].options.factors), cast(int, mine[0].options.block) // 2
        changes = weight_changes([weight.flatten(1) for weight in sides], derived, factors, half)
        turned = (patch._sides(change.view(weight.shape)) for patch, change, weight in zip(mine, changes, sides, strict=True))
        return [patch._rescaled(change, base) for patch, change, base in zip(mine, turned, bases, strict=True)]

    def _sides(self, weight: Tensor) -> Tensor:
        """Return a weight with the side that is rotated first, or such a one as it was."""
        return weight if self.options.side == "output" else weight.transpose(0, 1)

    def _rescaled(self, change: Tensor, base: Tensor) -> Tensor:
        """Return the change of a weight with what factors of the outputs add to it."""
        return change + along_rows(self.stretch, base) * (change + base) if self.options.rescale else change

    def contribution(self, call: Call) -> Tensor:
        """Return the rotation's change of the layer's own product; dense on the input side, and where it would mix groups."""
        if self.options.side == "input" or self.site.op == "conv" and cast(nn.Conv2d, call.layer).groups > 1:
            return apply_dense(self.live_change(call.base).to(call.x.dtype), call.x, call.layer, self.site)
        blocks = self._live()
        product = call.product(self.site)
        if self.site.op == "linear":
            rows = product.reshape(-1, self.site.rows).t().contiguous().unsqueeze(0)
            change = self._change(rows, blocks)[0].t().reshape(product.shape)
        else:
            change = self._change(product.flatten(2), blocks).view(product.shape)
        if self.options.rescale:
            change = change + along_outputs(self.stretch.to(change.dtype), call.x, call.layer) * (change + product)
        return change

    def pack(self, base: Tensor) -> dict[str, Tensor]:
        """Return `oft_blocks` = Q / 2 with four axes, an `alpha` that clamps nothing, and `rescale`; the input side densely."""
        if self.options.side == "input":
            return super().pack(base)
        return spelled(self.site, self.q().to(self.skew.dtype), self.stretch if self.options.rescale else None)

    def adapt(self) -> dict[str, Tensor] | None:
        """Return `boft_R` and `boft_s`, where inputs are rotated and there is no kernel."""
        if self.options.side == "output" or not _is_pointlike(self.site):
            return None
        order = _peft_order(cast(int, self.options.block)).argsort()
        blocks = -self.q().detach()[..., order, :][..., order]  # which is skew-symmetric, so that (X - X^T) / 2 is X
        factor = 1 + self.stretch.detach() if self.options.rescale else torch.ones(self.site.rows, device=self.skew.device)
        return {"boft_R": blocks.to(self.skew.dtype), "boft_s": factor.to(self.skew.dtype)}

    @classmethod
    def unpack(cls, site: Site, tensors: Mapping[str, Tensor]) -> Self | None:
        """Read `oft_blocks` with four axes (LyCORIS; `alpha` is the constraint), or `boft_R` and `boft_s` (peft)."""
        if set(tensors) == {"boft_R", "boft_s"}:
            return cls._of_peft(site, tensors["boft_R"], tensors["boft_s"])
        if not {"oft_blocks"} <= tensors.keys() <= {"oft_blocks", "alpha", "rescale"} or tensors["oft_blocks"].dim() != 4:
            return None
        blocks, rescale = tensors["oft_blocks"], tensors.get("rescale")
        factors, count, size, other = blocks.shape
        wrong = rescale is not None and rescale.numel() != site.rows or size not in _allowed(site.rows, factors)
        if site.op not in cls.ops or size != other or count * size != site.rows or wrong:
            raise _misfit(site, "oft_blocks", blocks)
        patch = cls(site, BoftOptions(block=size, factors=factors, constraint=bound_of(tensors), rescale=rescale is not None))
        with torch.no_grad():
            patch.skew.copy_((blocks - blocks.mT).flatten(2)[..., triangle(size)])
            if rescale is not None:
                patch.stretch.copy_(rescale.flatten() - 1)
        return patch

    @classmethod
    def _of_peft(cls, site: Site, blocks: Tensor, factor: Tensor) -> Self:
        """Read X (m, K, b, b) and the factor of every output (O, 1)."""
        factors, count, size, other = blocks.shape if blocks.dim() == 4 else (0, 0, 0, 0)
        wrong = size != other or count * size != site.columns or size not in _allowed(site.columns, factors)
        if not _is_pointlike(site) or wrong:
            raise _misfit(site, "boft_R", blocks)
        if factor.numel() != site.rows:
            raise _misfit(site, "boft_s", factor)
        patch = cls(site, BoftOptions(block=size, factors=factors, side="input", rescale=True))
        order = _peft_order(size)
        q = (blocks.mT - blocks)[..., order, :][..., order] / 2
        with torch.no_grad():
            patch.skew.copy_(q.flatten(2)[..., triangle(size)])
            patch.stretch.copy_(factor.flatten() - 1)
        return patch


def _peft_order(size: int) -> Tensor:
    """Return which entries of peft's blocks ours are: the bit of u is outermost in theirs, innermost in ours."""
    return torch.arange(size).view(2, -1).t().flatten()


def _is_pointlike(site: Site) -> bool:
    """Whether a layer is one whose inputs peft rotates as we do: it has no kernel, or one of 1x1."""
    return site.op == "linear" or site.op == "conv" and site.columns == site.shape[1]


def _misfit(site: Site, name: str, tensor: Tensor) -> DeltaError:
    return DeltaError(
        f"{site}: {name} {'x'.join(map(str, tensor.shape))} does not rotate its weight",
        expected="blocks of even size that cover a side (peft's: of a linear layer or 1x1 convolution), and a value per output",
        fix="use the delta with the base it was trained on",
    )


def _allowed(size: int, factors: int | None) -> list[int]:
    """Return the even sizes of blocks of which there is a power of two, or what so many factors can be made of."""
    counts = {block: size // block for block in divisors(size) if block % 2 == 0}
    return [b for b, n in counts.items() if (n & (n - 1) == 0 if factors is None else factors and n % 2 ** (factors - 1) == 0)]


def _block(site: Site, options: BoftOptions, side: tuple[int, str]) -> int:
    """Return the asked size of a block, or the usual one of a side (its size, and what it consists of)."""
    (size, noun), asked = side, options.block
    allowed = _allowed(size, None if asked is None else options.factors)
    if asked is None and allowed:
        return next((size for size in allowed if size >= 4), allowed[-1])
    if asked is None or asked not in allowed:
        raise DeltaError(
            f"{site}: no butterfly of its {size} {noun}" + ("" if asked is None else f" has block = {asked}"),
            expected="one of " + ", ".join(map(str, allowed)) if allowed else f"an even number of {noun}",
            fix="set block to one of them, or leave the layer out of the targets",
        )
    return asked
