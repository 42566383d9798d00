"""Rotations by blocks: orthogonal matrices from skew-symmetric ones, kept as their difference to the identity.

Cayley's map makes a skew-symmetric Q the orthogonal R = (I + Q)(I - Q)^-1; what the methods need is R - I = 2 (I - Q)^-1 Q,
exactly zero where Q is and without cancellation near it. Only the upper triangle of Q is stored, b (b - 1) / 2 values a
block, row by row. Letters: `K` blocks, `b` their size, `N` tokens, `C` channels = K * b.
"""

from collections.abc import Mapping
from functools import lru_cache
from math import isqrt, sqrt
from typing import Any, cast

import torch
from torch import Tensor

from vgm_peft.site import Site

CPU = torch.device("cpu")


@lru_cache(maxsize=64)
def triangle(block: int, device: torch.device = CPU) -> Tensor:
    """Return where the stored values of a block stand in its b * b entries."""
    with torch.inference_mode(False):
        rows, columns = torch.triu_indices(block, block, 1, device=device)
        return rows * block + columns


def block_of(values: int) -> int | None:
    """Return the block size whose triangle has so many values, or None."""
    block = (1 + isqrt(1 + 8 * values)) // 2
    return block if block * (block - 1) == 2 * values and values else None


def skew(values: Tensor, block: int) -> Tensor:
    """Return Q (..., b, b) from its triangles (..., b (b - 1) / 2), in float32 or wider."""
    return cast(Tensor, _Skew.apply(wide(values), block))


def wide(values: Tensor) -> Tensor:
    """Return values in float32 or wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class _Skew(torch.autograd.Function):
    """Q from its triangles. Small blocks cost what their operations cost: so as few as there can be, also backwards."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, block: int) -> Tensor:
        upper = values.new_zeros(*values.shape[:-1], block, block)
        upper.flatten(-2).index_copy_(-1, triangle(block, values.device), values)
        return upper - upper.mT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _stored(gradients[0] - gradients[0].mT), None


def _stored(full: Tensor) -> Tensor:
    """Return the triangles of (..., b, b)."""
    return full.flatten(-2).index_select(-1, triangle(full.shape[-1], full.device))


def limited(values: Tensor, limit: float) -> Tensor:
    """Return triangles scaled down, all alike, until the norm of all Q together is at most `limit` (constrained OFT)."""
    norm = sqrt(2) * torch.linalg.vector_norm(wide(values))
    return values * (limit / norm.clamp_min(limit))


def cayley(values: Tensor, block: int) -> Tensor:
    """Return R - I (..., b, b) from triangles of Q (..., b (b - 1) / 2), in float32 or wider whatever autocast is on."""
    return cast(Tensor, _Cayley.apply(wide(values), block))


class _Cayley(torch.autograd.Function):
    """R - I = 2 (I - Q)^-1 Q. By Q its derivative is 2 K dQ K with K = (I - Q)^-1 = I + (R - I) / 2: nothing is solved twice.

    Blocks of 4 are so many that it pays to know R - I in closed form and to multiply them entry by entry.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, block: int) -> Tensor:
        with torch.autocast(values.device.type, enabled=False):
            if block == 4:
                turned = _of_four(values)
            else:
                q = skew(values, block)
                turned = torch.linalg.solve_ex(_identity(q) - q, 2 * q).result  # never singular, so nothing to check
        ctx.save_for_backward(turned)
        return turned

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (turned,), size = ctx.saved_tensors, gradients[0].shape[-1]
        with torch.autocast(turned.device.type, enabled=False):
            twice = turned.mT + 2 * _identity(turned)
            if size == 4:
                first = entries_first(twice)
                both = _multiplied(_multiplied(first, entries_first(gradients[0])), first)
                found = (both - both.transpose(0, 1)).flatten(0, 1)[triangle(4, both.device)].mul_(0.5)
                return found.movedim(0, -1).contiguous(), None
            both = twice @ gradients[0] @ twice
            return _stored(both - both.mT).mul_(0.5), None


def _of_four(values: Tensor) -> Tensor:
    """Return R - I (..., 4, 4) from triangles of Q, in memory the entries first: 2 (Q + p D + Q^2 - p^2 I) / (1 + s + p^2).

    s is the sum of the squares of the triangle, p the Pfaffian (so det (I - Q) = 1 + s + p^2), and D what makes Q D = -p I.
    Follows from Q^4 + s Q^2 + p^2 I = 0, the theorem of Cayley and Hamilton.
    """
    v = values.movedim(-1, 0).contiguous()
    dual = torch.stack([v[5], -v[4], v[3], v[2], -v[1], v[0]])
    pfaffian = (v * dual).sum(0) / 2
    square = pfaffian * pfaffian
    q = _from_triangle(v)
    even = _multiplied(q, q) - square * _identity(values, 4).view(4, 4, *[1] * square.dim())
    odd = _from_triangle(v + pfaffian * dual)
    return ((odd + even) * (2 / (1 + (v * v).sum(0) + square))).movedim((0, 1), (-2, -1))


def _from_triangle(v: Tensor) -> Tensor:
    """Return the skew-symmetric (4, 4, ...) of a triangle (6, ...)."""
    upper = v.new_zeros(16, *v.shape[1:]).index_copy_(0, triangle(4, v.device), v).unflatten(0, (4, 4))
    return upper - upper.transpose(0, 1)


def entries_first(blocks: Tensor) -> Tensor:
    """Return (..., b, b) as a contiguous (b, b, ...): what is done to small blocks entry by entry runs through all of them."""
    return blocks.movedim((-2, -1), (0, 1)).contiguous()


def _multiplied(left: Tensor, right: Tensor) -> Tensor:
    """Return the products of small matrices, all of them (b, b, ...)."""
    product = torch.zeros_like(left)
    for column, row in zip(left.unbind(1), right, strict=True):
        product.addcmul_(column.unsqueeze(1), row)
    return product


def neumann(q: Tensor, terms: int) -> Tensor:
    """Return R - I by the series 2Q + 2Q^2 + ... cut at the power `terms` - 1 (3 or more), which has weight 1, as in peft.

    Not quite orthogonal; near enough for small Q.
    """
    with torch.autocast(q.device.type, enabled=False):
        q3 = total = q.flatten(0, -3)
        for _ in range(terms - 2):  # Horner's scheme: Q (2 + Q (2 + ... Q (2 + Q)))
            total = torch.baddbmm(q3, q3, total, beta=2)
        return total.view(q.shape)


def _identity(like: Tensor, size: int | None = None) -> Tensor:
    """Return the identity of that size, by default that of the matrices `like`."""
    return torch.eye(like.shape[-1] if size is None else size, device=like.device, dtype=like.dtype)


def turn(y: Tensor, blocks: Tensor, dim: int) -> Tensor:
    """Return every run of b channels of `y` (along `dim`, 1 or -1) as a row vector times its block of `blocks` (K, b, b)."""
    count, size, _ = blocks.shape
    blocks = blocks.to(y.dtype)
    if dim == -1 or y.dim() == 2:
        runs = y.reshape(-1, count, size).transpose(0, 1)
        return torch.bmm(runs, blocks).transpose(0, 1).reshape(y.shape)
    if not y.is_contiguous() and y.movedim(1, -1).is_contiguous():  # channels last
        return turn(y.movedim(1, -1), blocks, -1).movedim(-1, 1)
    return torch.matmul(blocks.mT, y.reshape(len(y), count, size, -1)).view(y.shape)


UNBOUND = 1000.0
"""An alpha that clamps nothing in any tool (0 would be the identity in kohya's)."""


def spelled(site: Site, q: Tensor, stretch: Tensor | None) -> dict[str, Tensor]:
    """Return LyCORIS' spelling of rotated outputs: `oft_blocks` = Q / 2, an `alpha` that clamps nothing, and `rescale`."""
    tensors = {"oft_blocks": (q / 2).detach(), "alpha": torch.tensor(UNBOUND)}
    if stretch is not None:
        tensors["rescale"] = 1 + stretch.detach().view(-1, *[1] * (len(site.shape) - 1))
    return tensors


def bound_of(tensors: Mapping[str, Tensor]) -> float | None:
    """Return the constraint that a file's `alpha` means; None where it is missing, zero or clamps nothing."""
    alpha = float(tensors["alpha"]) if "alpha" in tensors else 0.0
    return alpha if 0 < alpha < UNBOUND else None
