"""The room of scorers: what can tell how good drawn pictures are. One is a file and a line in the table.

A line says where the class is, which is imported when it is asked for. The oracles live with the world that they know;
nothing else here needs that world.
"""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

from vgm_peft.errors import ConfigError, nearest
from vgm_peft.score import Scorer

TABLE: Mapping[str, str] = MappingProxyType(
    {
        "oracles": "vgm_peft.toybox.scorer:OracleScorer",
        "clip": "vgm_peft.scores.clip:ClipScorer",
        "dino": "vgm_peft.scores.dino:DinoScorer",
    }
)
"""Name -> module:class."""
USUAL: Mapping[str, str] = MappingProxyType({"toybox": "oracles"})
"""Base -> the scorer that is meant there when none is named."""


def scorer_named(name: str) -> type[Scorer]:
    """Return a scorer of the table. Raises `ConfigError` with the nearest known name."""
    if name not in TABLE:
        raise ConfigError(f'unknown scorer "{name}"', fix=nearest(name, list(TABLE)))
    module, _, attribute = TABLE[name].partition(":")
    found: type[Scorer] = getattr(import_module(module), attribute)
    return found
