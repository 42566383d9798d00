"""What a weight becomes with changes fused into it: its original plus the sum of them, computed wide and rounded once."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy

import torch
from torch import Tensor

from vgm_peft.delta import Patch


@contextmanager
def exact(tensor: Tensor) -> Generator[None]:
    """Change a weight in place whatever the caller is in the middle of: no graph, no autocast, no inference tensors made."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
        yield


def changed(original: Tensor, changes: Sequence[tuple[Patch, float]]) -> Tensor:
    """Return the original plus strength * dW of every patch, computed on its device in float32 or wider."""
    dtype = torch.promote_types(original.dtype, torch.float32)
    wide = original.to(dtype)
    total = wide.clone()
    for patch, strength in changes:
        total.add_(_apart(patch, original.device, dtype).change(wide), alpha=strength)
    return total


def _apart(patch: Patch, device: torch.device, dtype: torch.dtype) -> Patch:
    """Return a copy, there in that dtype, so that fusing neither moves nor rounds the caller's patch and leaves nothing in it.

    Its values are the caller's own where they are like that already: copying them takes ten times as long as the product.
    """
    tensors = (*patch.parameters(), *patch.buffers())
    if all(t.device == device and (t.dtype == dtype or not t.is_floating_point()) for t in tensors):
        return copy(patch)
    return deepcopy(patch).to(device, dtype)
