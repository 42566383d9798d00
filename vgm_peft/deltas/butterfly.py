"""Products of butterfly factors, multiplied together and applied to channels. Mathematics for BOFT.

A channel has the number u * b/2 + l, l < b/2. Factor i mixes the l with bit i of u, so factors i to j together are again
block-diagonal, with blocks over l and those bits. Neighbouring factors are multiplied to such wider blocks, without regard to
tokens, and two or three passes over the channels take the place of m. Letters: `m` factors of `K` blocks of size `b`,
`C` channels = K * b, `s` the size of a wider block, high and low the numbers of values of the bits above and below its own.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor

from vgm_peft.deltas.rotation import turn

WIDE = 64
"""Size up to which factors are multiplied together: beyond it the wider blocks cost more than the passes they save."""


def merged(turned: Tensor) -> tuple[Tensor, ...]:
    """Return for every pass what its factors together add, (high * low, s, s), outputs by inputs.

    `turned` (m, K, b, b) is each factor less the identity. Layers of equal m and b may stand one after another along K, and
    their blocks then do so along the first axis.
    """
    passes = _passes(len(turned), turned.shape[-1] // 2)
    return tuple(cast(Tensor, _Merged.apply(turned[first:last], 2**first)) for first, last in passes)


def change(y: Tensor, blocks: Sequence[Tensor], factors: int, half: int) -> Tensor:
    """Return what `factors` factors, `merged` to `blocks`, add to the channels of `y` (B, C, N); `half` is b/2."""
    total = torch.zeros((), dtype=y.dtype, device=y.device)
    for (first, last), own in zip(_passes(factors, half), blocks, strict=True):
        total = total + _apply(y + total if first else y, own, (2 ** (last - first), 2**first, half))
    return total


def weight_changes(weights: Sequence[Tensor], blocks: Sequence[Tensor], factors: int, half: int) -> Sequence[Tensor]:
    """Return the same for weights (C, N) of one N, in few operations and with nothing of their size kept for the gradient.

    The blocks of one weight follow those of the one before, as `merged` has them. Weights have no gradient from it. With more
    than one pass it has the rounding of the weights, so this is for what is added to them anyway.
    """
    views = [(2 ** (last - first), 2**first, half) for first, last in _passes(factors, half)]
    dtype = weights[0].dtype
    changes = cast(Tensor, _WeightChanges.apply(views, len(weights), *weights, *(own.to(dtype) for own in blocks)))
    return changes.split([len(weight) for weight in weights])


View = tuple[int, int, int]
"""How a pass sees the channels: the sizes bits, low and b/2 of (high, bits, low, b/2)."""


class _WeightChanges(torch.autograd.Function):
    """One product a pass; the backward pass goes through all but the last again for what they were applied to."""

    @staticmethod
    def forward(ctx: Any, views: list[View], count: int, *tensors: Tensor) -> Tensor:
        ctx.views, ctx.count = views, count
        ctx.save_for_backward(*(tensors[:-1] if len(views) == 1 else tensors))  # of a single pass the gradient needs no blocks
        y, blocks = torch.cat(tensors[:count]), tensors[count:]
        with torch.autocast(y.device.type, enabled=False):
            if len(views) == 1:
                return _scattered(torch.bmm(blocks[0], _gathered(y, views[0])), views[0])
            return _through(y, views, blocks) - y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tensors, count, views, gradient = ctx.saved_tensors, ctx.count, ctx.views, gradients[0]
        y, blocks, found = torch.cat(tensors[:count]), tensors[count:], list[Tensor]()
        with torch.autocast(y.device.type, enabled=False):
            for n in reversed(range(len(views))):
                turned = _gathered(gradient, views[n])
                found.insert(0, torch.bmm(turned, _gathered(_through(y, views[:n], blocks), views[n]).mT))
                if n:
                    gradient = _scattered(torch.bmm(_with_identity(blocks[n]).mT, turned), views[n])
        return None, None, *[None] * count, *found


def _through(y: Tensor, views: Sequence[View], blocks: Sequence[Tensor]) -> Tensor:
    """Return `y` (C, N) after so many passes."""
    for view, own in zip(views, blocks, strict=False):
        y = _scattered(torch.bmm(_with_identity(own), _gathered(y, view)), view)
    return y


def _with_identity(blocks: Tensor) -> Tensor:
    return blocks + torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)


def _gathered(y: Tensor, view: View) -> Tensor:
    """Return the channels of `y` (C, N) block by block of a pass, (high * low, bits * b/2, N)."""
    bits, low, half = view
    return y.reshape(-1, bits, low, half, y.shape[1]).transpose(1, 2).reshape(-1, bits * half, y.shape[1])


def _scattered(parts: Tensor, view: View) -> Tensor:
    """Return what `_gathered` took apart, (C, N)."""
    bits, low, half = view
    return parts.view(-1, low, bits, half, parts.shape[2]).transpose(1, 2).reshape(-1, parts.shape[2])


def _passes(factors: int, half: int) -> list[tuple[int, int]]:
    """Return the factors of every pass, from the first to before the last."""
    most = max(1, (WIDE // half).bit_length() - 1)
    count = -(-factors // most)
    bounds = [k * factors // count for k in range(count + 1)]
    return list(zip(bounds, bounds[1:], strict=False))


def _apply(y: Tensor, blocks: Tensor, view: View) -> Tensor:
    """Return the blocks of a pass applied to the channels of `y` (B, C, N), seen as (high, bits, low, b/2) by `view`."""
    bits, low, half = view
    parts = y.reshape(len(y), -1, bits, low, half, y.shape[2]).transpose(2, 3)
    turned = turn(parts.reshape(y.shape), blocks.mT, 1)
    return turned.view(len(y), -1, low, bits, half, y.shape[2]).transpose(2, 3).reshape(y.shape)


# --- multiplying factors together ---------------------------------------------------------------------------------------
#
# What the factors of a pass below bit i add, T, is block-diagonal over l and the bits of the pass below i, m as a number, so
# with n = m * b/2 values a side. Factor i, which adds F, makes of it, p and q being bit i of outputs and of inputs,
# T'[p m l, q c] = [p = q] T[q, m l, c] + sum over k of F[p m l, q k] (I + T)[q, m k, c].
#
# In memory the entries of blocks come first and the blocks last, as (h, o): the bits above i of all layers, and those below the
# pass. So each operation runs through all the blocks there are; products of matrices so small would cost more.


class _Merged(torch.autograd.Function):
    """The factors of one pass together. Keeps nothing for the gradient but the factors, and makes the products once more."""

    @staticmethod
    def forward(ctx: Any, turned: Tensor, low: int) -> Tensor:
        ctx.low = low
        ctx.save_for_backward(turned)
        factors = _factors(turned, low)
        total = _grown(factors[-1], _below(factors)[-1])
        return total.permute(2, 3, 0, 1).reshape(-1, *total.shape[:2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (turned,), low, size = ctx.saved_tensors, ctx.low, gradients[0].shape[-1]
        factors = _factors(turned, low)
        gradient = gradients[0].reshape(-1, low, size, size).permute(2, 3, 0, 1).contiguous()
        found: list[Tensor] = []
        for factor, total in zip(reversed(factors), reversed(_below(factors)), strict=True):
            own, gradient = _grown_backward(gradient, factor, total)
            found.insert(0, own.permute(5, 1, 6, 2, 0, 3, 4).reshape(turned.shape[1:]))
        return torch.stack(found), None


def _factors(turned: Tensor, low: int) -> list[Tensor]:
    """Return each factor of a pass as (p, m, l, k, q, h, o)."""
    half = turned.shape[-1] // 2
    views = (factor.reshape(-1, 2**i, low, half, 2, half, 2) for i, factor in enumerate(turned))
    return [view.permute(4, 1, 3, 5, 6, 0, 2).contiguous() for view in views]


def _below(factors: Sequence[Tensor]) -> list[Tensor]:
    """Return for every factor T (n, n, h, o) of those below it, of none for the first."""
    _, _, half, _, _, high, low = factors[0].shape
    totals = [factors[0].new_zeros(half, half, 2 * high, low)]
    for factor in factors[:-1]:
        totals.append(_grown(factor, totals[-1]))
    return totals


def _grown(factor: Tensor, total: Tensor) -> Tensor:
    """Return T' (2n, 2n, h, o)."""
    below, before = _split(factor, total)
    grown = factor.new_zeros(*factor.shape[:3], 2, len(total), *factor.shape[5:])
    grown.diagonal(0, 0, 3).copy_(below.permute(0, 1, 3, 4, 5, 2))
    for k in range(factor.shape[3]):
        grown.addcmul_(factor[:, :, :, k, :, None], before[:, k].unsqueeze(1))
    return grown.view(2 * len(total), 2 * len(total), *factor.shape[5:])


def _grown_backward(gradient: Tensor, factor: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the factor and of T from that of T'."""
    _, before = _split(factor, total)
    gradient = gradient.view(*factor.shape[:3], 2, len(total), *factor.shape[5:])
    own, below = torch.zeros_like(factor), gradient.diagonal(0, 0, 3).permute(0, 1, 5, 2, 3, 4).contiguous()
    for c in range(len(total)):
        own.addcmul_(gradient[:, :, :, None, :, c], before[None, :, None, :, :, c])
    for bit, row in product(range(2), range(factor.shape[2])):
        below.addcmul_(gradient[bit, :, row].unsqueeze(1), factor[bit, :, row].unsqueeze(3))
    return own, below.permute(0, 1, 3, 4, 2, 5).reshape(total.shape)


def _split(factor: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Return T and I + T as (m, k, q, c, h, o): the bit of the factor is the lowest of those above T's."""
    _, m, half, _, _, high, low = factor.shape
    below = total.view(m, half, len(total), high, 2, low).permute(0, 1, 4, 2, 3, 5)
    before = below.clone(memory_format=torch.contiguous_format)
    before.flatten(0, 1).diagonal(0, 0, 2).add_(1)
    return below, before
