"""T2I-Adapter: a pyramid of convolutions that reads a control picture once, whatever the noise (Mou et al. 2023, arXiv
2302.08453).

Its features are added within the U-Net's encoder, F_enc^i + strength * F^i (section 3.3, eq. 4); those of several add. It
does not start from zero, so a fresh one disturbs the base. Network and saved folder are diffusers' own `T2IAdapter`; single
files in the names of the authors' repository are read as well.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vgm_peft.errors import DataError, DeltaError
from vgm_peft.family import Base
from vgm_peft.folders import check_component, read_json, replace_folder
from vgm_peft.header import listed, open_header
from vgm_peft.side import Features, Side, Speaker, check_size, class_of, load_file, load_folder, question

if TYPE_CHECKING:
    from diffusers import T2IAdapter

CLASS = "T2IAdapter"
HEARD = "down_intrablock_additional_residuals"
"""The U-Net's argument for features of adapters; it takes them out of the list it is given."""
FIRST = ("body.0.block1.weight", "body.0.in_conv.weight", "body.0.resnets.0.block1.weight")
"""One of these is in every file: the authors' full and light network, and diffusers' names, less a leading `adapter.`"""
_FULL = re.compile(r"^body\.(\d{1,4})\.(in_conv|block1|block2)\.")
_LIGHT = re.compile(r"(?<=\d)\.body\.(\d+)\.")

Config = Mapping[str, Any]
"""What diffusers' class is made from."""
Stage = tuple[int, int]
"""Channels of features, and pixels to one of their places along a side."""


@dataclass(frozen=True, kw_only=True)
class T2IAdapterOptions:
    """What may be chosen when one is made."""

    network: Literal["full", "light"] = "full"
    """`light` has a quarter of the values and does for coarse control such as colours; bases like SDXL have only `full`."""
    channels: Literal[1, 3] = 3
    """Of what is read of a control picture; 1 is the mean of its colours, for lines and edges."""


class T2IAdapterSide(Side):
    """diffusers' T2IAdapter beside a U-Net."""

    name: ClassVar[str] = "t2i-adapter"
    Options: ClassVar[type] = T2IAdapterOptions
    zero: ClassVar[bool] = False

    def create(self, base: Base, options: object = None, seed: int = 0) -> "T2IAdapter":
        """Make one as wide and as deep as the base's encoder, in float32 and training mode.

        Raises `DeltaError` where the base's encoder has a shape that no adapter of this kind has.
        """
        from diffusers import T2IAdapter

        chosen = options if isinstance(options, T2IAdapterOptions) else T2IAdapterOptions()
        fitting = [c for c in _configs(base, chosen.channels) if _is_light(c) == (chosen.network == "light") and _fits(c, base)]
        if not fitting:
            raise DeltaError(
                f"{base.source}: no {chosen.network} t2i-adapter fits its encoder, which has {_spelled(_wanted(base))}",
                fix="choose the full one: --set task.network=full" if chosen.network == "light" else "",
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = T2IAdapter(**fitting[0])
        return cast(Any, network).to(base.device).requires_grad_(True).train()

    def recognises(self, place: Path) -> bool:
        """Say whether a folder's configuration names diffusers' T2IAdapter, or a file holds the tensors of one."""
        if place.suffix == ".safetensors" and place.is_file():
            return not {n.removeprefix("adapter.") for n in open_header(place).tensors}.isdisjoint(FIRST)
        return class_of(place) == CLASS

    def load(self, place: Path, base: Base) -> "T2IAdapter":
        """Load a diffusers folder or a single file, frozen, on the base's device and dtype.

        Raises `DeltaError` when it was made for another kind of base: other channels, another latent size.
        """
        from diffusers import T2IAdapter

        if place.is_file():
            return _from_file(place, base)
        check_component(place)
        config = read_json(place / "config.json")
        try:
            given = _given(config)
        except (KeyError, TypeError, ValueError) as error:
            raise DeltaError(f"{place}: cannot be loaded (config.json: {error!r})", fix="fetch or copy it anew") from error
        if not _fits(config, base):
            raise DeltaError(
                f"{place}: a t2i-adapter made for {_spelled(given)}",
                expected=f"{_spelled(_wanted(base))}, as {base.source} ({base.family.name}) has",
                fix="use it with the family of base models it was made for",
            )
        return load_folder(T2IAdapter, place, base)

    def save(self, network: nn.Module, place: Path) -> Path:
        """Write the diffusers folder; one that stood there before is replaced only when the new one is whole."""
        with replace_folder(place, owned=self.recognises) as aside:
            cast("T2IAdapter", network).save_pretrained(aside, safe_serialization=True)
        return place

    def read(self, base: Base, network: nn.Module, pictures: Tensor) -> Features:
        """Compute the features, finest first: the whole work of the network."""
        config, factor = cast(Any, network).config, cast("T2IAdapter", network).downscale_factor
        height, width = pictures.shape[-2:]
        if height % factor or width % factor:
            raise DataError(
                f"a control picture of {width}x{height} pixels", expected=f"sides that are multiples of {factor} pixels"
            )
        pictures = pictures.to(next(network.parameters()).dtype)
        return tuple(network(pictures.mean(1, keepdim=True) if config.in_channels == 1 else pictures))

    def join(self, base: Base, network: nn.Module, speaker: Speaker) -> list[RemovableHandle]:
        """One hook: the features go to the U-Net's own argument for them, with those of adapters whose hooks came first."""
        factor = cast("T2IAdapter", network).downscale_factor

        def add(unet: nn.Module, args: tuple[Any, ...], told: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            noisy, t = question(args, told)
            heard = speaker.heard(len(noisy), t)
            if heard is None:
                return None
            check_size(base, heard.features[0], noisy.shape[-2:], factor)
            placed = [heard.placed(feature.to(noisy.dtype)) for feature in heard.features]
            before = told.get(HEARD)
            if before is not None:
                placed = [new + old for new, old in zip(placed, before, strict=True)]
            return args, {**told, HEARD: placed}

        return [base.denoiser.register_forward_pre_hook(add, with_kwargs=True)]

    def facts(self, network: nn.Module) -> dict[str, object]:
        """Its form, and how many channels it reads."""
        config = cast(Any, network).config
        return {"network": config.adapter_type, "channels": config.in_channels}


def _wanted(base: Base) -> list[Stage]:
    """The features that a base's U-Net can take, in its order: one in each block of the encoder, one after the middle.

    A block with attention takes it before its own downsampling, one without after it.
    """
    config: Any = base.denoiser.config
    widths: Sequence[int] = config.block_out_channels
    stages: list[Stage] = []
    pixels = base.latent_factor
    for i, (width, kind) in enumerate(zip(widths, config.down_block_types, strict=True)):
        after = pixels if i == len(widths) - 1 else 2 * pixels
        stages.append((width, pixels if "CrossAttn" in kind else after))
        pixels = after
    return [*stages, (widths[-1], pixels)]


def _given(config: Config) -> list[Stage]:
    """The features that an adapter makes, finest first."""
    widths, pixels = list(config["channels"]), int(config["downscale_factor"])
    if _is_light(config):
        widths.append(widths[-1])
    halvings = [0, 0, 1, 1] if config["adapter_type"] == "full_adapter_xl" else range(len(widths))
    return [(width, pixels * 2**n) for width, n in zip(widths, halvings, strict=False)]


def _is_light(config: Config) -> bool:
    return config["adapter_type"] == "light_adapter"


def _fits(config: Config, base: Base) -> bool:
    """Whether every block of the encoder hears its features, at its own resolution and width; the middle need not."""
    given, wanted = _given(config), _wanted(base)
    return given in (wanted, wanted[:-1])


def _configs(base: Base, channels: int) -> Iterator[Config]:
    """The adapters of the authors' shapes in a base's widths; whether one fits is another question."""
    widths, pixels = list(cast(Any, base.denoiser.config).block_out_channels), base.latent_factor
    plain = {"in_channels": channels, "num_res_blocks": 2, "downscale_factor": pixels}
    yield {**plain, "adapter_type": "full_adapter", "channels": widths}
    yield {**plain, "adapter_type": "full_adapter_xl", "channels": [*widths, widths[-1]], "downscale_factor": 2 * pixels}
    yield {**plain, "adapter_type": "light_adapter", "channels": widths[:-1], "num_res_blocks": 4}


def _from_file(path: Path, base: Base) -> "T2IAdapter":
    """Read a single file: the form that fits the base and has exactly its tensors."""
    from diffusers import T2IAdapter

    tensors = _renamed(load_file(path))
    shapes = {name: t.shape for name, t in tensors.items()}
    with torch.device("meta"):
        networks = [T2IAdapter(**c) for channels in (3, 1) for c in _configs(base, channels) if _fits(c, base)]
    found = [(network, {name: t.shape for name, t in network.state_dict().items()}) for network in networks]
    network, expected = max(found, key=lambda one: len(one[1].items() & shapes.items()), default=(None, {}))
    wrong = sorted({name for name, _ in expected.items() ^ shapes.items()})
    if network is None or wrong:
        raise DeltaError(
            f"{path}: {len(wrong)} tensors are missing, left over or of another shape ({listed(wrong)})",
            expected=f"a t2i-adapter made for {base.source} ({base.family.name})",
        )
    network.load_state_dict(tensors, assign=True)
    return cast(Any, network).to(base.device, next(base.denoiser.parameters()).dtype).requires_grad_(False).eval()


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of a file diffusers' names, whether they have them or the authors', wrapped in `adapter.` or not."""
    bare = {name.removeprefix("adapter."): tensor for name, tensor in tensors.items()}
    if not any(".resnets." in name for name in bare):
        light = "body.0.in_conv.weight" in bare
        bare = {_LIGHT.sub(r".resnets.\1.", n) if light else _FULL.sub(_staged, n): tensor for n, tensor in bare.items()}
    return {f"adapter.{name}": tensor for name, tensor in bare.items()}


def _staged(found: re.Match[str]) -> str:
    """The authors' full network is one list of blocks, two to a stage, the first of which widens."""
    stage, block = divmod(int(found[1]), 2)
    return f"body.{stage}.in_conv." if found[2] == "in_conv" and block == 0 else f"body.{stage}.resnets.{block}.{found[2]}."


def _spelled(stages: Iterable[Stage]) -> str:
    return ", ".join(f"{width} channels at {pixels} pixels" for width, pixels in stages)
