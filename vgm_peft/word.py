"""The noun `Word`: a trained token, which is no change of any weight but embedding rows of its own.

Textual Inversion, Gal et al. 2022, arXiv 2208.01618; one row per cross-attention (P+), Voynov et al. 2023, arXiv 2303.09522.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Word:
    """A trained token: new embedding rows, one stack for every text encoder that it was trained on."""

    token: str
    rows: "dict[str, Tensor]"
    """Part name (`text_encoder`, `text_encoder_2`) -> (N, D) float tensor; N vectors, all parts the same N. A layer-wise word
    has N vectors for each of the S cross-attentions of the denoiser, (S, N, D), in the order of its forward."""
    leads: bool = False
    """Whether it stands at the beginning of every prompt by itself (a soft prefix), instead of where its token is written."""

    @property
    def vectors(self) -> int:
        """Places that it takes in a prompt."""
        return next(iter(self.rows.values())).shape[-2]

    @property
    def layers(self) -> int:
        """Cross-attentions that it has rows for; 0 where all see the same."""
        rows = next(iter(self.rows.values()))
        return len(rows) if rows.dim() == 3 else 0

    def for_layers(self, count: int) -> Self:
        """Return a layer-wise copy, alike for all `count` cross-attentions."""
        return replace(self, rows={part: rows.expand(count, *rows.shape).clone() for part, rows in self.rows.items()})

    def is_plain(self) -> bool:
        """Say whether it is what other tools call an embedding: one stack of rows, put where its token is written."""
        return not self.layers and not self.leads
