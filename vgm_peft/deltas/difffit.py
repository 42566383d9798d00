"""DiffFit: biases, normalisations, and one scale factor per output of the projections.

Xie et al. 2023 (arXiv 2304.06648): y = g * (W x + b), with g = 1 at first, beside trained biases and norms. As a
change of tensors: dW = diag(g - 1) W, and of the bias (g - 1) b + db. A patch knows one tensor, so g is the weight's, and the
bias has one free value per output, which takes up (g - 1) b: the same layers can be learned. Where a projection is a target
and its bias is not, the bias stays as it is, unscaled. The factor that the paper puts on a whole residual branch acts on the
last projection of the branch and is one with that one's own (gates multiply elementwise, so also in a DiT).

| here | shape | on | same as |
|---|---|---|---|
| `gain` | (O,), g - 1 | a linear or conv weight | LyCORIS (IA)^3 `weight`, output side |
| `shift` | that of the tensor | biases, norm weights, class embeddings | `diff_b`, `w_norm`, `diff` |

A gain is exported as the dense `diff`: UIs read that beside a `diff_b`, but no (IA)^3 `weight` there.

Both are kept around 0, so that weight decay leads back to the base. Sites are the user's: for a U-Net, as in the paper's port,
`*.bias`, `*norm*`, and the weights `*.to_q.weight`, `*.to_k.weight`, `*.to_v.weight`, `*.to_out.0.weight`, `*.ff.net.2.weight`.
The learning rate is 10 times that of full training, so 1e-3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vgm_peft.delta import Call
from vgm_peft.deltas.channels import add_scaled_rows, along_rows
from vgm_peft.site import Site
from vgm_peft.sums import Vector


@dataclass(frozen=True, kw_only=True)
class DiffFitOptions:
    """There is nothing to set: what is trained is a matter of sites."""


class DiffFit(Vector):
    """dW = diag(gain) W on the weight of a linear or conv layer, a free difference on any other tensor; starts at zero."""

    kind = "difffit"
    Options = DiffFitOptions
    ops = frozenset({"linear", "conv", "norm", "bias", "embedding"})
    where = ("biases", "norms", "branches")
    rate = 10.0
    examples = (DiffFitOptions(),)
    base_free = False

    def __init__(self, site: Site, options: DiffFitOptions, generator: torch.Generator | None = None) -> None:
        """Begin at g = 1 and no shift."""
        super().__init__(site, options, generator)
        self.scales = site.op in ("linear", "conv")
        self.base_free = not self.scales
        if self.scales:
            self.gain = nn.Parameter(torch.zeros(site.rows))
        else:
            self.shift = nn.Parameter(torch.zeros(site.shape))
            self.acts = "weight" if site.op == "norm" else "output"
            self.joins = site.op == "bias"
            self.vector = "shift" if site.op in ("norm", "bias") else ""

    def change(self, base: Tensor) -> Tensor:
        """Return diag(gain) W, or the shift."""
        return along_rows(self.gain, base) * base.to(self.gain.dtype) if self.scales else self.shift

    def contribution(self, call: Call) -> Tensor:
        """Return gain * (W x), or what the shift makes of x."""
        if not self.scales:
            return super().contribution(call)
        return self.add_to(torch.zeros((), dtype=call.x.dtype, device=call.x.device), call, 1.0)

    def add_to(self, output: Tensor, call: Call, strength: float) -> Tensor:
        """Return `output` + strength * gain * (W x), or with the shift."""
        if not self.scales:
            return super().add_to(output, call, strength)
        return add_scaled_rows(output, call, self.site, self.gain, strength)
