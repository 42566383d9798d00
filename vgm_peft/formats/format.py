"""What a file format is to the rest of the room: how it is recognised, read and spelled."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vgm_peft.delta import Delta
from vgm_peft.family import Base
from vgm_peft.formats.header import Header


@dataclass(frozen=True)
class Parcel:
    """The content of one file."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Format:
    """One spelling of deltas as files."""

    name: str
    about: str
    """Who reads it, in a few words."""
    recognises: Callable[[Header], bool]
    """Says from names and metadata alone whether a file is of this format."""
    read: Callable[[Header, Base | None], Delta]
    """Reads all of a file, or raises `DeltaError`. Without a base the family and the shapes come from the file."""
    spell: Callable[[Delta, Base | None, torch.dtype | None], dict[str, Parcel]]
    """Spells a delta as files: name ending -> content, the main file under `""`. Values keep their dtype unless one is asked
    for. Raises `DeltaError` when the format has no exact place for something.
    """
