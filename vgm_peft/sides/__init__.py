"""The table of side networks, and how to open a saved one whatever its kind."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from vgm_peft.errors import ConfigError, DeltaError, nearest
from vgm_peft.family import Base
from vgm_peft.side import Side, class_of
from vgm_peft.sides.control_lora import ControlLora
from vgm_peft.sides.controlnet import ControlNet
from vgm_peft.sides.controlnet_xs import ControlNetXS
from vgm_peft.sides.controlnext import ControlNeXt
from vgm_peft.sides.ip_adapter import IPAdapter
from vgm_peft.sides.t2i_adapter import T2IAdapterSide
from vgm_peft.sides.uni_controlnet import UniControlNet
from vgm_peft.sides.uni_controlnet_global import UniControlNetGlobal

TABLE: Mapping[str, Side] = {
    side.name: side
    for side in (
        ControlNet(),
        ControlLora(),
        ControlNetXS(),
        UniControlNet(),
        T2IAdapterSide(),
        ControlNeXt(),
        IPAdapter(),
        UniControlNetGlobal(),
    )
}


def side_named(name: str) -> Side:
    """Return a side of the table. Raises `ConfigError` with the nearest known name."""
    if name not in TABLE:
        raise ConfigError(f'unknown side network "{name}"', fix=nearest(name, list(TABLE)))
    return TABLE[name]


def open_side(place: Path, base: Base) -> tuple[Side, nn.Module]:
    """Open a saved side network, frozen, on the base's device and dtype.

    Raises `DeltaError` when there is none or it does not fit the base, `BaseModelError` when it cannot be read or would
    bring code of its own.
    """
    for side in TABLE.values():
        if side.recognises(place):
            return side, side.load(place, base)
    kinds = ", ".join(TABLE)
    named = class_of(place)
    if named is None:
        raise DeltaError(f"{place}: no side network there", expected=f"the folder or .safetensors file of one of {kinds}")
    raise DeltaError(f"{place}: its config.json names {named}", expected=f"the class of one of {kinds}")
