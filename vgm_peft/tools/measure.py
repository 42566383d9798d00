"""How large the changes of a delta are: the Frobenius norm of dW of every module at strength 1.

Exact, and by factors where these are cheap: of a low-rank pair from its two Gram matrices, of a Kronecker product as the
product of both norms. All else is multiplied out, one module at a time.
"""

import torch

from vgm_peft.delta import Delta, Patch
from vgm_peft.formats.factors import halves_of, spelled, thin_of
from vgm_peft.tools.checkpoint import Checkpoint, change_of


@torch.no_grad()
def norms(delta: Delta, checkpoint: Checkpoint | None = None) -> dict[str, float]:
    """Norms by site, in the delta's order. Raises `DeltaError` where dW depends on a base and none is at hand."""
    return {name: norm(patch, checkpoint) for name, patch in delta.patches.items()}


def norm(patch: Patch, checkpoint: Checkpoint | None = None) -> float:
    """The norm of one change."""
    tensors = spelled(patch)
    if (thin := thin_of(tensors)) is not None:
        return thin.norm()
    if (halves := halves_of(tensors)) is not None:
        return float(halves[0].norm()) * float(halves[1].norm())
    return float(change_of(patch, checkpoint).double().norm())


def stored_rank(patch: Patch) -> int | None:
    """The rank that a change is stored at, for kinds that have one."""
    return getattr(patch.options, "rank", None)


@torch.no_grad()
def used_rank(patch: Patch, noise: float = 1e-6) -> int | None:
    """The number of singular values above `noise` times the largest; None for what is no low-rank pair."""
    thin = thin_of(spelled(patch))
    if thin is None:
        return None
    values = thin.spectrum().values
    return int((values > noise * values[0]).sum()) if float(values[0]) else 0
