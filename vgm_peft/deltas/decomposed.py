"""Magnitude apart from direction: W' = (g / n) (W + dW) with n the norm of that sum, for any inner change dW.

DoRA's decomposition (Liu et al. 2024, arXiv 2402.09353, equation 5), which LyCORIS puts around LoHa and LoKr too
(`weight_decompose`). One g for every output, its norm over all the output's weights, or one for every input; n is a constant to
the gradient. `magnitude` is what is *added* to the base's own norms, so that it starts at zero, needs no look at the base to
begin, and weight decay draws it to the base rather than to nothing. In a patch read from another tool's file, which has g
itself (`dora_scale`, (O, 1[, 1, 1]) or (1, I[, 1, 1])), it is g: `absolute`.

At strength m the weight is W + m (W' - W), as in ComfyUI; LyCORIS scales g / n - 1 alone. ComfyUI and Forge divide the
output-axis form by the norm of the *untouched* W: for them, export a merged model.
"""

from abc import abstractmethod
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from vgm_peft.deltas.dropout import RowDropout
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.site import Site

Axis = Literal["output", "input"]
SCALE = "dora_scale"


def check_axis(name: str, axis: str | None) -> None:
    """Raise `ConfigError` for what is neither an axis nor none."""
    if axis not in (None, *get_args(Axis)):
        raise ConfigError(f'{name} = "{axis}"', expected="output or input")


def kept(axis: Axis) -> int:
    """Return the axis of a weight that has a magnitude of its own."""
    return 0 if axis == "output" else 1


def norms(weight: Tensor, axis: Axis, dtype: torch.dtype) -> Tensor:
    """Return the norm over all axes of a weight but the one kept, in a dtype, without a copy of the weight."""
    axes = [n for n in range(weight.dim()) if n != kept(axis)]
    return torch.linalg.vector_norm(weight, dim=axes, dtype=torch.promote_types(weight.dtype, dtype)).to(dtype)


def safe(divisors: Tensor) -> Tensor:
    """Return norms to divide by, where a row may be all zero."""
    return divisors.clamp_min(torch.finfo(divisors.dtype).eps)


def broadcast(vector: Tensor, axis: Axis, dims: int) -> Tensor:
    """Return a vector over the kept axis in the shape that multiplies a weight of so many axes."""
    return vector.view(*[-1 if n == kept(axis) else 1 for n in range(dims)])


def goal(magnitude: Tensor, base: Tensor, axis: Axis, absolute: bool) -> Tensor:
    """Return g, the norms to be had."""
    return magnitude if absolute else magnitude + norms(base, axis, magnitude.dtype)


def decomposed(base: Tensor, inner: Tensor, magnitude: Tensor, axis: Axis, absolute: bool) -> Tensor:
    """Return (g / n) (W + dW) - W for the base W and an inner change dW of its shape, in the latter's dtype."""
    base = base.to(inner.dtype)
    return cast(Tensor, _Decomposed.apply(base, inner, goal(magnitude, base, axis, absolute), axis))


class _Decomposed(torch.autograd.Function):
    """(g / n) (W + dW) - W with n and W constants: small layers cost what their operations cost, so as few as there can be."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, inner: Tensor, g: Tensor, axis: Axis) -> Tensor:
        total = base + inner
        divisors = safe(norms(total, axis, g.dtype))
        c = broadcast(g / divisors, axis, base.dim())
        ctx.axes = [n for n in range(base.dim()) if n != kept(axis)]
        ctx.save_for_backward(total, c, divisors)
        return (c * total).sub_(base)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor, None]:
        total, c, divisors = ctx.saved_tensors
        return None, c * gradients[0], (gradients[0] * total).sum(ctx.axes) / divisors, None


class Decomposable(RowDropout):
    """A patch that has two options more: `decompose`, the axis by which its `inner` change is decomposed, and `absolute`.

    Decomposed it joins the weight, since n takes the dense sum anyway.
    """

    options: Any
    magnitude: Tensor

    def add_magnitude(self) -> None:
        """Add `magnitude`, where the options ask for it: to be called at the end of `__init__`."""
        axis = self.options.decompose
        if axis is not None:
            self.magnitude = nn.Parameter(torch.zeros(self.site.shape[kept(axis)]))
            self.base_free, self.packs_alone, self.acts = False, self.options.absolute, "weight"
            self.gradient_is_exact = False  # of the norm by definition none

    @abstractmethod
    def inner(self) -> Tensor:
        """Return the change that may be decomposed, in the shape of the weight."""

    def change(self, base: Tensor) -> Tensor:
        """Return the inner change, or (g / n) (W + it) - W."""
        axis, absolute = self.options.decompose, self.options.absolute
        return self.inner() if axis is None else decomposed(base, self.inner(), self.magnitude, axis, absolute)

    def total(self, base: Tensor) -> Tensor:
        """Return W + dW of the inner change, in the latter's dtype; a subclass may fuse the sum into its last product."""
        inner = self.inner()
        return base.to(inner.dtype) + inner

    def add_change(self, weight: Tensor, base: Tensor, strength: float) -> Tensor:
        """Return `weight` + strength * dW; of the untouched base at strength 1 it is (g / n) (W + dW), and W cancels out."""
        axis = self.options.decompose
        alone = strength == 1.0 and weight.data_ptr() == base.data_ptr() and not weight.requires_grad
        if axis is None or not alone or self.hides_rows:
            return super().add_change(weight, base, strength)
        total = self.total(base)
        g = goal(self.magnitude, base, axis, self.options.absolute)
        c = g / safe(norms(total.detach(), axis, g.dtype))
        return (broadcast(c, axis, base.dim()) * total).to(weight.dtype)

    def pack_magnitude(self, base: Tensor) -> dict[str, Tensor]:
        """Return `dora_scale`, (O, 1[, 1, 1]) or (1, I[, 1, 1]), where there is a magnitude."""
        axis = self.options.decompose
        if axis is None:
            return {}
        g = goal(self.magnitude, base, axis, self.options.absolute)
        return {SCALE: broadcast(g, axis, base.dim()).detach()}

    @torch.no_grad()
    def take_magnitude(self, g: Tensor | None) -> None:
        """Set the magnitude to that of a file, where it has one."""
        if g is not None:
            self.magnitude.copy_(g)


def read_scale(site: Site, found: Tensor) -> tuple[Axis, Tensor]:
    """Return by which axis `dora_scale` means it, and g: by input where it is (1, I, ...), by output where (O,) or (O, 1, ...).

    Raises `DeltaError` when it is neither.
    """
    by_output = found.numel() == site.rows and found.shape[:1] == (site.rows,)
    by_input = found.numel() == site.shape[1] and found.shape[:2] == (1, site.shape[1])
    if not (by_output or by_input):
        raise DeltaError(
            f"{site}: {SCALE} {'x'.join(map(str, found.shape)) or 'scalar'}",
            expected=f"{site.rows}x1 (one for every output) or 1x{site.shape[1]} (one for every input)",
            fix="use the delta with the base it was trained on",
        )
    return "output" if by_output else "input", found.reshape(-1)
