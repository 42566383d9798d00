"""vgm_peft: a trained delta is a small, named, checked file that any task can train on any base and any pipeline can stack."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vgm_peft.families import load
    from vgm_peft.formats import read, write
    from vgm_peft.stack import Stack, attach, detach
    from vgm_peft.train import train

__all__ = ["Stack", "attach", "detach", "load", "read", "train", "write"]
__version__ = "0.1.0"

_HOMES = {
    "load": "families",
    "read": "formats",
    "write": "formats",
    "Stack": "stack",
    "attach": "stack",
    "detach": "stack",
    "train": "train",
}


def __getattr__(name: str) -> object:
    """Import public names on first use (PEP 562), so that `--help` and tooling never pay for torch."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'vgm_peft' has no attribute {name!r}")
    return getattr(importlib.import_module(f"vgm_peft.{home}"), name)
