"""Training: a configuration in, a run folder with a trained delta (or word, or side network) out."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vgm_peft.train.config import RunConfig
    from vgm_peft.train.run import RunResult, train

__all__ = ["RunConfig", "RunResult", "train"]

_HOMES = {"RunConfig": "config", "RunResult": "run", "train": "run"}


def __getattr__(name: str) -> object:
    """Import on first use, so that reading a configuration never pays for torch."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'vgm_peft.train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"vgm_peft.train.{home}"), name)
