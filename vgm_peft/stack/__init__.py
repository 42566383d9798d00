"""Any number of deltas, words and side networks on one pipeline: described, put on, sampled and taken off again.

`Stack` is the description (plain data, TOML, no torch), `attach` and `detach` serve people who bring a stock diffusers
pipeline and one file, `generate` draws what a `Stack` describes. Conflicts are reported here and never guessed away.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vgm_peft.stack.handle import Handle, attach, detach
    from vgm_peft.stack.recipe import Stack
    from vgm_peft.stack.runtime import Applied
    from vgm_peft.stack.sampling import Progress, generate
    from vgm_peft.stack.uses import ControlUse, DeltaUse, Region

__all__ = ["Applied", "ControlUse", "DeltaUse", "Handle", "Progress", "Region", "Stack", "attach", "detach", "generate"]

_HOMES = {
    "Applied": "runtime",
    "ControlUse": "uses",
    "DeltaUse": "uses",
    "Handle": "handle",
    "Progress": "sampling",
    "Region": "uses",
    "Stack": "recipe",
    "attach": "handle",
    "detach": "handle",
    "generate": "sampling",
}


def __getattr__(name: str) -> object:
    """Import on first use, so that reading a stack file or answering `--help` never pays for torch."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'vgm_peft.stack' has no attribute {name!r}")
    return getattr(importlib.import_module(f"vgm_peft.stack.{home}"), name)
