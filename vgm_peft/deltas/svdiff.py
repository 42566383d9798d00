"""SVDiff: shifting the singular values of a weight, dW = U (relu(S + shift) - S) V^T with W = U S V^T.

Han et al. 2023 (arXiv 2303.11305). A convolution's weight is taken as (O, I * kernel), a norm's as one row,
whose single singular value is its length.

| here | shape | mkshing/svdiff-pytorch |
|---|---|---|
| `shift` | (min(O, I * kernel),), of a norm (1,) | `delta` |

U, S and V come from the base's own weight in float32 or wider and are kept as long as that does not change; they are in no
file, so such a file means something only together with its base. Strength interpolates W and W + dW; mkshing's code multiplies
the shift within relu instead, which is the same where nothing is cut off. Rates are 1000 times those of full training: 1e-3,
for norms 1e-6.

Two products with U and V are paid for in every forward. Small weights are multiplied out, which is cheap only where tokens
are many; wide ones, which U-Nets have where tokens are few, act on the input instead. Against a LoRA step on one layer, float32
on a CPU: 1.7 for a 3x3 of 320 channels at 2x32x32, 2.5 and 2.8 for 640 and 1280 wide linears at 512 tokens.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from vgm_peft.delta import Call, Patch
from vgm_peft.deltas.thin import add_wide, narrow, widen
from vgm_peft.site import Site

WIDE = 1024
"""Number of singular values from which on multiplying U and V out costs more than applying them one after the other."""


@dataclass(frozen=True, kw_only=True)
class SvdiffOptions:
    """There is nothing to set."""


class Svdiff(Patch):
    """dW = U (relu(S + shift) - S) V^T on a linear, conv or norm weight; starts at zero because the shift does."""

    kind = "svdiff"
    Options = SvdiffOptions
    ops = frozenset({"linear", "conv", "norm"})
    where = ("weights",)
    rate = 10.0
    examples = (SvdiffOptions(),)
    base_free = False

    def __init__(self, site: Site, options: SvdiffOptions, generator: torch.Generator | None = None) -> None:
        """Begin at no shift."""
        super().__init__(site, options, generator)
        size = 1 if site.op == "norm" else min(site.rows, site.columns)
        self.acts = "weight" if size < WIDE else "output"
        self.shift = nn.Parameter(torch.zeros(size))
        self._known: _Spectrum | None = None

    def change(self, base: Tensor) -> Tensor:
        """Return U (relu(S + shift) - S) V^T, computed in float32 or wider."""
        spectrum = self._spectrum(base)
        return ((spectrum.left * self._moved(spectrum)) @ spectrum.right).view(self.site.shape).to(self.shift.dtype)

    def contribution(self, call: Call) -> Tensor:
        """Return U (d * V^T x): for where the dense dW cannot join the weight."""
        if self.site.op == "norm":
            return super().contribution(call)
        return widen(self._hidden(call, 1.0), self._spectrum(call.base).left, call.layer)

    def add_to(self, output: Tensor, call: Call, strength: float) -> Tensor:
        """Return `output` + strength * U (d * V^T x)."""
        if self.site.op == "norm":
            return super().add_to(output, call, strength)
        return add_wide(output, self._hidden(call, strength), self._spectrum(call.base).left, call.layer)

    def _hidden(self, call: Call, strength: float) -> Tensor:
        """Return strength * d * V^T x, with the values of all groups of a convolution alike."""
        spectrum = self._spectrum(call.base)
        hidden = narrow(call.x, spectrum.right.view(-1, *self.site.shape[1:]), call.layer)
        moved = (strength * self._moved(spectrum)).to(hidden.dtype)
        if self.site.op == "conv":
            moved = moved.repeat(hidden.shape[1] // len(moved)).view(-1, *[1] * (hidden.dim() - 2))
        return moved * hidden

    def _moved(self, spectrum: "_Spectrum") -> Tensor:
        """Return relu(S + shift) - S, exactly 0 where the shift is."""
        return torch.relu(spectrum.values + self.shift.to(spectrum.values.dtype)) - spectrum.values

    def _spectrum(self, base: Tensor) -> "_Spectrum":
        if self._known is None or not self._known.belongs_to(base):
            self._known = _Spectrum(base, self.site)
        return self._known


class _Spectrum:
    """The singular value decomposition of one weight, and the means to know that weight again. Never changes."""

    def __init__(self, base: Tensor, site: Site) -> None:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(base.device.type, enabled=False):
            # An inference tensor does not tell when it is written to.
            self.source = base.clone() if base.is_inference() else base.detach()
            self.version = self.source._version
            flat = self.source.reshape(1, -1) if site.op == "norm" else self.source.flatten(1)
            wide = flat.to(torch.promote_types(base.dtype, torch.float32))
            self.left, self.values, self.right = torch.linalg.svd(wide, full_matrices=False)

    def belongs_to(self, base: Tensor) -> bool:
        """Say whether this is the decomposition of `base`: the same untouched memory (which is held), or equal values."""
        source = self.source
        if source._version != self.version or source.shape != base.shape or source.device != base.device:
            return False
        return source.data_ptr() == base.data_ptr() and source.dtype == base.dtype or torch.equal(source.to(base.dtype), base)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self
