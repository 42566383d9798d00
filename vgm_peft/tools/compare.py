"""Two deltas, module by module: how far apart their changes are, and whether they point the same way."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import torch

from vgm_peft.delta import Delta, Patch
from vgm_peft.errors import DeltaError
from vgm_peft.formats.factors import spelled, thin_of
from vgm_peft.tools.checkpoint import Checkpoint, change_of


@dataclass(frozen=True)
class Apart:
    """One module: how far both changes are apart."""

    distance: float
    """|A - B| as a share of the larger of |A| and |B|: 0 equal, 1 where only one changes it, 2 opposite."""
    cosine: float
    """Of the angle between both; 0 where one of them is nothing."""
    ours: float
    """|A|."""
    theirs: float
    """|B|."""


@torch.no_grad()
def compare(one: Delta, other: Delta, checkpoint: Checkpoint | None = None) -> dict[str, Apart]:
    """Compare the changes of two deltas of one family by site, those of the first in its order, then what only the other has.

    Raises `DeltaError` for deltas of two families or of differently shaped bases.
    """
    if one.family != other.family:
        raise DeltaError(f"a delta of {one.family} and one of {other.family}", expected="two of one family")
    names = list(dict.fromkeys([*one.patches, *other.patches]))
    return {name: _apart(one.patches.get(name), other.patches.get(name), checkpoint) for name in names}


def overall(apart: Mapping[str, Apart]) -> Apart:
    """The same of all modules taken as one long vector."""
    ours, theirs = sum(a.ours**2 for a in apart.values()), sum(a.theirs**2 for a in apart.values())
    inner = sum(a.cosine * a.ours * a.theirs for a in apart.values())
    between = sum((a.distance * max(a.ours, a.theirs)) ** 2 for a in apart.values())
    return _made(sqrt(between), inner, sqrt(ours), sqrt(theirs))


def _apart(one: Patch | None, other: Patch | None, checkpoint: Checkpoint | None) -> Apart:
    if one is not None and other is not None and one.site.shape != other.site.shape:
        raise DeltaError(f"{one.site}: the other delta changes a {'x'.join(map(str, other.site.shape))}")
    a, b = (None if patch is None else thin_of(spelled(patch)) for patch in (one, other))
    if a is not None and b is not None:
        # the norm of the difference from its singular values: from Gram matrices half the digits would be lost
        return _made(float((a + b * -1.0).spectrum().values.norm()), float(a.inner(b)), a.norm(), b.norm())
    x, y = (torch.zeros(()) if patch is None else change_of(patch, checkpoint).double() for patch in (one, other))
    return _made(float((x - y).norm()), float((x * y).sum()), float(x.norm()), float(y.norm()))


def _made(between: float, inner: float, ours: float, theirs: float) -> Apart:
    most, product = max(ours, theirs), ours * theirs
    return Apart(between / most if most else 0.0, max(-1.0, min(1.0, inner / product)) if product else 0.0, ours, theirs)
