"""What a file format is to the rest of the room: how it is recognised, read and spelled."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vgm_peft.delta import Delta
from vgm_peft.family import Base
from vgm_peft.header import Header


@dataclass(frozen=True)
class Parcel:
    """The content of one file."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    beside: Mapping[str, str] = field(default_factory=dict[str, str])
    """Texts by file name that stand in the same folder and belong to it."""
    titled: bool = True
    """It is told what the export as a whole is called; a trained token has its own name."""


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
    """Spells a delta as files: name ending -> content, the main file under `""`; in a folder, by their names there. Values
    keep their dtype unless one is asked for. Raises `DeltaError` when the format has no exact place for something.
    """
    by_part: bool = False
    """Every part's changes have a file of their own, which alone does not tell the others."""
    folder: bool = False
    """It is a folder of files and not one with others beside it."""
