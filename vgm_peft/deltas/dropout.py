"""What training hides at random, so that no part of a change comes to rely on another.

| option | hides | the rest is scaled by | as in |
|---|---|---|---|
| `dropout` | values of the layer's input, from the first factor | 1 / (1 - p) | peft (kohya: what that factor returns) |
| `rank_dropout` of `up @ down` | ranks, picture by picture | 1 / (1 - p) | kohya |
| `rank_dropout` of other products | rows of dW, so outputs, for all pictures alike | 1 / (1 - p) | LyCORIS, peft |
| `block_dropout` of rotations | blocks, which become the identity | nothing, to remain a rotation | peft |
| `module_dropout` | the whole patch (`Patch.presence`) | nothing | kohya, LyCORIS, peft |

LyCORIS and peft scale the rows that are left by the share that was drawn, or where not told to by nothing. peft calls the
dropout of blocks `module_dropout` in OFT and `boft_dropout` in BOFT, and hides a fixed number of them, in BOFT of one factor;
here each is hidden by a draw of its own. All is drawn for one forward of one layer from torch's global generators, which
activation checkpointing sets back for its second forward, and so does `train.loop` at every step. Nothing is hidden from
`change`, so neither in evaluation nor from merged weights or files; gradients of what is hidden are zeros, never missing.
"""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vgm_peft.delta import Call, Patch, along_outputs
from vgm_peft.deltas.channels import along_rows
from vgm_peft.deltas.thin import weigh_ranks
from vgm_peft.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def check_shares(options: "DataclassInstance") -> None:
    """Raise `ConfigError` for a dropout among the options that is no share below the whole."""
    for name in (field.name for field in fields(options) if field.name.endswith("dropout")):
        share = getattr(options, name)
        if not 0.0 <= share < 1.0:
            raise ConfigError(f"{name} = {share}", expected="0 or more and below 1")


def hide_inputs(patch: Patch, x: Tensor) -> Tensor:
    """Return the input of a layer with the share `dropout` of its values hidden while the patch trains."""
    return F.dropout(x, patch.options.dropout) if patch.training and patch.options.dropout else x


def hide_ranks(patch: Patch, hidden: Tensor, pictures: int) -> Tensor:
    """Return what `thin.narrow` made of so many pictures with the share `rank_dropout` of ranks hidden, from each its own."""
    share = patch.options.rank_dropout
    if not (patch.training and share):
        return hidden
    rows = hidden.flatten(0, -2) if patch.site.op == "linear" else hidden
    return weigh_ranks(rows, F.dropout(hidden.new_ones(pictures, rows.shape[1]), share)).view(hidden.shape)


def hide_blocks(patch: Patch, turned: Tensor) -> Tensor:
    """Return R - I (..., b, b) with the share `block_dropout` of its blocks zero, which are then the identity."""
    share = patch.options.block_dropout
    if not (patch.training and share):
        return turned
    return turned * (torch.rand(*turned.shape[:-2], 1, 1, device=turned.device) >= share)


class RowDropout(Patch):
    """A patch that training hides rows of: its options have a `rank_dropout`, and its `contribution` hides nothing.

    A subclass that has an `add_to` of its own leaves it to this one while `hides_rows`.
    """

    options: Any

    @property
    def hides_rows(self) -> bool:
        """Whether rows are hidden now."""
        return self.training and self.options.rank_dropout > 0

    def live_change(self, base: Tensor) -> Tensor:
        """Return dW, rows of it zero while training."""
        change = self.change(base)
        return along_rows(self._shown(change), change) * change if self.hides_rows else change

    def add_to(self, output: Tensor, call: Call, strength: float) -> Tensor:
        """Return `output + strength * contribution`, outputs of the latter zero while training."""
        if not self.hides_rows:
            return super().add_to(output, call, strength)
        more = self.contribution(call).to(output.dtype)
        return torch.addcmul(output, more, along_outputs(strength * self._shown(more), call.x, call.layer))

    def _shown(self, like: Tensor) -> Tensor:
        """Draw which rows are there, (O,): 0, or 1 / (1 - p)."""
        return F.dropout(like.new_ones(self.site.rows), self.options.rank_dropout)
