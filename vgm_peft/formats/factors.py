"""Changes of low rank by their two factors: found in dense ones, read out of spellings, made into patches, and worked on.

For dW = up @ down, with QR decompositions up = Q1 R1 and down^T = Q2 R2, the singular values of dW are those of the small
R1 R2^T, and its singular vectors are theirs multiplied by Q1 and Q2; the wide matrix is never made.

Most methods make a change that a LoRA can hold without loss if only its rank is high enough: HRA of r reflections has rank r,
GLoRA 2 R, LoHa R^2, DiffuseKronA a2 b1. Which it is need not be known: a random sketch of the matrix finds its rank (Halko,
Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 4.1), and what the sketch misses is measured, not estimated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vgm_peft.delta import Patch
from vgm_peft.formats.names import ALPHA, DOWN, UP
from vgm_peft.formats.vocabulary import Suffixes, pack, unpack
from vgm_peft.site import Site

SKETCHES = (32, 128, 512)
"""Ranks that are tried in turn; above the last the factors are no small file any more."""
EXACT = 2e-6
"""Share of a float32 change that may be missing from factors that are called exact: its own rounding."""
EXTRA = 10
"""Directions that a sketch follows beyond those asked for."""
ROUNDS = 4
"""Power iterations for the nearest factors: the tail of a trained change is flat, and a bare sketch would lose per cents."""


@dataclass(frozen=True)
class Thin:
    """dW = up @ down of one layer: (O, R) and (R, columns), the scale in `up`."""

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """Columns of `up`: what is stored, whatever of it counts."""
        return self.up.shape[1]

    def __mul__(self, weight: float) -> "Thin":
        return Thin(self.up * weight, self.down)

    def __add__(self, other: "Thin") -> "Thin":
        """The sum, exactly, at the sum of both ranks."""
        return Thin(torch.cat([self.up, other.up], 1), torch.cat([self.down, other.down]))

    def norm(self) -> float:
        """Frobenius norm, from the Gram matrices of both factors."""
        return float(self.inner(self).clamp_min(0.0).sqrt())

    def inner(self, other: "Thin") -> Tensor:
        """Sum of the products of all values of both changes."""
        return ((self.up.T @ other.up) * (self.down @ other.down.T)).sum()

    def dense(self) -> Tensor:
        """(O, columns)."""
        return self.up @ self.down

    def spectrum(self) -> "Spectrum":
        """Singular value decomposition, of min(R, O, columns) values."""
        left, upper = torch.linalg.qr(self.up)
        right, lower = torch.linalg.qr(self.down.T)
        u, values, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
        return Spectrum(left @ u, values, v @ right.T)


@dataclass(frozen=True)
class Spectrum:
    """Singular parts, the largest first: left (O, N), values (N,), right (N, columns)."""

    left: Tensor
    values: Tensor
    right: Tensor

    def first(self, rank: int) -> Thin:
        """The best approximation at a rank, its values shared evenly between both factors."""
        root = self.values[:rank].sqrt()
        return Thin(self.left[:, :rank] * root, root[:, None] * self.right[:rank])

    def rank_for(self, share: float) -> int:
        """The smallest rank whose values hold `share` of the sum of all squared values; at least 1."""
        squares = self.values.double().square().cumsum(0)
        return 1 + int((squares < share * squares[-1] * (1 - 1e-12)).sum()) if float(squares[-1]) else 1

    def lost(self, rank: int) -> float:
        """Norm of what the first `rank` values leave out, as a share of the whole norm."""
        whole = float(self.values.norm())
        return float(self.values[rank:].norm()) / whole if whole else 0.0


def spectrum_of(matrix: Tensor) -> Spectrum:
    """Singular parts of a wide matrix, float64, from its smaller Gram matrix: ten times as fast as directly.

    Values below 1e-8 of the largest are noise, and taken for zero.
    """
    tall = matrix.double()
    flip = tall.shape[0] > tall.shape[1]
    wide = tall.T if flip else tall
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    values, left = squares.flip(0).clamp_min(0.0).sqrt(), vectors.flip(1)
    right = (left.T @ wide) / values.clamp_min(1e-300)[:, None]
    right[values <= 1e-8 * values[0].clamp_min(1e-300)] = 0.0
    return Spectrum(right.T, values, left.T) if flip else Spectrum(left, values, right)


class Near(NamedTuple):
    """Factors, and the Frobenius norm of what they miss as a share of the whole."""

    thin: Thin
    error: float


def exact(change: Tensor) -> Thin | None:
    """Return factors, float32, of a change (O, I[, *kernel]) that lose nothing and are smaller; None where there are none."""
    matrix = change.detach().flatten(1)
    limit = matrix.numel() // sum(matrix.shape)
    for rank in sorted({min(rank, limit) for rank in SKETCHES if limit}):
        found = nearest(change, rank, rounds=0)
        if found.error <= EXACT:
            return found.thin
    return None


def nearest(change: Tensor, rank: int, rounds: int = ROUNDS) -> Near:
    """Return the best float32 factors of at most a rank, those of the largest singular values that are more than rounding."""
    matrix = change.detach().flatten(1).to(torch.float32)
    size = float(matrix.norm())
    if size == 0.0:
        return Near(Thin(matrix.new_zeros(len(matrix), 1), matrix.new_zeros(1, matrix.shape[1])), 0.0)
    spectrum = _largest(matrix, min(rank, *matrix.shape), rounds)
    tail = spectrum.values.square().flip(0).cumsum(0).flip(0).sqrt()  # what is lost by stopping before each
    thin = spectrum.first(max(1, int((tail > EXACT / 2 * size).sum())))
    return Near(thin, float((matrix - thin.dense()).norm()) / size)


def _largest(matrix: Tensor, rank: int, rounds: int) -> Spectrum:
    """Return the largest singular parts, float32, from a sketch where that saves anything; the same at every call."""
    width = rank + EXTRA
    if 2 * width >= min(matrix.shape):
        whole = spectrum_of(matrix)
        return Spectrum(whole.left[:, :rank].float(), whole.values[:rank].float(), whole.right[:rank].float())
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ sketch).Q
    for _ in range(rounds):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return Spectrum((basis @ left)[:, :rank], values[:rank], right[:rank])


def spelled(patch: Patch) -> Suffixes | None:
    """The tensors that other tools know one change by, exactly; None where they depend on the base or on the timestep."""
    return pack(patch, None) if patch.base_free and not patch.timed else None


def thin_of(tensors: Mapping[str, Tensor] | None) -> Thin | None:
    """The factors, float64, of a spelling that is a pair of low rank and nothing else."""
    if tensors is None or set(tensors) != {UP, DOWN, ALPHA}:
        return None
    up, down = tensors[UP].double().flatten(1), tensors[DOWN].double().flatten(1)
    return Thin(up * (float(tensors[ALPHA]) / up.shape[1]), down)


def halves_of(tensors: Mapping[str, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    """Both factors of a spelling that is a Kronecker product and nothing else, float64, the scale in the first."""
    if tensors is None or any(not name.startswith("lokr_") and name != ALPHA for name in tensors):
        return None
    names = tensors.keys() - {ALPHA}
    if "lokr_t2" in names or not any(name.startswith("lokr_w1") for name in names):
        return None
    found: list[Tensor] = []
    for half in ("lokr_w1", "lokr_w2"):
        whole = tensors.get(half)
        whole = tensors[f"{half}_a"].double() @ tensors[f"{half}_b"].double().flatten(1) if whole is None else whole.double()
        found.append(whole)
    rank = next((len(tensors[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in names), None)
    scale = 1.0 if rank is None or ALPHA not in tensors else float(tensors[ALPHA]) / rank
    return found[0] * scale, found[1]


def pair(site: Site, thin: Thin, dtype: torch.dtype) -> Patch:
    """The patch of low rank at a site that two factors make."""
    tensors = {
        UP: thin.up.to(dtype).reshape(*thin.up.shape, *[1] * (len(site.shape) - 2)),
        DOWN: thin.down.to(dtype).reshape(thin.rank, *site.shape[1:]),
        ALPHA: torch.tensor(float(thin.rank)),
    }
    return kept(site, tensors, dtype)


def full(site: Site, change: Tensor, dtype: torch.dtype) -> Patch:
    """The patch at a site that is a dense change."""
    name = "diff_b" if site.tensor == "bias" else "w_norm" if site.op == "norm" else "diff"
    return kept(site, {name: change.reshape(site.shape).to(dtype)}, dtype)


def kept(site: Site, tensors: Suffixes, dtype: torch.dtype) -> Patch:
    """The patch that a spelling means, its values in a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.promote_types(dtype, torch.float32))  # methods make their parameters in it
    try:
        return unpack(site, tensors, str(site)).to(dtype=dtype)
    finally:
        torch.set_default_dtype(before)


def total(parts: Sequence[Thin]) -> Thin:
    """The sum of changes, exactly, no higher in rank than the layer allows."""
    thin = Thin(torch.cat([p.up for p in parts], 1), torch.cat([p.down for p in parts]))
    most = min(thin.up.shape[0], thin.down.shape[1])
    return thin.spectrum().first(most) if thin.rank > most else thin


def dtype_of(*patches: Patch) -> torch.dtype:
    """The dtype of the values of changes, the widest of several."""
    dtype: torch.dtype | None = None
    for parameter in (p for patch in patches for p in patch.parameters() if p.is_floating_point()):
        dtype = parameter.dtype if dtype is None else torch.promote_types(dtype, parameter.dtype)
    return dtype or torch.float32
