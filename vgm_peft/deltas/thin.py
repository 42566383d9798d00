"""Applying a matrix of low rank: two thin products in place of one wide, the second summed into what is there already.

Mathematics for the methods of this room whose dW, or a part of it, is `up @ down`. Letters: `R` rank, `O` outputs, `I` inputs.
"""

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vgm_peft.delta import Patch, convolve
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.site import Site

M = TypeVar("M", bound=Patch)
LARGEST_PRODUCT = 2**26
"""Values of a factor that has to be multiplied out while a file is read; those of SDXL have some 2**22."""


def check_scale(rank: int, alpha: float | None) -> None:
    """Raise `ConfigError` for a rank or an alpha that no change of low rank can have."""
    if rank < 1:
        raise ConfigError(f"rank = {rank}", expected="1 or more")
    if alpha is not None and not alpha > 0:
        raise ConfigError(f"alpha = {alpha}", expected="above 0", fix="leave it out for the method's own")


def check_rank(site: Site, rank: int) -> None:
    """Raise `DeltaError` for a rank that the layer's matrix cannot have."""
    limit = min(site.rows, site.columns)
    if rank > limit:
        raise DeltaError(
            f"{site}: rank {rank}",
            expected=f"1 .. {limit}, the smaller side of its {site.rows}x{site.columns} matrix",
            fix="lower the rank or leave the layer out of the targets",
        )


def sketch(method: type[M], site: Site, options: Any) -> M:
    """Return a patch without memory for its values: what shapes it has, before a stranger's file makes it allocate them."""
    with torch.device("meta"):
        return method(site, options)


def check_product(site: Site, rows: int, columns: int) -> None:
    """Raise `DeltaError` for a product of two thin factors of a file that would take more memory than any layer's does."""
    if rows * columns > LARGEST_PRODUCT:
        raise DeltaError(f"{site}: its factors multiply to {rows}x{columns}", expected=f"{LARGEST_PRODUCT} values at most")


def narrow(x: Tensor, down: Tensor, layer: nn.Module) -> Tensor:
    """Return down(x): (..., R) for `down` (R, I), (B, groups * R, *spatial) for a convolution's (R, I/groups, *kernel)."""
    down = down.to(x.dtype)
    if down.dim() == 2:
        return F.linear(x, down)
    groups = cast(nn.Conv2d, layer).groups
    return convolve(layer, x, down if groups == 1 else down.repeat(groups, *[1] * (down.dim() - 1)))


def weigh_ranks(hidden: Tensor, weights: Tensor) -> Tensor:
    """Return `hidden` times `weights` (N, R), one row of them for every Nth part of the pictures, in order.

    `hidden` is what `narrow` returned, the tokens of all pictures in one axis: (tokens, R) or (B, groups * R, *spatial).
    """
    parts = hidden.reshape(len(weights), -1, *hidden.shape[1:])
    groups = hidden.shape[1] // weights.shape[1]
    rows = weights if groups == 1 else weights.repeat(1, groups)  # the same for all groups of a convolution
    return (parts * rows.view(len(rows), 1, -1, *[1] * (hidden.dim() - 2))).reshape(hidden.shape)


def widen(hidden: Tensor, up: Tensor, layer: nn.Module) -> Tensor:
    """Return up(hidden), for what `narrow` returned and `up` (O, R); each group of outputs from its own ranks."""
    up = up.to(hidden.dtype)
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return F.linear(hidden, up)
    pointwise = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[hidden.dim() - 2]
    return pointwise(hidden, up.view(*up.shape, *[1] * (hidden.dim() - 2)), groups=layer.groups)


def add_wide(output: Tensor, hidden: Tensor, up: Tensor, layer: nn.Module, scale: float = 1.0) -> Tensor:
    """Return `output` + scale * up(hidden), a new tensor, in one product where there is one."""
    hidden, up = hidden.to(output.dtype), up.to(output.dtype)
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return add_product(output, hidden, up, scale)
    if layer.groups > 1:
        return torch.add(output, widen(hidden, up, layer), alpha=scale)
    if not output.is_contiguous():  # channels last: pixels are rows
        return add_product(output.movedim(1, -1), hidden.movedim(1, -1), up, scale).movedim(-1, 1)
    many = up.expand(len(hidden), -1, -1)
    return torch.baddbmm(output.flatten(2), many, hidden.flatten(2), alpha=scale).view(output.shape)


def add_product(output: Tensor, hidden: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return `output` (..., O) + scale * `hidden` (..., R) @ up.T, all of one dtype, in one product."""
    rows, rank = up.shape
    return torch.addmm(output.reshape(-1, rows), hidden.reshape(-1, rank), up.t(), alpha=scale).view(output.shape)
