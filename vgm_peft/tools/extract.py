"""A delta out of two checkpoints: what was done to a base, as a file of its own.

| kind | of every layer's D = tuned - base | |
|---|---|---|
| `lora` | the nearest change of a rank, or of the rank that keeps a share of the spectrum | nearest |
| `lokr` | the nearest Kronecker product: the first singular part of D, rearranged (Van Loan and Pitsianis 1993) | nearest |
| `svdiff` | the shift of the base's singular values that comes nearest: the diagonal of U^T D V | nearest |
| `diff` | D itself | exact |

Norms, biases and embeddings, which are no matrices to approximate, are taken as they are by every kind but `svdiff`, which
takes norms too. Tensors that are equal in both are left out. Where one checkpoint is rounded more than the other, that shows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from vgm_peft.delta import Delta, Patch
from vgm_peft.deltas import method_named
from vgm_peft.errors import ConfigError, DeltaError, nearest
from vgm_peft.formats.factors import full, kept, pair, spectrum_of
from vgm_peft.formats.vocabulary import is_finite
from vgm_peft.site import Site
from vgm_peft.tools.checkpoint import Checkpoint
from vgm_peft.tools.resize import Target


@dataclass(frozen=True)
class Options:
    """What to extract: the kind, for `lora` how small, for `lokr` about how many rows and columns the small factor has."""

    kind: str = "lora"
    target: Target = Target(rank=32)
    factor: int = 8

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"--kind {self.kind}", expected="one of " + ", ".join(KINDS), fix=nearest(self.kind, [*KINDS]))
        if self.factor < 1:
            raise ConfigError(f"--factor {self.factor}", expected="1 or more")


@dataclass(frozen=True)
class Found:
    """One layer: what is known of it."""

    site: Site
    base: Tensor
    difference: Tensor
    """float64, of the site's shape, as `base`."""


@torch.no_grad()
def extract(tuned: Checkpoint, base: Checkpoint, options: Options) -> tuple[Delta, dict[str, float]]:
    """Return the delta that makes `tuned` of `base`, and of every layer the share of |D| that it misses.

    Raises `DeltaError` when the two are of different families or shapes, or do not differ.
    """
    if tuned.family.name != base.family.name:
        raise DeltaError(f"{tuned.path.name} is of {tuned.family.name} and {base.path.name} of {base.family.name}")
    patches: dict[str, Patch] = {}
    missed: dict[str, float] = {}
    for site in base.sites():
        weight, other = base.tensor(site), tuned.tensor(site)
        if torch.equal(weight.to(other.dtype), other):
            continue
        found = Found(site, weight.double(), other.double() - weight.double())
        if not is_finite(found.difference):
            raise DeltaError(f"{site}: values that are not finite", expected="two sound checkpoints")
        patch = KINDS[options.kind](found, options)
        patches[site.name] = patch
        rest = found.difference - patch.change(found.base.float()).double()
        missed[site.name] = float(rest.norm() / found.difference.norm())
    if not patches:
        raise DeltaError(f"{tuned.path.name} and {base.path.name} have the same weights", expected="two that differ")
    return Delta(base.family.name, patches), missed


def _diff(found: Found, options: Options) -> Patch:
    return full(found.site, found.difference, torch.float32)


def _lora(found: Found, options: Options) -> Patch:
    if found.site.op not in ("linear", "conv"):
        return _diff(found, options)
    spectrum = spectrum_of(found.difference.flatten(1))
    return pair(found.site, spectrum.first(options.target.of(spectrum)), torch.float32)


def _lokr(found: Found, options: Options) -> Patch:
    site = found.site
    if site.op not in ("linear", "conv"):
        return _diff(found, options)
    o1, i1 = _divisor(site.shape[0], options.factor), _divisor(site.shape[1], options.factor)
    o2, i2 = site.shape[0] // o1, site.shape[1] // i1
    blocks = found.difference.reshape(o1, o2, i1, i2, -1).permute(0, 2, 1, 3, 4).reshape(o1 * i1, -1)
    spectrum = spectrum_of(blocks)
    root = spectrum.values[0].sqrt()
    left, right = (root * spectrum.left[:, 0]).view(o1, i1), (root * spectrum.right[0]).view(o2, i2, *site.shape[2:])
    return kept(site, {"lokr_w1": left, "lokr_w2": right, "alpha": torch.tensor(1.0)}, torch.float32)


def _divisor(count: int, most: int) -> int:
    return next(n for n in range(min(most, count), 0, -1) if count % n == 0)


def _svdiff(found: Found, options: Options) -> Patch:
    site, method = found.site, method_named("svdiff")
    if site.op not in method.ops:
        return _diff(found, options)
    patch = method(site, method.Options())
    # in the method's own decomposition, whose signs and order are its own
    rows = 1 if site.op == "norm" else site.rows
    left, values, right = torch.linalg.svd(found.base.float().reshape(rows, -1), full_matrices=False)
    moved = ((left.T @ found.difference.float().reshape(rows, -1)) * right).sum(1)
    patch.load_state_dict({"shift": torch.maximum(moved, -values)})
    return patch


KINDS: Mapping[str, Callable[[Found, Options], Patch]] = MappingProxyType(
    {"lora": _lora, "lokr": _lokr, "svdiff": _svdiff, "diff": _diff}
)
