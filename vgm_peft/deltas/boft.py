"""BOFT: the outputs are rotated by a product of sparse rotations, in the pattern of the fast Fourier transform's butterflies.

Liu et al. 2024 (arXiv 2311.06243, section 4) as LyCORIS has it, on the output side: dW = (R_m ... R_2 R_1 - I) W. Each R_i is,
up to a fixed order of the channels, block-diagonal with blocks of even size b, which are Cayley's maps of skew-symmetric Q
(see `rotation`); K = O / b blocks are a power of two, and with m = 1 + log2(K) factors every output is mixed with every other.

| here | shape | LyCORIS and its readers |
|---|---|---|
| `skew` | (m, K, b (b - 1) / 2), the upper triangles of Q | `oft_blocks` (m, K, b, b) = B, Q = B - B^T |
| `stretch` (`rescale`) | (O,), begins at 0 | `rescale` (O, 1[, ...]) = 1 + stretch |

A channel has the number u * b/2 + l. Factor i mixes the l with bit i of u, so factors i to j together are again
block-diagonal, with blocks over l and those bits. The forward multiplies neighbouring factors to such wider blocks, without
regard to tokens, and applies two or three of these in place of m.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from vgm_peft.delta import Call, Patch, along_outputs
from vgm_peft.deltas.rotation import bound_of, cayley, limited, skew, spelled, triangle, turn
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.site import Site

WIDE = 64
"""Size up to which factors are multiplied together: beyond it the wider blocks cost more than the passes they save."""


@dataclass(frozen=True, kw_only=True)
class BoftOptions:
    """Settings of one BOFT."""

    block: int | None = None
    """b, even, such that O / b is a power of two. None: the smallest such of 4 or more, or else 2."""
    factors: int | None = None
    """m, 1 .. 1 + log2(O / b). None: all, as in LyCORIS; 1 is OFT."""
    constraint: float | None = None
    """The norm of all Q is at most this times O; 1e-4 .. 1e-3 are usual."""
    rescale: bool = False
    """Train a factor for every output too."""

    def __post_init__(self) -> None:
        if self.block is not None and (self.block < 2 or self.block % 2):
            raise ConfigError(f"block = {self.block}", expected="an even number")
        if self.factors is not None and self.factors < 1:
            raise ConfigError(f"factors = {self.factors}", expected="1 or more")
        if self.constraint is not None and not self.constraint > 0:
            raise ConfigError(f"constraint = {self.constraint}", expected="above 0", fix="leave it out for plain BOFT")


class Mix(NamedTuple):
    """Some neighbouring factors together: what they add to the channels, seen as (high, bits, low, b/2)."""

    view: tuple[int, int, int, int]
    blocks: Tensor
    """(high * low, s, s) with s = bits * b/2: outputs by inputs."""


class Boft(Patch):
    """A butterfly rotation of the outputs of a linear or conv layer; starts at the identity because every Q is zero."""

    kind = "boft"
    Options = BoftOptions
    ops = frozenset({"linear", "conv"})
    rate = 0.6
    examples = (BoftOptions(), BoftOptions(constraint=0.02, rescale=True), BoftOptions(factors=1))
    base_free = False
    packs_alone = True
    options: BoftOptions
    place: Tensor

    def __init__(self, site: Site, options: BoftOptions, generator: torch.Generator | None = None) -> None:
        """Begin with Q = 0. Raises `DeltaError` when block or factors do not fit the layer's outputs."""
        block = _block(site, options.block)
        count = site.rows // block
        most = count.bit_length()
        if options.factors is not None and options.factors > most:
            raise DeltaError(
                f"{site}: {options.factors} butterfly factors of {count} blocks", expected=f"1 .. {most}", fix="lower factors"
            )
        factors = options.factors or most
        super().__init__(site, replace(options, block=block, factors=factors), generator)
        self.skew = nn.Parameter(torch.zeros(factors, count, block * (block - 1) // 2))
        if options.rescale:
            self.stretch = nn.Parameter(torch.zeros(site.rows))
        self.register_buffer("place", triangle(block), persistent=False)

    def q(self) -> Tensor:
        """Return Q (m, K, b, b), constrained, in float32 or wider."""
        options, values = self.options, self.skew
        if options.constraint is not None:
            values = limited(values, options.constraint * self.site.rows)
        return skew(values, self.place, cast(int, options.block))

    def _mixes(self) -> list[Mix]:
        """Return the factors, neighbours multiplied together up to `WIDE` channels, in the order in which they act."""
        turned, half = cayley(self.q()), cast(int, self.options.block) // 2
        factors = len(turned)
        most = max(1, (WIDE // half).bit_length() - 1)
        passes = -(-factors // most)
        bounds = [k * factors // passes for k in range(passes + 1)]
        with torch.autocast(turned.device.type, enabled=False):
            return [_multiply(turned, first, last, half) for first, last in zip(bounds, bounds[1:], strict=False)]

    def _change(self, y: Tensor) -> Tensor:
        """Return what the rotation adds to outputs `y` (B, O, N): channels are reordered in whole rows of tokens or pixels."""
        total: Tensor | None = None
        for mix in self._mixes():
            step = _apply(y if total is None else y + total, mix)
            total = step if total is None else total + step
        return cast(Tensor, total)

    def change(self, base: Tensor) -> Tensor:
        """Return the rotated (and rescaled) weight minus the weight."""
        weight = base.to(self.skew.dtype)
        change = self._change(weight.reshape(1, self.site.rows, -1)).reshape(base.shape)
        if self.options.rescale:
            change = change + self.stretch.view(-1, *[1] * (base.dim() - 1)) * (change + weight)
        return change

    def contribution(self, call: Call) -> Tensor:
        """Return the rotation's change of the layer's own product; dense where it would mix groups, which see other inputs."""
        if self.site.op == "conv" and cast(nn.Conv2d, call.layer).groups > 1:
            return super().contribution(call)
        product = call.product(self.site)
        if self.site.op == "linear":
            rows = product.reshape(-1, self.site.rows).t().contiguous().unsqueeze(0)
            change = self._change(rows)[0].t().reshape(product.shape)
        else:
            change = self._change(product.flatten(2)).view(product.shape)
        if self.options.rescale:
            change = change + along_outputs(self.stretch.to(change.dtype), call.x, call.layer) * (change + product)
        return change

    def pack(self, base: Tensor) -> dict[str, Tensor]:
        """Return `oft_blocks` = Q / 2 with four axes, an `alpha` that clamps nothing, and `rescale`."""
        return spelled(self.site, self.q().to(self.skew.dtype), self.stretch if self.options.rescale else None)

    @classmethod
    def unpack(cls, site: Site, tensors: Mapping[str, Tensor]) -> Self | None:
        """Read `oft_blocks` with four axes; `alpha` is the constraint, none where it is missing or zero."""
        if not {"oft_blocks"} <= tensors.keys() <= {"oft_blocks", "alpha", "rescale"} or tensors["oft_blocks"].dim() != 4:
            return None
        blocks, rescale = tensors["oft_blocks"], tensors.get("rescale")
        factors, count, size, other = blocks.shape
        wrong = rescale is not None and rescale.numel() != site.rows
        if site.op not in cls.ops or size != other or size not in _allowed(site.rows) or count * size != site.rows or wrong:
            raise DeltaError(
                f"{site}: oft_blocks {'x'.join(map(str, blocks.shape))} does not rotate its weight",
                fix="use the delta with the base it was trained on",
            )
        patch = cls(site, BoftOptions(block=size, factors=factors, constraint=bound_of(tensors), rescale=rescale is not None))
        with torch.no_grad():
            patch.skew.copy_((blocks - blocks.mT).flatten(2)[..., triangle(size)])
            if rescale is not None:
                patch.stretch.copy_(rescale.flatten() - 1)
        return patch


def _allowed(rows: int) -> list[int]:
    """Return the even sizes whose blocks are a power of two."""
    counts = [1 << k for k in range(rows.bit_length()) if rows % (2 << k) == 0]
    return sorted(rows // count for count in counts)


def _block(site: Site, asked: int | None) -> int:
    allowed = _allowed(site.rows)
    if asked is None and allowed:
        return next((size for size in allowed if size >= 4), allowed[-1])
    if asked is None or asked not in allowed:
        raise DeltaError(
            f"{site}: no butterfly of its {site.rows} outputs" + ("" if asked is None else f" has block = {asked}"),
            expected="one of " + ", ".join(map(str, allowed)) if allowed else "an even number of outputs",
            fix="set block to one of them, or leave the layer out of the targets",
        )
    return asked


def _multiply(turned: Tensor, first: int, last: int, half: int) -> Mix:
    """Return the factors `first` .. `last` - 1 of `turned` (m, K, b, b) together, each I + its turned."""
    low, bits = 2**first, 2 ** (last - first)
    high = 2 * turned.shape[1] // (low * bits)
    size = bits * half
    identity = torch.eye(size, device=turned.device, dtype=turned.dtype)
    total = torch.zeros_like(identity).expand(high, low, size, size)
    for i in range(first, last):
        under = 2 ** (i - first)
        over = bits // (2 * under)
        # Letters: h high, o low; a, m bits over and under bit i, p and q that bit; l, k within b/2; z the input.
        factor = turned[i].view(high, over, under, low, half, 2, half, 2)
        before = (total + identity).view(high, low, over, 2, under, half, size)
        step = torch.einsum("hamolpkq,hoaqmkz->hoapmlz", factor, before)
        total = total + step.reshape(high, low, size, size)
    return Mix((high, bits, low, half), total.reshape(high * low, size, size))


def _apply(y: Tensor, mix: Mix) -> Tensor:
    """Return the blocks of a mix applied to the channels of `y` (B, O, N)."""
    high, bits, low, half = mix.view
    parts = y.reshape(len(y), high, bits, low, half, -1).transpose(2, 3)
    turned = turn(parts.reshape(y.shape), mix.blocks.mT, 1)
    return turned.view(len(y), high, low, bits, half, -1).transpose(2, 3).reshape(y.shape)
