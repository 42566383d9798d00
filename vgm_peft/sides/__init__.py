"""The table of side networks, and how to open a saved one whatever its kind."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from vgm_peft.errors import ConfigError, DeltaError, nearest
from vgm_peft.family import Base
from vgm_peft.folders import read_json
from vgm_peft.side import Side
from vgm_peft.sides.controlnet import ControlNet

TABLE: Mapping[str, Side] = {side.name: side for side in (ControlNet(),)}


def side_named(name: str) -> Side:
    """Return a side of the table. Raises `ConfigError` with the nearest known name."""
    if name not in TABLE:
        raise ConfigError(f'unknown side network "{name}"', fix=nearest(name, list(TABLE)))
    return TABLE[name]


def open_side(folder: Path, base: Base) -> tuple[Side, nn.Module]:
    """Open a saved side network, frozen, on the base's device and dtype.

    Raises `DeltaError` when there is none or it does not fit the base, `BaseModelError` when its folder cannot be read or
    would bring code of its own.
    """
    if not (folder / "config.json").is_file():
        raise DeltaError(f"{folder}: no side network there", expected="a folder with config.json and .safetensors weights")
    config = read_json(folder / "config.json")
    for side in TABLE.values():
        if side.recognises(config):
            return side, side.load(folder, base)
    raise DeltaError(f"{folder}: its config.json names {config.get('_class_name')!r}", expected="one of " + ", ".join(TABLE))
