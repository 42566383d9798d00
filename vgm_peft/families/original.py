"""Single-file checkpoints in the original layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vgm_peft.errors import BaseModelError
from vgm_peft.family import Family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def load_file(families: Mapping[str, Family], path: Path, dtype: torch.dtype) -> "DiffusionPipeline":
    """Soon."""
    raise BaseModelError(f"{path}: single files come within the hour")
