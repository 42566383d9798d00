"""Is what was written what was meant? Two deltas compared by the change they make, the only thing that counts."""

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor

from vgm_peft.delta import Delta, Patch
from vgm_peft.errors import DeltaError
from vgm_peft.family import Base
from vgm_peft.formats.peft_kinds import spelled
from vgm_peft.formats.vocabulary import change, pack
from vgm_peft.header import listed

BOUNDS: Mapping[torch.dtype, float] = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest difference of dW that rounding to a dtype explains, as a share of the largest value of dW."""


@torch.no_grad()
def check_change(meant: Delta, written: Delta, base: Base | None, dtype: torch.dtype | None) -> None:
    """Raise `DeltaError` unless both deltas change the same tensors by the same dW, up to the rounding of `dtype`.

    The dense dW is compared for one patch of every kind, options and kernel. Others of the same sort, which the same code
    spells, are compared by their spelling, and by dW where that differs: dense, SDXL would take half a minute. Where dW
    depends on a base that is not there, the spelling is all there is. What only one of them has must be a change of nothing.
    """
    ours, theirs = meant.patches, written.patches
    odd = [name for name in sorted({*ours} ^ {*theirs}) if not _is_zero(ours.get(name) or theirs[name], base)]
    if odd:
        raise DeltaError(f"{len(odd)} changes are not the same in the written file ({listed(odd)})", expected="none lost")
    seen: set[tuple[object, ...]] = set()
    for name, patch in ours.items():
        copy = theirs.get(name)
        if copy is None:
            continue
        sort = (patch.kind, repr(patch.options), patch.site.op, patch.site.shape[2:])
        bound = BOUNDS.get(dtype or _dtype(patch), 1e-5)
        first = sort not in seen and _is_known(patch, base)
        if first or not _same_spelling(patch, copy, base, bound / 8):
            _check_dense(patch, copy, base, bound, dtype)
        seen.add(sort)


def _is_known(patch: Patch, base: Base | None) -> bool:
    """Say whether dW can be computed."""
    return base is not None or patch.base_free


def _is_zero(patch: Patch, base: Base | None) -> bool:
    return _is_known(patch, base) and not bool(change(patch, base).any())


def _check_dense(patch: Patch, copy: Patch, base: Base | None, bound: float, dtype: torch.dtype | None) -> None:
    wanted, found = (change(_wide(p), base).to("cpu", torch.float32) for p in (patch, copy))
    if wanted.shape != found.shape:
        raise DeltaError(
            f"{patch.site}: this spelling of {patch.kind} does not tell the layer's shape: it reads as {tuple(found.shape)}",
            fix="name the base with --base",
        )
    error, largest = _largest(wanted - found), _largest(wanted)
    if not error <= bound * largest:
        raise DeltaError(
            f"{patch.site}: the written change differs by {error:.3g} of {largest:.3g}",
            expected=f"at most {bound:g} of it",
            fix="write it in a wider dtype" if dtype else "",
        )


def _same_spelling(patch: Patch, copy: Patch, base: Base | None, bound: float) -> bool:
    """Say whether two patches are spelled by the same tensors, the scale of low-rank pairs multiplied out."""
    ours, theirs = (_packed(p, base) for p in (patch, copy))
    if {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()} and all(
        torch.equal(ours[n].cpu(), theirs[n].cpu()) for n in ours
    ):
        return True  # to the last bit, as mostly, and without a wider copy
    ours, theirs = _scaled(ours), _scaled(theirs)
    if {n: t.shape for n, t in ours.items()} != {n: t.shape for n, t in theirs.items()}:
        return False
    return all(_largest(ours[n] - theirs[n]) <= bound * _largest(ours[n]) for n in ours)


def _packed(patch: Patch, base: Base | None) -> dict[str, Tensor]:
    tensors = spelled(patch) if base is None and not patch.base_free else None
    return pack(patch, base) if tensors is None else tensors


def _scaled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    packed = {name: tensor.to("cpu", _exactly(tensor.dtype)) for name, tensor in tensors.items()}
    up, alpha = packed.get("lora_up.weight"), packed.get("alpha")
    if up is not None and alpha is not None:
        scale = float(alpha) / up.shape[1]
        packed["lora_up.weight"] = up if scale == 1.0 else up * scale
        del packed["alpha"]
    return packed


def _exactly(dtype: torch.dtype) -> torch.dtype:
    """Return a dtype that holds all values of another, and sums of them to far below the bounds."""
    return torch.float32 if dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float64


def _largest(tensor: Tensor) -> float:
    """Return the largest magnitude; not a number where any value is none."""
    low, high = tensor.aminmax()
    return max(-float(low), float(high))


def _wide(patch: Patch) -> Patch:
    """Return a patch of half precision as one of float32: a CPU takes ten times as long to multiply halves, and rounds more."""
    halves = any(p.dtype in (torch.float16, torch.bfloat16) for p in patch.parameters())
    return deepcopy(patch).float() if halves else patch


@torch.no_grad()
def check_words(meant: Delta, written: Delta, dtype: torch.dtype | None) -> None:
    """Raise `DeltaError` unless both deltas hold the same tokens with the same rows, up to the rounding of `dtype`."""
    if list(meant.words) != list(written.words):
        raise DeltaError(f"the written file holds the tokens {listed(list(written.words))}", expected=listed(list(meant.words)))
    for token, word in meant.words.items():
        for part, rows in word.rows.items():
            found = written.words[token].rows.get(part)
            if found is None or not torch.equal(found, rows.detach().cpu().to(dtype or rows.dtype)):
                raise DeltaError(f"the written rows of {token} for {part} are not those meant")


def identical(a: Delta, b: Delta) -> bool:
    """Say whether two deltas are the same bit for bit: sites, kinds, options, parameters, words and metadata."""

    def table(delta: Delta) -> dict[str, Tensor]:
        tensors = {f"{name}/{key}": value for name, patch in delta.patches.items() for key, value in patch.state_dict().items()}
        return tensors | {f"{w.token}/{part}": rows.detach() for w in delta.words.values() for part, rows in w.rows.items()}

    def frame(delta: Delta) -> object:
        return delta.family, [(p.kind, p.site, p.options) for p in delta], list(delta.words), delta.metadata

    ours, theirs = table(a), table(b)
    return frame(a) == frame(b) and list(ours) == list(theirs) and all(_same(ours[k], theirs[k]) for k in ours)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit, not-a-numbers included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    plain = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*plain)


def _dtype(patch: Patch) -> torch.dtype:
    return next((p.dtype for p in patch.parameters()), torch.float32)
