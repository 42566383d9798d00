"""DoRA: direction and magnitude of a weight changed apart, W' = (g / n) (W + s * up @ down) with n the norm of that sum.

Liu et al. 2024 (arXiv 2402.09353, equation 5). One magnitude for every output, its norm over all the output's weights, as in
the paper and peft (`axis = "output"`); LyCORIS up to 3.1 and OneTrainer take one for every input instead (`axis = "input"`),
and most public files are of that sort: both are read, trained and written. n is a constant to the gradient (section 4.3).

| here | shape | LyCORIS | peft |
|---|---|---|---|
| `down`, `up` | as in `lowrank` | `lora_down.weight`, `lora_up.weight`, `alpha` | `lora_A.weight`, `lora_B.weight` |
| `magnitude` | (O,) or (I/groups,) | g as `dora_scale`, (O, 1[, 1, 1]) or (1, I[, 1, 1]) | g as `lora_magnitude_vector` |

What `magnitude` is, and how tools differ over strength and norm, stands in `decomposed`; peft scales s alone by the strength.

No dense dW is made in training. By output the layer's own product serves: W'x = c (Wx) + c s up(down(x)), c = g / n; by input
one more product with W does. For n, |W + s up @ down|^2 = |W|^2 + 2 s <W, up @ down> + s^2 |up @ down|^2 row by row, whose
middle term is (W down^T . up) and whose last is (up (down down^T) . up): R columns in place of I.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor, nn

from vgm_peft.delta import Call, along_outputs, apply_dense
from vgm_peft.deltas.decomposed import SCALE, Axis, broadcast, check_axis, decomposed, goal, kept, norms, read_scale, safe
from vgm_peft.deltas.lowrank import LowRank, LowRankOptions, read_pair
from vgm_peft.deltas.thin import add_wide
from vgm_peft.site import Site


@dataclass(frozen=True, kw_only=True)
class DoraOptions(LowRankOptions):
    """Settings of one DoRA: those of a LoRA, whose rank can be half as high, at a lower learning rate."""

    axis: Axis = "output"
    """What has a magnitude of its own: every output, or every input."""
    absolute: bool = False
    """`magnitude` is g itself, as other tools' files have it, and not what is added to the norm of the base."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_axis("axis", self.axis)


class Dora(LowRank):
    """dW = (g / n) (W + s * up @ down) - W; starts at zero because `up` and what is added to g do."""

    kind = "dora"
    Options = DoraOptions
    rate = 0.5
    examples = (DoraOptions(rank=3, alpha=2.0), DoraOptions(rank=2, axis="input"))
    base_free = False
    gradient_is_exact = False  # of the norm by definition none
    joins = True
    options: DoraOptions

    def __init__(self, site: Site, options: DoraOptions, generator: torch.Generator | None = None) -> None:
        """Draw `down` as a LoRA does."""
        super().__init__(site, options, generator)
        self.magnitude = nn.Parameter(torch.zeros(site.shape[kept(options.axis)]))
        self.packs_alone = options.absolute

    def change(self, base: Tensor) -> Tensor:
        """Return (g / n) (W + s * up @ down) - W."""
        inner = self.pair().product().view(base.shape)
        return decomposed(base, inner, self.magnitude, self.options.axis, self.options.absolute)

    def live_change(self, base: Tensor) -> Tensor:
        """Return the same, with nothing of the weight's size kept for the gradient."""
        (down, up, scale), axis = self.pair(), self.options.axis
        base = base.to(up.dtype)
        with torch.no_grad():
            own = norms(base, axis, self.magnitude.dtype)
            sums = torch.addmm(base.flatten(1), up, down.flatten(1), alpha=scale).view(base.shape)
            changed = safe(norms(sums, axis, self.magnitude.dtype))
        c = broadcast((self.magnitude if self.options.absolute else self.magnitude + own) / changed, axis, base.dim())
        lifted = (c - 1) * base
        left, right = (c.view(-1, 1) * up, down) if axis == "output" else (up, c * down)
        return torch.addmm(lifted.flatten(1), left, right.flatten(1), alpha=scale).view(base.shape)

    def contribution(self, call: Call) -> Tensor:
        """Return (c - 1) Wx + c s up(down(x)), c = g / n, without bias."""
        c = self._ratio(call.base)
        if self.options.axis == "output":
            down, up, scale = self.pair()
            product = call.product(self.site)
            lifted = product * along_outputs(c - 1, call.x, call.layer).to(product.dtype)
            return add_wide(lifted, self.hidden(call, down), c[:, None] * up, call.layer, scale)
        return self._input_axis(call, c, None, 1.0)

    def add_to(self, output: Tensor, call: Call, strength: float) -> Tensor:
        """Return `output + strength * contribution`, scaled and summed on the way."""
        c = self._ratio(call.base)
        if self.options.axis == "input":
            return self._input_axis(call, c, output, strength)
        down, up, scale = self.pair()
        product = call.product(self.site).to(output.dtype)
        raised = torch.addcmul(output, product, along_outputs(strength * (c - 1), call.x, call.layer).to(output.dtype))
        return add_wide(raised, self.hidden(call, down), c[:, None] * up, call.layer, strength * scale)

    def _input_axis(self, call: Call, c: Tensor, output: Tensor | None, strength: float) -> Tensor:
        """Return `output`, or nothing, plus strength * (W((c - 1) x) + s up(down(c x)))."""
        x, layer = call.x, call.layer
        groups = cast(nn.Conv2d, layer).groups if self.site.op == "conv" else 1
        more = (c - 1).repeat(groups).to(x.dtype)
        fed = x * (more if self.site.op == "linear" else more.view(-1, *[1] * (x.dim() - 2)))
        lifted = apply_dense(call.base.to(x.dtype), fed, layer, self.site)
        lifted = lifted if output is None else torch.add(output, lifted.to(output.dtype), alpha=strength)
        down, up, scale = self.pair()
        return add_wide(lifted, self.hidden(call, broadcast(c, "input", down.dim()) * down), up, layer, strength * scale)

    def _ratio(self, base: Tensor) -> Tensor:
        """Return c = g / n without dense arithmetic; exactly 1 as long as nothing is learned."""
        with torch.no_grad():
            own = norms(base, self.options.axis, self.magnitude.dtype)
            down, up, scale = self.pair()
            flat = down.flatten(1)
            if self.options.axis == "output":
                cross = ((base.flatten(1) @ flat.t().to(base.dtype)).to(up.dtype) * up).sum(1)
                square = (up @ (flat @ flat.t()) * up).sum(1)
            else:
                kernels = (up.t().to(base.dtype) @ base.flatten(1)).to(up.dtype)
                cross = self._by_input(kernels * flat)
                square = self._by_input(up.t() @ up @ flat * flat)
            changed = (own.square() + 2 * scale * cross + scale * scale * square).clamp_min(0).sqrt()
        return (self.magnitude if self.options.absolute else self.magnitude + own) / safe(changed)

    def _by_input(self, matrix: Tensor) -> Tensor:
        """Return the sums of (R, columns) over ranks and kernel, (I/groups,)."""
        return matrix.sum(0).view(self.site.shape[1], -1).sum(1)

    def pack(self, base: Tensor) -> dict[str, Tensor]:
        """Return a LoRA's tensors and `dora_scale`, (O, 1[, 1, 1]) or (1, I[, 1, 1])."""
        g = goal(self.magnitude, base, self.options.axis, self.options.absolute)
        return {**super().pack(base), SCALE: broadcast(g, self.options.axis, base.dim()).detach()}

    @classmethod
    def unpack(cls, site: Site, tensors: Mapping[str, Tensor]) -> Self | None:
        """Read a LoRA's tensors with `dora_scale`: by input where that is (1, I, ...), by output where (O,) or (O, 1, ...)."""
        spelled = read_pair(site, tensors, frozenset({SCALE}))
        if spelled is None:
            return None
        axis, g = read_scale(site, tensors[SCALE])
        patch = cls(site, DoraOptions(rank=spelled.options.rank, alpha=spelled.options.alpha, axis=axis, absolute=True))
        with torch.no_grad():
            patch.magnitude.copy_(g)
        return patch.take(spelled)
