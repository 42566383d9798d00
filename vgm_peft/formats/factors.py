"""Two thin factors for a dense change: exactly where it has a low rank, else the nearest ones of a rank that is asked for.

Most methods make a change that a LoRA can hold without loss if only its rank is high enough: HRA of r reflections has rank r,
GLoRA 2 R, LoHa R^2, DiffuseKronA a2 b1. Which it is need not be known: a random sketch of the matrix finds its rank (Halko,
Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 4.1), and what the sketch misses is measured, not estimated.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SKETCHES = (32, 128, 512)
"""Ranks that are tried in turn; above the last the factors are no small file any more."""
EXACT = 2e-6
"""Share of a float32 change that may be missing from factors that are called exact: its own rounding."""
EXTRA = 10
"""Directions that a sketch follows beyond those asked for."""
ROUNDS = 4
"""Power iterations for the nearest factors: the tail of a trained change is flat, and a bare sketch would lose per cents."""


class Factors(NamedTuple):
    """`up` (O, R) and `down` (R, I), float32, and the relative error of their product in the Frobenius norm."""

    up: Tensor
    down: Tensor
    error: float


def exact(change: Tensor) -> Factors | None:
    """Return factors of a change (O, I[, *kernel]) that lose nothing and are smaller than it; None where there are none."""
    matrix = change.detach().flatten(1).to(torch.float32)
    limit = matrix.numel() // sum(matrix.shape)
    for rank in sorted({min(rank, limit) for rank in SKETCHES if limit}):
        found = nearest(change, rank, rounds=0)
        if found.error <= EXACT:
            return found
    return None


def nearest(change: Tensor, rank: int, rounds: int = ROUNDS) -> Factors:
    """Return the best factors of at most a rank, those of the largest singular values; without those that are but rounding."""
    matrix = change.detach().flatten(1).to(torch.float32)
    size = float(matrix.norm())
    rank = min(rank, *matrix.shape)
    if size == 0.0:
        return Factors(matrix.new_zeros(len(matrix), 1), matrix.new_zeros(1, matrix.shape[1]), 0.0)
    left, values, right = _parts(matrix, rank, rounds)
    tail = values.square().flip(0).cumsum(0).flip(0).sqrt()  # what is lost by stopping before each
    kept = max(1, int((tail > EXACT / 2 * size).sum()))
    root = values[:kept].sqrt()
    up, down = left[:, :kept] * root, root[:, None] * right[:kept]
    return Factors(up, down, float((matrix - up @ down).norm()) / size)


def _parts(matrix: Tensor, rank: int, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest singular parts, from a sketch where that saves anything; the same at every call."""
    width = rank + EXTRA
    if 2 * width >= min(matrix.shape):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ sketch).Q
    for _ in range(rounds):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return (basis @ left)[:, :rank], values[:rank], right[:rank]
