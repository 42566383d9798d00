"""The vocabulary that tools share for one module's change (LyCORIS'), and its way to patches and back.

A module's tensors are told apart by suffixes: `lora_down.weight`, `lora_up.weight`, `lokr_w1`, `diff`, `alpha` ... Which
method means what by them is the method's own business (`Patch.pack`, `Patch.unpack`); here is what can be said without
knowing it: the shape of the change they make, and whether the values are numbers at all.
"""

from collections.abc import Mapping
from math import isfinite, prod

import torch
from torch import Tensor

from vgm_peft.delta import Delta, Patch
from vgm_peft.deltas import TABLE
from vgm_peft.errors import DeltaError, VgmError
from vgm_peft.family import Base
from vgm_peft.header import shown
from vgm_peft.site import Site, locate
from vgm_peft.socket import untouched

Suffixes = dict[str, Tensor]
"""One module's tensors by suffix."""

BIAS_SUFFIXES = frozenset(("diff_b", "b_norm"))
"""Suffixes that change the module's bias; all others change its weight."""

RANK_AXES = {"lora_down.weight": 0, "hada_w1_b": 0, "lokr_w2_b": 0, "b1.weight": 1, "oft_blocks": -1}
"""Tensor of a module -> which of its axes is as long as the rank that other tools tell."""


def shape_of(tensors: Mapping[str, Tensor], published: tuple[int, ...] = ()) -> tuple[int, ...] | None:
    """Return the shape of the tensor that one module's tensors change, or None when they alone do not tell.

    `published` is that of the layer in its family's published base: its kernel is taken for the spellings of thin products,
    which flatten theirs.
    """
    kernel = published[2:]
    for name in ("diff", "diff_b", "w_norm", "b_norm"):
        if name in tensors:
            return tuple(tensors[name].shape)
    up, down = tensors.get("lora_up.weight"), tensors.get("lora_down.weight")
    if up is not None and down is not None and up.dim() > 1 and down.dim() > 1:
        return _pair_shape(up, down, tensors.get("lora_mid.weight"), published)
    up, down = tensors.get("b1.weight"), tensors.get("b2.weight")
    if up is not None and down is not None and up.dim() > 1 and down.dim() > 1:
        return (up.shape[0], *down.shape[1:])
    return _half_shape(tensors, "hada_w1", "hada_t1", kernel) or _kronecker_shape(tensors, kernel)


def _pair_shape(up: Tensor, down: Tensor, mid: Tensor | None, published: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a product of two thin factors, or of two of DiffuseKronA's, which go by the same names."""
    plain = (up.shape[0], down.shape[1], *(down if mid is None else mid).shape[2:])
    crossed = (up.shape[0] * down.shape[1], up.shape[1] * down.shape[0])
    is_crossed = up.shape[1] != down.shape[0] or crossed == published != plain
    return crossed if is_crossed and up.dim() == down.dim() == 2 else plain


def _kronecker_shape(tensors: Mapping[str, Tensor], kernel: tuple[int, ...]) -> tuple[int, ...] | None:
    left, right = _half_shape(tensors, "lokr_w1", "", ()), _half_shape(tensors, "lokr_w2", "lokr_t2", kernel)
    if left is None or right is None or min(len(left), len(right)) < 2:
        return None
    return (left[0] * right[0], left[1] * right[1], *right[2:])


def _half_shape(tensors: Mapping[str, Tensor], name: str, core: str, kernel: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape of what a tensor is, or its two factors `_a` and `_b`, or these and their core multiply to."""
    whole, rows, columns, middle = (tensors.get(key) for key in (name, f"{name}_a", f"{name}_b", core))
    if whole is not None:
        return tuple(whole.shape)
    if rows is None or columns is None or min(rows.dim(), columns.dim()) < 2:
        return None
    if middle is not None:
        return (rows.shape[1], columns.shape[1], *middle.shape[2:])
    if columns.dim() > 2 or columns.shape[1] % prod(kernel):
        return (rows.shape[0], *columns.shape[1:])
    return (rows.shape[0], columns.shape[1] // prod(kernel), *kernel)


def is_finite(tensor: Tensor) -> bool:
    """Say whether all values are numbers; by the smallest and the largest, which is 20 times as fast as looking at each."""
    if not tensor.numel() or tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return bool(torch.isfinite(tensor).all())
    return all(isfinite(float(end)) for end in tensor.aminmax())  # which are NaN where any value is


def unpack(site: Site, tensors: Suffixes, where: str) -> Patch:
    """Make the patch that one module's tensors spell, by asking each method. Raises `DeltaError` when none reads them."""
    for suffix, tensor in tensors.items():
        if not is_finite(tensor):
            raise DeltaError(
                f"{where}: {site}: {shown(suffix)} holds values that are not finite", fix="train or export it again"
            )
    for method in TABLE.values():
        try:
            patch = method.unpack(site, tensors)
        except VgmError as error:  # which knows the site and not the file
            raise DeltaError(f"{where}: {error.what}", expected=error.expected, fix=error.fix) from None
        if patch is not None:
            return patch
    raise DeltaError(
        f"{where}: {site}: no method here reads " + ", ".join(map(shown, sorted(tensors))),
        expected="a delta of " + " or ".join(sorted(TABLE)),
    )


def pack_all(delta: Delta, base: Base | None) -> list[Suffixes]:
    """Spell every patch, in the delta's order and the dtype of its values."""
    packed: list[Suffixes] = []
    for patch in delta:
        if patch.timed:
            raise DeltaError(
                f"{patch.site}: {patch.kind} changes with the timestep, which only our own format can say",
                fix="keep the native file and attach it live",
            )
        packed.append(pack(patch, base))
    return packed


def pack(patch: Patch, base: Base | None) -> Suffixes:
    """Spell one patch. Raises `DeltaError` when it takes the base's weights to do so and there is none."""
    tensors = patch.pack(_stand_in(patch, base, patch.base_free or patch.packs_alone))
    return {suffix: tensor.detach() for suffix, tensor in tensors.items()}


def change(patch: Patch, base: Base | None) -> Tensor:
    """Return the dense dW of a patch. Raises `DeltaError` when it depends on the base's weights and there is none."""
    return patch.change(_stand_in(patch, base, patch.base_free)).detach()


def convert(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return tensors in another dtype, where one is asked for; an `alpha` stays as it is. Raises `DeltaError` on overflow."""
    if dtype is None:
        return dict(tensors)
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        keep = name.endswith("alpha") or not tensor.is_floating_point()
        out[name] = tensor if keep else tensor.to(dtype)
        if not keep and not is_finite(out[name]):
            largest = float(tensor.abs().max())
            raise DeltaError(f"{name} does not fit {dtype} (largest {largest:.3g})", fix="write it as bfloat16 or float32")
    return out


def _stand_in(patch: Patch, base: Base | None, free: bool) -> Tensor:
    """Return the base tensor on the patch's device, or zeros without memory where nothing but the shape is read (`free`)."""
    device = next((p.device for p in patch.parameters()), torch.device("cpu"))
    if base is not None:
        return untouched(locate(base.parts, patch.site), patch.site.tensor).detach().to(device)
    if not free:
        raise DeltaError(
            f"{patch.site}: a change by {patch.kind} depends on the base's own weights", fix="name the base with --base"
        )
    return torch.zeros((), device=device).expand(patch.site.shape)


def rank_of(tensors: Mapping[str, Tensor]) -> int | None:
    """Return the rank at which a low-rank module is stored, or the size of a rotation's blocks; None for other kinds."""
    for suffix, axis in RANK_AXES.items():
        if suffix in tensors:
            return tensors[suffix].shape[axis]
    return None
