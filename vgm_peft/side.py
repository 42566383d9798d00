"""The `Side` noun: a network that stands beside the base and adds to it (ControlNet, T2I-Adapter, IP-Adapter, ControlNeXt).

A side is stateless like a family; the network itself is a plain module in the layout of its authors or of diffusers, so
that a trained one needs nothing of ours to be used. What it says of a picture goes in through hooks (`beside.Beside`), so
that any number of sides, deltas and words meet in any pipeline of the base, in training and in drawing alike. A new side is
one file under `sides/` and one table line.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.hooks import RemovableHandle

from vgm_peft.errors import ConfigError, DataError, DeltaError
from vgm_peft.family import Base
from vgm_peft.folders import check_whole, first_line, read_json
from vgm_peft.header import open_header

Features = tuple[Tensor, ...]
"""What a network takes from pictures, before and apart from any denoising: tensors whose first axis is the picture."""


@dataclass(frozen=True)
class Heard:
    """What there is to say in one call of the denoiser."""

    features: Features
    """One row for each row of the call (of its second half, where the network is not heard in the first)."""
    strength: float
    half: bool = False
    """Only the second half of the call hears it: the half with the prompt, in classifier-free guidance."""
    mask: Tensor | None = None
    """Where in the picture it is heard, (1, 1, P, Q) in 0 .. 1; everywhere without one."""
    layers: Mapping[str, float] | None = None
    """Which layers hear it how much, by patterns of their names; one that none of them matches not at all. All, without."""

    def share(self, layer: str) -> float:
        """Return the strength at which a layer hears it: that of the first pattern that matches its name."""
        if self.layers is None:
            return self.strength
        return self.strength * next((share for glob, share in self.layers.items() if fnmatchcase(layer, glob)), 0.0)

    def told(self, rows: Tensor) -> Tensor:
        """Return those rows of one of the call's tensors that hear the network."""
        return rows[len(rows) // 2 :] if self.half else rows

    def placed(self, added: Tensor, strength: float | None = None) -> Tensor:
        """Return what is added at places (B, C, h, w) at its strength (or another), there where it is to be heard; for the
        half that does not hear it, zeros."""
        strength = self.strength if strength is None else strength
        if strength != 1.0:  # as in training, where each residual would be multiplied for nothing, forward and backward
            added = added * strength
        if self.mask is not None:
            added = added * interpolate(self.mask.to(added), added.shape[-2:], mode="bilinear", antialias=True)
        return torch.cat([torch.zeros_like(added), added]) if self.half else added

    def placed_tokens(self, added: Tensor, latents: tuple[int, int]) -> Tensor:
        """As `placed`, for what is added to tokens (B, L, D) that are places of the picture row by row, at the resolution of
        the latents or at half of it, a quarter, and so on."""
        height, width = latents
        while height * width > added.shape[1]:
            height, width = (height + 1) // 2, (width + 1) // 2
        return self.placed(added.mT.unflatten(2, (height, width))).flatten(2).mT


class Speaker(Protocol):
    """Who knows, in a call of the denoiser, what is to be said in it."""

    def heard(self, rows: int, t: "Tensor | float | int | None" = None) -> Heard | None:
        """Return it for a call of so many rows at timestep `t`, or None when there is nothing to be said."""
        ...


class Ear:
    """A speaker asked once in every call of a denoiser, for the hooks further within; `hook` is what asks it."""

    def __init__(self, base: Base, speaker: Speaker) -> None:
        """Begin to listen. What was heard last stays, for a backward pass that computes parts of the forward again."""
        self.heard: Heard | None = None
        self.latents: tuple[int, int] = (0, 0)
        """Height and width of the latents of the call."""
        self.time: Tensor | None = None
        self._speaker = speaker
        self.hook = base.denoiser.register_forward_pre_hook(self._ask, with_kwargs=True)

    def _ask(self, denoiser: nn.Module, args: tuple[Any, ...], told: dict[str, Any]) -> None:
        noisy, self.time = question(args, told)
        self.latents = (noisy.shape[-2], noisy.shape[-1])
        self.heard = self._speaker.heard(len(noisy), self.time)


def question(args: tuple[Any, ...], told: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return noisy latents (B, C, H, W) and timestep of a call of a U-Net, which may be given by place or by name."""
    noisy: Tensor = args[0] if args else told["sample"]
    return noisy, torch.as_tensor(args[1] if len(args) > 1 else told["timestep"], device=noisy.device)


class Side(ABC):
    """A kind of network beside the base."""

    name: ClassVar[str]
    Options: ClassVar[type]
    """A frozen dataclass: what may be chosen when a network is made; `network`, where there are several, is the variant."""
    paired: ClassVar[bool] = True
    """It is taught by a second picture beside each; if not, by the picture itself."""
    zero: ClassVar[bool] = True
    """A fresh network changes nothing."""
    fresh: ClassVar[tuple[str, ...]] = ("*",)
    """Which parameters of a fresh network hold nothing yet that could be changed, by patterns; the rest is the base's."""
    guesses: ClassVar[bool] = False
    """It can be heard by the half with the prompt alone, with shares of its own for each layer."""

    def layers(self, base: Base, choice: str) -> Mapping[str, float] | None:
        """Return what a choice of layers means (`Heard.layers`); the empty one: all. Raises `ConfigError`."""
        if choice:
            raise ConfigError(f'layers "{choice}" of a {self.name}', expected="no choice: all of them hear it alike")
        return None

    def conditions(self, made: object) -> int:
        """Return how many control pictures a network reads together, or one that is made with these options."""
        return 1

    def thinned(self, network: nn.Module, pictures: Tensor, generator: torch.Generator) -> Tensor:
        """Return what a network is shown of control pictures (B, 3 n, P, Q) while it learns; all of them, by default."""
        return pictures

    @abstractmethod
    def create(self, base: Base, options: object, seed: int = 0) -> nn.Module:
        """Make a fresh, trainable network for a base, float32; where the method starts from zero it changes nothing yet."""

    @abstractmethod
    def recognises(self, place: Path) -> bool:
        """Say whether a saved folder or file is of this kind, without reading its weights."""

    @abstractmethod
    def load(self, place: Path, base: Base) -> nn.Module:
        """Load a saved one, frozen, on the base's device and dtype. Raises `DeltaError` when it does not fit."""

    @abstractmethod
    def save(self, network: nn.Module, place: Path) -> Path:
        """Write it, aside first and then renamed, and return what was written: `place`, or with a suffix of the kind's own."""

    @abstractmethod
    def read(self, base: Base, network: nn.Module, pictures: Tensor) -> Features:
        """Take from pictures (B, 3 n, P, Q) in 0 .. 1, n `conditions` each, all that does not depend on the noise; gradients
        flow."""

    def silence(self, base: Base, network: nn.Module, features: Features) -> Features:
        """Return what the half without the prompt hears instead; by default the same."""
        return features

    @abstractmethod
    def join(self, base: Base, network: nn.Module, speaker: Speaker) -> Sequence[RemovableHandle]:
        """Put the hooks on the base's denoiser by which it hears the network; those hooks ask the speaker at every call."""

    def rate(self, parameter: str) -> float:
        """By what the run's learning rate is multiplied for a parameter of its network, by name."""
        return 1.0

    def facts(self, network: nn.Module) -> dict[str, object]:
        """What the manifest of a run should say of a network besides its name."""
        return {}


def check_size(base: Base, picture: Tensor, latents: Sequence[int], factor: int = 1) -> None:
    """Raise `DataError` unless what was read of control pictures, `factor` pixels to a place, is as large as the latents, of
    which `latents` are height and width."""
    height, width = (side * base.latent_factor for side in latents)
    found = tuple(side * factor for side in picture.shape[-2:])
    if found != (height, width):
        raise DataError(
            f"a control picture of {found[1]}x{found[0]} pixels", expected=f"{width}x{height}, like the picture that is drawn"
        )


def class_of(folder: Path) -> str | None:
    """The diffusers class that a folder's `config.json` names; None where there is no such file."""
    if not (folder / "config.json").is_file():
        return None
    return str(read_json(folder / "config.json").get("_class_name"))


def load_folder(kind: Any, place: Path, base: Base) -> Any:
    """Load a checked folder as a model class of diffusers, frozen, on the base's device and dtype. Raises `DeltaError`."""
    dtype = next(base.denoiser.parameters()).dtype
    try:
        network = kind.from_pretrained(place, use_safetensors=True, local_files_only=True, dtype=dtype)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DeltaError(f"{place}: cannot be loaded ({first_line(error)})", fix="fetch or copy it anew") from error
    check_whole(network, place)
    for parameter in network.parameters():
        parameter.data = _aligned(parameter.data)
    return network.to(base.device).requires_grad_(False).eval()


def load_file(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, whose header is checked first. Raises `DeltaError`."""
    from safetensors import SafetensorError
    from safetensors import torch as stored

    try:
        open_header(path)
        return {name: _aligned(tensor) for name, tensor in stored.load_file(path).items()}
    except (OSError, DeltaError, SafetensorError) as error:
        raise DeltaError(f"{path}: cannot be loaded ({first_line(error)})", fix="fetch or copy it anew") from error


def _aligned(tensor: Tensor) -> Tensor:
    """A tensor that lies in a file's bytes as a copy of its own: where memory is not aligned, convolutions may take another
    way and differ in the last bit from those of the network that was saved."""
    return tensor.clone() if tensor.data_ptr() % 64 else tensor
