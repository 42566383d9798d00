"""Products of butterfly factors, multiplied together and applied to channels. Mathematics for BOFT.

A channel has the number u * b/2 + l, l < b/2. Factor i mixes the l with bit i of u, so factors i to j together are again
block-diagonal, with blocks over l and those bits. Neighbouring factors are multiplied to such wider blocks, without regard to
tokens, and two or three passes over the channels take the place of m. Letters: `m` factors of `K` blocks of size `b`,
`C` channels = K * b, `s` the size of a wider block, high and low the numbers of values of the bits above and below its own.
"""

from collections.abc import Sequence
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
    half = turned.shape[-1] // 2
    with torch.autocast(turned.device.type, enabled=False):
        return tuple(_multiply(turned, first, last, half) for first, last in _passes(len(turned), half))


def change(y: Tensor, blocks: Sequence[Tensor], factors: int, half: int) -> Tensor:
    """Return what `factors` factors, `merged` to `blocks`, add to the channels of `y` (B, C, N); `half` is b/2."""
    total = torch.zeros((), dtype=y.dtype, device=y.device)
    for (first, last), own in zip(_passes(factors, half), blocks, strict=True):
        total = total + _apply(y + total if first else y, own, (2 ** (last - first), 2**first, half))
    return total


def rotated(y: Tensor, blocks: Sequence[Tensor], factors: int, half: int) -> Tensor:
    """Return `y` (C, N) with what `change` adds to it: in few operations and with nothing of its size kept for the gradient.

    The difference to `y` has the rounding of `y`, so this is for what is added to `y` anyway.
    """
    views = [(2 ** (last - first), 2**first, half) for first, last in _passes(factors, half)]
    return cast(Tensor, _Rotated.apply(y, views, *(own.to(y.dtype) for own in blocks)))


View = tuple[int, int, int]
"""How a pass sees the channels: the sizes bits, low and b/2 of (high, bits, low, b/2)."""


class _Rotated(torch.autograd.Function):
    """One `baddbmm` a pass; the backward pass goes through all of them again for what they were applied to."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, views: list[View], *blocks: Tensor) -> Tensor:
        ctx.views = views
        ctx.save_for_backward(y, *blocks)
        with torch.autocast(y.device.type, enabled=False):
            for view, own in zip(views, blocks, strict=True):
                parts = _gathered(y, view)
                y = _scattered(torch.baddbmm(parts, own, parts), view)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (y, *blocks), (gradient,), found = ctx.saved_tensors, gradients, list[Tensor]()
        seen: list[Tensor] = []
        with torch.autocast(y.device.type, enabled=False):
            for view, own in zip(ctx.views, blocks, strict=True):
                seen.append(_gathered(y, view))
                if len(seen) < len(blocks):
                    y = _scattered(torch.baddbmm(seen[-1], own, seen[-1]), view)
            for view, own, parts in zip(reversed(ctx.views), reversed(blocks), reversed(seen), strict=True):
                turned = _gathered(gradient, view)
                found.insert(0, torch.bmm(turned, parts.mT))
                if len(found) < len(blocks) or ctx.needs_input_grad[0]:
                    gradient = _scattered(torch.baddbmm(turned, own.mT, turned), view)
        return gradient if ctx.needs_input_grad[0] else None, None, *found


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


def _multiply(turned: Tensor, first: int, last: int, half: int) -> Tensor:
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
    return total.reshape(high * low, size, size)


def _apply(y: Tensor, blocks: Tensor, view: tuple[int, int, int]) -> Tensor:
    """Return the blocks of a pass applied to the channels of `y` (B, C, N), seen as (high, bits, low, b/2) by `view`."""
    bits, low, half = view
    parts = y.reshape(len(y), -1, bits, low, half, y.shape[2]).transpose(2, 3)
    turned = turn(parts.reshape(y.shape), blocks.mT, 1)
    return turned.view(len(y), -1, low, bits, half, y.shape[2]).transpose(2, 3).reshape(y.shape)
