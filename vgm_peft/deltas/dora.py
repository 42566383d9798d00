"""DoRA: direction and magnitude of a weight changed apart, W' = (g / n) (W + s * up @ down) with n the norm of that sum.

Liu et al. 2024 (arXiv 2402.09353, equation 5). One magnitude for every output, its norm over all the output's weights, as in
the paper and peft (`axis = "output"`); LyCORIS up to 3.1 and OneTrainer take one for every input instead (`axis = "input"`),
and most public files are of that sort: both are read, trained and written. n is a constant to the gradient (section 4.3).

| here | shape | LyCORIS | peft |
|---|---|---|---|
| `down`, `up` | as in `lowrank` | `lora_down.weight`, `lora_up.weight`, `alpha` | `lora_A.weight`, `lora_B.weight` |
| `magnitude` | (O,) or (I/groups,) | g as `dora_scale`, (O, 1[, 1, 1]) or (1, I[, 1, 1]) | g as `lora_magnitude_vector` |

`magnitude` is what is *added* to the base's own norms, so that it starts at zero, needs no look at the base to begin, and
weight decay draws it to the base rather than to nothing. In a patch read from another tool's file, which has g itself, it is g
(`absolute`). At strength m the weight is W + m (W' - W), as in ComfyUI; peft scales s alone, LyCORIS scales g / n - 1 alone.
ComfyUI and Forge divide the output-axis form by the norm of the *untouched* W: for them, export a merged model.

No dense dW is made in training. By output the layer's own product serves: W'x = c (Wx) + c s up(down(x)), c = g / n; by input
one more product with W does. For n, |W + s up @ down|^2 = |W|^2 + 2 s <W, up @ down> + s^2 |up @ down|^2 row by row, whose
middle term is (W down^T . up) and whose last is (up (down down^T) . up): R columns in place of I.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self, cast, get_args

import torch
from torch import Tensor, nn

from vgm_peft.delta import Call, along_outputs, apply_dense
from vgm_peft.deltas.lowrank import LowRank, LowRankOptions, read_pair, spell
from vgm_peft.deltas.thin import add_wide
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.site import Site

Axis = Literal["output", "input"]
SCALE = "dora_scale"


@dataclass(frozen=True, kw_only=True)
class DoraOptions(LowRankOptions):
    """Settings of one DoRA: those of a LoRA, whose rank can be half as high, at a lower learning rate."""

    axis: Axis = "output"
    """What has a magnitude of its own: every output, or every input."""
    absolute: bool = False
    """`magnitude` is g itself, as other tools' files have it, and not what is added to the norm of the base."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axis not in get_args(Axis):
            raise ConfigError(f'axis = "{self.axis}"', expected="output or input")


class Dora(LowRank):
    """dW = (g / n) (W + s * up @ down) - W; starts at zero because `up` and what is added to g do."""

    kind = "dora"
    Options = DoraOptions
    rate = 0.5
    examples = (DoraOptions(rank=3, alpha=2.0), DoraOptions(rank=2, axis="input"))
    base_free = False
    gradient_is_exact = False  # of the norm by definition none
    options: DoraOptions

    def __init__(self, site: Site, options: DoraOptions, generator: torch.Generator | None = None) -> None:
        """Draw `down` as a LoRA does."""
        super().__init__(site, options, generator)
        self.magnitude = nn.Parameter(torch.zeros(site.shape[self._kept]))
        self.packs_alone = options.absolute

    @property
    def _kept(self) -> int:
        """The axis of the weight that has a magnitude of its own."""
        return 0 if self.options.axis == "output" else 1

    def change(self, base: Tensor) -> Tensor:
        """Return (g / n) (W + s * up @ down) - W."""
        base = base.to(self.up.dtype)
        changed = base + self.pair().product().view(base.shape)
        return self._broadcast(self._goal(base) / self._safe(self._norms(changed.detach()))) * changed - base

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
        return add_wide(lifted, self.hidden(call, self._broadcast(c) * down), up, layer, strength * scale)

    def _ratio(self, base: Tensor) -> Tensor:
        """Return c = g / n without dense arithmetic; exactly 1 as long as nothing is learned."""
        with torch.no_grad():
            norms = self._norms(base)
            down, up, scale = self.pair()
            flat = down.flatten(1)
            if self.options.axis == "output":
                cross = ((base.flatten(1) @ flat.t().to(base.dtype)).to(up.dtype) * up).sum(1)
                square = (up @ (flat @ flat.t()) * up).sum(1)
            else:
                kernels = (up.t().to(base.dtype) @ base.flatten(1)).to(up.dtype)
                cross = self._by_input(kernels * flat)
                square = self._by_input(up.t() @ up @ flat * flat)
            changed = (norms.square() + 2 * scale * cross + scale * scale * square).clamp_min(0).sqrt()
        return self._goal(base, norms) / self._safe(changed)

    def _goal(self, base: Tensor, norms: Tensor | None = None) -> Tensor:
        """Return g."""
        if self.options.absolute:
            return self.magnitude
        return self.magnitude + (self._norms(base) if norms is None else norms)

    def _norms(self, weight: Tensor) -> Tensor:
        """Return the norm over all axes of a weight but the one kept, in the parameters' dtype, without a copy of it."""
        axes = [axis for axis in range(weight.dim()) if axis != self._kept]
        dtype = self.magnitude.dtype
        return torch.linalg.vector_norm(weight, dim=axes, dtype=torch.promote_types(weight.dtype, dtype)).to(dtype)

    def _by_input(self, matrix: Tensor) -> Tensor:
        """Return the sums of (R, columns) over ranks and kernel, (I/groups,)."""
        return matrix.sum(0).view(self.site.shape[1], -1).sum(1)

    def _broadcast(self, vector: Tensor) -> Tensor:
        """Return a vector over the kept axis in the shape that multiplies a weight or `down`."""
        return vector.view(*[-1 if axis == self._kept else 1 for axis in range(len(self.site.shape))])

    @staticmethod
    def _safe(norms: Tensor) -> Tensor:
        """Return norms to divide by, where a row may be all zero."""
        return norms.clamp_min(torch.finfo(norms.dtype).eps)

    def pack(self, base: Tensor) -> dict[str, Tensor]:
        """Return a LoRA's tensors and `dora_scale`, (O, 1[, 1, 1]) or (1, I[, 1, 1])."""
        return {**super().pack(base), SCALE: self._broadcast(self._goal(base)).detach()}

    @classmethod
    def unpack(cls, site: Site, tensors: Mapping[str, Tensor]) -> Self | None:
        """Read a LoRA's tensors with `dora_scale`: by input where that is (1, I, ...), by output where (O,) or (O, 1, ...)."""
        spelled = read_pair(site, tensors, frozenset({SCALE}))
        if spelled is None:
            return None
        found = tensors[SCALE]
        by_output = found.numel() == site.rows and found.shape[:1] == (site.rows,)
        by_input = found.numel() == site.shape[1] and found.shape[:2] == (1, site.shape[1])
        if not (by_output or by_input):
            raise DeltaError(
                f"{site}: {SCALE} {spell(found)}",
                expected=f"{site.rows}x1 (one for every output) or 1x{site.shape[1]} (one for every input)",
                fix="use the delta with the base it was trained on",
            )
        axis: Axis = "output" if by_output else "input"
        patch = cls(site, DoraOptions(rank=spelled.options.rank, alpha=spelled.options.alpha, axis=axis, absolute=True))
        with torch.no_grad():
            patch.magnitude.copy_(found.reshape(-1))
        return patch.take(spelled)
