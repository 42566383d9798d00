"""Loading the base that a stack names, where and in what precision this machine draws best."""

from typing import TYPE_CHECKING

from vgm_peft.stack.recipe import Stack

if TYPE_CHECKING:
    import torch

    from vgm_peft.family import Base


def load_base(stack: Stack) -> "Base":
    """Load the stack's base for drawing, frozen; a relative folder begins where the stack file lies."""
    from vgm_peft.families import load

    device, dtype = best_device()
    local = stack.path(stack.base)
    source = str(local) if stack.folder.parts and local.exists() else stack.base
    return load(source, dtype=dtype, device=device).freeze()


def best_device() -> "tuple[str, torch.dtype]":
    """Return the device to draw on and the precision: bfloat16 on a GPU that has it, float32 elsewhere."""
    import torch

    if torch.cuda.is_available():
        return "cuda", torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if torch.backends.mps.is_available():
        return "mps", torch.float32
    return "cpu", torch.float32
