"""The `Side` noun: a network that runs beside the base and adds to it (ControlNet; later T2I-Adapter, IP-Adapter ...).

A side is stateless like a family; the network itself is a plain module in diffusers' own class, saved in diffusers' own
layout, so that a trained one needs nothing of ours to be used. A new side is one file under `sides/` and one table line.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from vgm_peft.family import Base, Query, Residuals


class Side(ABC):
    """A kind of network beside the base."""

    name: ClassVar[str]

    @abstractmethod
    def create(self, base: Base, seed: int = 0) -> nn.Module:
        """Make a fresh, trainable network for a base; where the method starts from zero its residuals are exactly zero."""

    @abstractmethod
    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Say whether a saved folder's `config.json` is of this kind."""

    @abstractmethod
    def load(self, folder: Path, base: Base) -> nn.Module:
        """Load from a diffusers folder, frozen, on the base's device and dtype. Raises `DeltaError` when it does not fit."""

    @abstractmethod
    def save(self, network: nn.Module, folder: Path) -> None:
        """Write the diffusers folder (aside first, then renamed)."""

    @abstractmethod
    def residuals(self, base: Base, network: nn.Module, query: Query, control: Tensor) -> Residuals:
        """Run the network on the control picture (B, 3, P, Q) in 0 .. 1, at the picture's size; return what it adds."""
