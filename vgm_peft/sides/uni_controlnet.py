"""Uni-ControlNet's local adapter: several control pictures in one ControlNet (Zhao et al. 2023, arXiv 2305.16322).

All pictures go through one extractor. What it finds at each resolution does not enter the copy of the encoder at its input,
but normalises it (feature denormalisation, section 3.2, eq. 2): in the first resnet of every level, both norms are

    FDN(x, f)  =  GroupNorm(x) (1 + gamma(f)) + beta(f)

so that one network learns all conditions and any part of them is enough. A condition that is not given is black. Names of
tensors, widths and the shares in which conditions are dropped are those of the authors' code; where it and the paper differ
(both norms of a resnet, convolutions of zeros behind the extractor), it counts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vgm_peft.errors import ConfigError, DataError, DeltaError
from vgm_peft.family import Base
from vgm_peft.folders import replace_file
from vgm_peft.header import listed, open_header
from vgm_peft.side import Features, check_size, load_file
from vgm_peft.sides.controlnet import ControlNet, original_names
from vgm_peft.sides.uni_extractor import FDN, Extractor

if TYPE_CHECKING:
    from diffusers import ControlNetModel

PREFIX = "local_adapter."
FACTOR = "latent_factor"
"""Key of the file's metadata: pixels to a latent, which no shape tells. Files of others are for 8."""
FIRST = f"{PREFIX}feature_extractor.pre_extractor.0.weight"
KEEP_ALL, DROP_ALL, DROP_EACH = 0.1, 0.1, 0.5
"""Chances that a training example keeps all conditions, or loses all; else each of them is lost by a chance of its own."""


@dataclass(frozen=True, kw_only=True)
class UniControlNetOptions:
    """What may be chosen when one is made."""

    conditions: int = 1
    """How many control pictures it reads together; they lie side by side in one. The published one has 7."""
    width: int = 0
    """Channels of the extractor's first layer; 0 is a tenth of those of the base's first block (the authors' 32 of 320), and at
    least 16."""

    def __post_init__(self) -> None:
        if not 1 <= self.conditions <= 32:
            raise ConfigError(f"conditions = {self.conditions}", expected="1 .. 32")
        if self.width < 0:
            raise ConfigError(f"width = {self.width}", expected="0, or how many channels")


class UniControlNet(ControlNet):
    """diffusers' ControlNetModel, of which an extractor and its norms have taken the place of the input's encoder."""

    name: ClassVar[str] = "uni-controlnet"
    Options: ClassVar[type] = UniControlNetOptions
    fresh: ClassVar[tuple[str, ...]] = ("controlnet_*", "*.conv_gamma.*", "*.conv_beta.*")

    def create(self, base: Base, options: object = None, seed: int = 0) -> "ControlNetModel":
        """Copy the base's encoder but for the norms that are conditioned; those and the extractor are drawn from `seed`."""
        chosen = options if isinstance(options, UniControlNetOptions) else UniControlNetOptions()
        network = super().create(base, None, seed)
        width = chosen.width or max(16, cast(Any, base.denoiser.config).block_out_channels[0] // 10)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _condition(network, Extractor(chosen.conditions, width, len(network.down_blocks), base.latent_factor))
        return cast(Any, network).to(base.device).requires_grad_(True).train()

    def conditions(self, made: object) -> int:
        """As many as its options or its extractor say."""
        return made.conditions if isinstance(made, UniControlNetOptions) else _extractor(made).conditions

    def thinned(self, network: nn.Module, pictures: Tensor, generator: torch.Generator) -> Tensor:
        """Black out conditions of each example by chance, as its authors do."""
        count = self.conditions(network)
        whole = torch.rand(len(pictures), 1, generator=generator)
        each = torch.rand(len(pictures), count, generator=generator) >= DROP_EACH
        kept = ((whole < KEEP_ALL) | each) & ~((whole >= KEEP_ALL) & (whole < KEEP_ALL + DROP_ALL))
        return pictures * kept.repeat_interleave(3, 1)[..., None, None].to(pictures)

    def recognises(self, place: Path) -> bool:
        """Say whether a safetensors file holds tensors of the authors' `local_adapter`."""
        return place.is_file() and any(name.startswith(PREFIX) for name in open_header(place).tensors)

    def load(self, place: Path, base: Base) -> "ControlNetModel":
        """Load a file of the authors' names, frozen, on the base's device and dtype.

        Raises `DeltaError` when a tensor is missing or left over, or it was made for another kind of base.
        """
        from diffusers import ControlNetModel

        header, held = open_header(place), load_file(place)
        first = held.get(FIRST)
        if first is None or first.dim() != 4 or first.shape[1] % 3:
            raise DeltaError(f"{place}: {FIRST} is missing or of another shape", fix="fetch or copy it anew")
        if (factor := header.metadata.get(FACTOR, "8")) != str(base.latent_factor):
            raise DeltaError(
                f"{place}: a uni-controlnet made for {factor} pixels to a latent",
                expected=f"{base.latent_factor}, as {base.source} has",
            )
        with torch.device("meta"):
            network = ControlNetModel.from_unet(cast(Any, base.denoiser), load_weights_from_unet=False)
            levels = len(network.down_blocks)
            _condition(network, Extractor(first.shape[1] // 3, first.shape[0], levels, base.latent_factor))
        names = _file_names(network)
        wanted = {names[name]: tensor.shape for name, tensor in network.state_dict().items()}
        if wrong := sorted({name for name, _ in wanted.items() ^ {name: t.shape for name, t in held.items()}.items()}):
            raise DeltaError(
                f"{place}: {len(wrong)} tensors are missing, left over or of another shape ({listed(wrong)})",
                expected=f"the local_adapter.* tensors, and no others, of one made for {base.source} ({base.family.name})",
                fix="use it with the family of base models it was made for, or take out what is not local_adapter.*",
            )
        like = next(base.denoiser.parameters())
        network.load_state_dict({name: held[names[name]].to(like) for name in network.state_dict()}, assign=True)
        return network.requires_grad_(False).eval()

    def save(self, network: nn.Module, place: Path) -> Path:
        """Write `place.safetensors` in the authors' names."""
        place = place if place.suffix == ".safetensors" else place.with_name(f"{place.name}.safetensors")
        names = _file_names(network)
        tensors = {names[name]: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
        with replace_file(place, owned=self.recognises) as aside:
            save_file(tensors, aside, {FACTOR: str(_extractor(network).factor)})
        return place

    def read(self, base: Base, network: nn.Module, pictures: Tensor) -> Features:
        """Factors and summands (gamma, beta) of every conditioned norm, from pictures (B, 3 n, P, Q) of n conditions."""
        extractor = _extractor(network)
        if pictures.shape[1] != 3 * extractor.conditions:
            raise DataError(
                f"{pictures.shape[1] // 3} control pictures for a uni-controlnet",
                expected=f"{extractor.conditions} side by side, as it has learned",
                fix=f"black ones for those that are not there; in training: --set task.conditions={pictures.shape[1] // 3}",
            )
        seen = extractor.see(pictures.to(next(network.parameters()).dtype))
        return tuple(t for found, pair in zip(seen, _norms(network), strict=True) for norm in pair for t in norm.read(found))

    def hint(self, base: Base, features: Features, latents: torch.Size) -> Features:
        """All of it; the first is as large as the latents."""
        check_size(base, features[0], latents, base.latent_factor)
        return features

    def facts(self, network: nn.Module) -> dict[str, object]:
        """How many conditions it reads."""
        return {"conditions": self.conditions(network)}


def _condition(network: nn.Module, extractor: Extractor) -> None:
    """Put an extractor in place of the encoder of the control picture, and conditioned norms into the first resnets."""
    for found, block in zip(extractor.widths, cast(Any, network).down_blocks, strict=True):
        resnet = block.resnets[0]
        resnet.norm1, resnet.norm2 = FDN(resnet.norm1, found), FDN(resnet.norm2, found)
    extractor.norms = tuple(norm for pair in _norms(network) for norm in pair)
    cast(Any, network).controlnet_cond_embedding = extractor


def _norms(network: nn.Module) -> Iterator[tuple[FDN, FDN]]:
    """The conditioned norms, level by level."""
    return ((block.resnets[0].norm1, block.resnets[0].norm2) for block in cast(Any, network).down_blocks)


def _extractor(network: object) -> Extractor:
    return cast(Any, network).controlnet_cond_embedding


def _file_names(network: nn.Module) -> dict[str, str]:
    """The authors' name of every tensor, by its name in the network."""
    names = dict[str, str]()
    originals = original_names(network)
    for name in network.state_dict():
        module, _, tensor = name.rpartition(".")
        home = originals.get(module, module.replace("controlnet_cond_embedding", "feature_extractor"))
        home = home.replace(".norm1.conv_", ".norm_in.conv_").replace(".norm2.conv_", ".norm_out.conv_")
        names[name] = f"{PREFIX}{home}.{tensor}"
    return names
