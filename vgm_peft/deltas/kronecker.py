"""Kronecker products of a small matrix with a larger one, dense and applied to activations.

`kron(left, right)[i*b1 + p, j*b2 + q] = left[i, j] * right[p, q]`, for `left` (a1, a2) and `right` (b1, b2[, *kernel]). Applied
to an activation it needs no such matrix: with the activation as X (a2, b2) per token, the output is left X right^T (a1, b1).
A convolution is the same with `right` a convolution of b2 to b1 channels, run over the a2 blocks of channels as a batch.

`right` may itself be a product of factors, given as a chain in the order in which they act, the first with the kernel: (right,)
or (down, up). Products run in the order that costs least, and the last of them adds to the layer's output.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vgm_peft.delta import convolve


def kron(left: Tensor, right: Tensor) -> Tensor:
    """Return the dense product; over a kernel, for every place in it."""
    return torch.kron(left.view(*left.shape, *[1] * (right.dim() - 2)), right.contiguous())


class Kronecker(NamedTuple):
    """left (x) the product of a chain, as it is applied to activations."""

    left: Tensor
    """(a1, a2)."""
    chain: tuple[Tensor, ...]
    """(W1, b2[, *kernel]), (W2, W1) ... (b1, Wn), in the order in which they act."""

    def to(self, dtype: torch.dtype) -> "Kronecker":
        """Return it in the dtype of an activation."""
        return Kronecker(self.left.to(dtype), tuple(factor.to(dtype) for factor in self.chain))

    def on_tokens(self, x: Tensor) -> Tensor:
        """Return the product applied to `x` (..., a2*b2)."""
        return self.add_to_tokens(x.new_zeros(*x.shape[:-1], len(self.left) * len(self.chain[-1])), x, 1.0)

    def turn(self) -> int:
        """Return after how many factors of the chain `left` acts with the fewest multiplications."""
        a1, a2 = self.left.shape
        widths = [self.chain[0].shape[1], *(len(factor) for factor in self.chain)]
        steps = [factor.numel() for factor in self.chain]
        costs = [a2 * sum(steps[:k]) + a1 * a2 * width + a1 * sum(steps[k:]) for k, width in enumerate(widths)]
        return costs.index(min(costs))

    def add_to_tokens(self, output: Tensor, x: Tensor, scale: float) -> Tensor:
        """Return `output` (..., a1*b1) + scale * the product applied to `x` (..., a2*b2)."""
        (a1, a2), turn = self.left.shape, self.turn()
        hidden = x.to(output.dtype).reshape(-1, a2, self.chain[0].shape[1])
        for factor in self.chain[:turn]:
            hidden = F.linear(hidden, factor)
        left = self.left.expand(len(hidden), a1, a2)
        if turn == len(self.chain):
            return torch.baddbmm(output.reshape(len(hidden), a1, -1), left, hidden, alpha=scale).view(output.shape)
        hidden = torch.bmm(left, hidden)
        for factor in self.chain[turn:-1]:
            hidden = F.linear(hidden, factor)
        last = self.chain[-1]
        total = torch.addmm(output.reshape(-1, len(last)), hidden.reshape(-1, last.shape[1]), last.t(), alpha=scale)
        return total.view(output.shape)

    def on_pictures(self, x: Tensor, layer: nn.Module) -> Tensor:
        """Return the product convolved over `x` (B, a2*b2, *spatial) as `layer` (without groups) does."""
        turn, pictures = self.turn(), len(x)
        for k, factor in enumerate(self.chain):
            if k == turn:
                x = self._mix(x, pictures)
            blocks = x.reshape(-1, factor.shape[1], *x.shape[2:])
            x = convolve(layer, blocks, factor) if k == 0 else _pointwise(blocks, factor)
        if turn == len(self.chain):
            x = self._mix(x, pictures)
        return x.reshape(pictures, -1, *x.shape[2:])

    def _mix(self, x: Tensor, pictures: int) -> Tensor:
        """Apply `left` to the blocks of channels of `x`, (B, a2*W, ...) or (B*a2, W, ...); return (B, a1*W, ...)."""
        space = x.shape[2:]
        mixed = torch.matmul(self.left, x.reshape(pictures, self.left.shape[1], -1))
        return mixed.view(pictures, -1, *space)


def _pointwise(x: Tensor, factor: Tensor) -> Tensor:
    return torch.matmul(factor, x.flatten(2)).view(len(x), len(factor), *x.shape[2:])
