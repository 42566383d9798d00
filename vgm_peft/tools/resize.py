"""Make a delta's low-rank changes smaller: to a rank, or to the rank that keeps a share of the spectrum, module by module.

The nearest change of a rank is the truncated singular value decomposition (Eckart and Young 1936). For a pair it costs two
QR decompositions of thin matrices and one small SVD (`factors`); what is no pair is decomposed as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vgm_peft.delta import Delta, Patch
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.formats.factors import Spectrum, dtype_of, pair, spectrum_of, spelled, thin_of
from vgm_peft.tools.checkpoint import Checkpoint, change_of

STALE = ("sshs_", "ss_network_", "modelspec.hash")
"""How metadata begins that a changed file must not carry on."""


@dataclass(frozen=True)
class Target:
    """How small: a rank, or the share of the sum of squared singular values that is kept in every module."""

    rank: int | None = None
    keep: float | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.keep is None):
            raise ConfigError("how small is not said", expected="either --rank R or --keep SHARE")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"--rank {self.rank}", expected="1 or more")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ConfigError(f"--keep {self.keep}", expected="above 0 and at most 1, as in 0.95")

    def of(self, spectrum: Spectrum) -> int:
        """The rank for one module."""
        most = max(len(spectrum.values), 1)
        return min(self.rank, most) if self.rank is not None else spectrum.rank_for(self.keep or 1.0)


@dataclass(frozen=True)
class Step:
    """What became of one module: its rank before (None: it was no pair) and after, and the share of |dW| that is lost."""

    before: int | None
    after: int
    error: float


@torch.no_grad()
def resize(delta: Delta, target: Target, checkpoint: Checkpoint | None = None) -> tuple[Delta, dict[str, Step]]:
    """Return a smaller delta and what became of each of its modules.

    Norms, biases and embeddings, which are no matrices, and words stay as they are. Raises `DeltaError` where a change depends
    on a base and none is at hand.
    """
    patches: dict[str, Patch] = {}
    steps: dict[str, Step] = {}
    for name, patch in delta.patches.items():
        if patch.site.op not in ("linear", "conv"):
            patches[name] = patch
            continue
        patches[name], steps[name] = reduced(patch, target, checkpoint)
    if not steps:
        raise DeltaError("there is no layer to make smaller", expected="a delta of linear or conv layers")
    return Delta(delta.family, patches, delta.words, carried(delta.metadata)), steps


def reduced(patch: Patch, target: Target, checkpoint: Checkpoint | None) -> tuple[Patch, Step]:
    """Make one change smaller; a pair whose rank is low enough already stays as it is."""
    thin = thin_of(spelled(patch))
    spectrum = spectrum_of(change_of(patch, checkpoint).flatten(1)) if thin is None else thin.spectrum()
    rank = target.of(spectrum)
    if thin is not None and thin.rank <= rank:
        return patch, Step(thin.rank, thin.rank, 0.0)
    step = Step(None if thin is None else thin.rank, rank, spectrum.lost(rank))
    return pair(patch.site, spectrum.first(rank), dtype_of(patch)), step


def carried(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata that is still true of a changed delta."""
    return {key: text for key, text in metadata.items() if not key.startswith(STALE)}
