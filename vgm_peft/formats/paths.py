"""The path of a module in the network itself, for tools that look it up there instead of in a table.

Ours are without `text_model.`; a network has it or not, depending on its class and on the version of transformers.
"""

from collections.abc import Mapping

from torch import nn

from vgm_peft.delta import Delta
from vgm_peft.families import naming_of
from vgm_peft.family import Base
from vgm_peft.site import WRAPPER

CLIP_BODY = ("encoder.layers.", "embeddings.", "final_layer_norm")
"""What is inside `text_model.` in CLIP text encoders; the projection is outside."""


def wrappers(delta: Delta, base: Base | None) -> dict[str, str]:
    """Return for each part of a base, or of the family's published one, what its modules' paths begin with beyond ours."""
    roots: Mapping[str, nn.Module] = base.parts if base is not None else naming_of(delta.family).published()
    return {part: WRAPPER if hasattr(root, WRAPPER.rstrip(".")) else "" for part, root in roots.items()}


def path_in(module: str, wrapper: str) -> str:
    """Return the path of a module in a network whose text body stands in a wrapper, or in none."""
    return f"{wrapper}{module}" if module.startswith(CLIP_BODY) else module
