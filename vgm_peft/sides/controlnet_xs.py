"""ControlNet-XS: a narrow second encoder that hears the base's at every layer and answers it there (Zavadski et al. 2023,
arXiv 2312.06573).

Before a layer of either encoder or of the middle, what the base has so far is laid beside what the network has; after it,
what the network makes of both is added to the base's, and in the decoder once more. All of it goes through convolutions
that begin at zero, so a fresh network changes nothing. Network and saved folder are diffusers' own `ControlNetXSAdapter`,
whose layers are run by hooks beside those of the untouched base.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vgm_peft.errors import ConfigError, DataError, DeltaError
from vgm_peft.family import Base
from vgm_peft.folders import check_component, read_json, replace_folder
from vgm_peft.side import Features, Heard, Side, Speaker, check_size, class_of, load_folder, question
from vgm_peft.sides.controlnet import check_fit, hint_widths

if TYPE_CHECKING:
    from diffusers import ControlNetXSAdapter

CLASS = "ControlNetXSAdapter"
LEAST = 8
"""Channels of the narrowest layer that is made; fewer leave nothing of a small base's norms."""
FIT = {
    "base_block_out_channels": "block_out_channels",
    "cross_attention_dim": "cross_attention_dim",
    "down_block_types": "down_block_types",
}
"""In which settings of its own a network must agree with which of a U-Net's."""
TAKEN = FIT | {
    "sample_size": "sample_size",
    "transformer_layers_per_block": "transformer_layers_per_block",
    "upcast_attention": "upcast_attention",
    "max_norm_num_groups": "norm_num_groups",
    "use_linear_projection": "use_linear_projection",
    "num_attention_heads": "attention_head_dim",  # diffusers' own name for their number
}
"""Which settings a fresh network takes over from which of a U-Net's."""
SHAPE = {"layers_per_block": 2, "in_channels": 4}
"""What diffusers' class takes for granted of a U-Net."""


@dataclass(frozen=True, kw_only=True)
class ControlNetXSOptions:
    """What may be chosen when one is made."""

    size_ratio: float = 0.1
    """Its channels as a share of the base's. The authors' are 0.2 on Stable Diffusion 1.5 and 0.1 on SDXL."""

    def __post_init__(self) -> None:
        if not 0.0 < self.size_ratio <= 1.0:
            raise ConfigError(f"size_ratio = {self.size_ratio:g}", expected="more than 0 and at most 1")


class ControlNetXS(Side):
    """diffusers' ControlNetXSAdapter beside a U-Net."""

    name: ClassVar[str] = "controlnet-xs"
    Options: ClassVar[type] = ControlNetXSOptions

    def create(self, base: Base, options: object = None, seed: int = 0) -> "ControlNetXSAdapter":
        """Make one as deep as the base's encoder, in float32 and training mode.

        No layer has fewer channels than attention heads, nor fewer than `LEAST`. Raises `DeltaError` where the base's
        encoder has a shape that no network of this kind has.
        """
        from diffusers import ControlNetXSAdapter

        chosen = options if isinstance(options, ControlNetXSOptions) else ControlNetXSOptions()
        _check_shape(base)
        taken: dict[str, Any] = {name: cast(Any, base.denoiser.config)[theirs] for name, theirs in TAKEN.items()}
        widths: list[int] = list(taken["base_block_out_channels"])
        heads = taken["num_attention_heads"]
        heads = [heads] * len(widths) if isinstance(heads, int) else heads
        taken["block_out_channels"] = [max(int(w * chosen.size_ratio), h, LEAST) for w, h in zip(widths, heads, strict=True)]
        taken["conditioning_embedding_out_channels"] = hint_widths(base.latent_factor)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = ControlNetXSAdapter(**taken)
        return cast(Any, network).to(base.device).requires_grad_(True).train()

    def recognises(self, place: Path) -> bool:
        """Say whether a folder's configuration names diffusers' ControlNetXSAdapter."""
        return class_of(place) == CLASS

    def load(self, place: Path, base: Base) -> "ControlNetXSAdapter":
        """Load a diffusers folder, frozen, on the base's device and dtype.

        Raises `DeltaError` when it was made for another kind of base: other channels, other tokens, another latent size.
        """
        from diffusers import ControlNetXSAdapter

        check_component(place)
        _check_shape(base)
        check_fit(read_json(place / "config.json"), base, place, FIT)
        return load_folder(ControlNetXSAdapter, place, base)

    def save(self, network: nn.Module, place: Path) -> Path:
        """Write the diffusers folder; one that stood there before is replaced only when the new one is whole."""
        with replace_folder(place, owned=self.recognises) as aside:
            cast("ControlNetXSAdapter", network).save_pretrained(aside, safe_serialization=True)
        return place

    def read(self, base: Base, network: nn.Module, pictures: Tensor) -> Features:
        """Encode the pictures to what the network's first layer is added: all that does not depend on the noise."""
        this, factor = cast(Any, network), base.latent_factor
        height, width = pictures.shape[-2:]
        if height % factor or width % factor:
            raise DataError(
                f"a control picture of {width}x{height} pixels", expected=f"sides that are multiples of {factor} pixels"
            )
        if this.config.conditioning_channel_order == "bgr":
            pictures = pictures.flip(1)
        return (this.controlnet_cond_embedding(pictures.to(_dtype(network))),)

    def join(self, base: Base, network: nn.Module, speaker: Speaker) -> list[RemovableHandle]:
        """Hooks around every layer of the encoder and the middle, and before every layer of the decoder."""
        return _Exchange(base, network, speaker).hooks()

    def facts(self, network: nn.Module) -> dict[str, object]:
        """Its widths, from the first level to the deepest."""
        return {"channels": list(cast(Any, network).config.block_out_channels)}


@dataclass(frozen=True)
class _Layer:
    """A layer that both have."""

    first: nn.Module
    """Module of the base where it begins: its input is what the network hears."""
    last: nn.Module
    """Module of the base where it ends: to its output is added."""
    hear: nn.Module
    walk: Callable[[Tensor, Tensor | None, Tensor], Tensor]
    """The network's layer: stream (B, C, h, w), time and text to another stream."""
    answer: nn.Module


class _Exchange:
    """A network and a denoiser in one call, and what the network has made in it, by the number of the layer.

    A layer of the base that is run again in a backward pass finds what it found before, and leaves that as it is.
    """

    def __init__(self, base: Base, network: nn.Module, speaker: Speaker) -> None:
        self._base, self._network, self._speaker = base, cast(Any, network), speaker
        self._heard: Heard | None = None
        self._made: dict[int, Tensor] = {}
        self._text = torch.empty(0)
        self._own_time = torch.empty(0)

    def hooks(self) -> list[RemovableHandle]:
        """Put them on the denoiser; the first asks what there is to hear, once in every call."""
        unet, network = cast(Any, self._base.denoiser), self._network
        hooks: list[RemovableHandle] = [unet.register_forward_pre_hook(self._begin, with_kwargs=True)]
        if network.time_embedding is not None:
            hooks.append(unet.time_embedding.register_forward_hook(self._look_at_time, prepend=True))
            hooks.append(unet.time_embedding.register_forward_hook(self._shift_time))
        # What is added behind the first convolution is added where that goes next, the first block and the last skip, so
        # that deltas on it see its own output.
        first: nn.Module = network.control_to_base_for_conv_in
        hooks.append(_before(unet.down_blocks[0], partial(self._enter, 0, first)))
        hooks.append(_before(unet.up_blocks[-1], partial(self._skip, 0, first)))
        layers = list(_layers(unet, network))
        for number, layer in enumerate(layers):
            hooks.append(layer.first.register_forward_hook(partial(self._go_along, number, layer)))
            hooks.append(layer.last.register_forward_hook(partial(self._add, number + 1, layer.answer)))
        numbers = iter(reversed(range(len(layers))))  # the decoder meets them from the last before the middle to the first
        for block, connections in zip(unet.up_blocks, network.up_connections, strict=True):
            before, *others = connections.ctrl_to_base
            hooks.append(_before(block, partial(self._enter, next(numbers), before)))
            for end, connection in zip(_ends(block), others, strict=False):
                hooks.append(end.register_forward_hook(partial(self._add, next(numbers), connection)))
        return hooks

    def _begin(self, unet: nn.Module, args: tuple[Any, ...], told: dict[str, Any]) -> None:
        noisy, t = question(args, told)
        self._heard, self._made = self._speaker.heard(len(noisy), t), {}
        if self._heard is None:
            return
        (hint,) = self._heard.features
        check_size(self._base, hint, noisy.shape[-2:], self._base.latent_factor)
        dtype = _dtype(self._network)
        self._text = (told["encoder_hidden_states"] if len(args) < 3 else args[2]).to(dtype)
        self._made[0] = self._network.conv_in(noisy.to(dtype)) + hint

    def _look_at_time(self, embedding: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._own_time = output

    def _shift_time(self, embedding: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Have base and network hear the time as the network has learned to; whole at any strength, as in diffusers."""
        if self._heard is None:
            return None
        learned = self._network.time_embedding(args[0].to(_dtype(self._network))).to(output.dtype)
        return output + (learned - self._own_time) * self._network.config.time_embedding_mix**0.3

    def _go_along(self, number: int, layer: _Layer, module: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
        """Make the network's layer from what it had before and what the base had there."""
        if self._heard is None:
            return
        dtype = _dtype(self._network)
        both = torch.cat([self._made[number], layer.hear(args[0].to(dtype))], dim=1)
        made = layer.walk(both, args[1].to(dtype) if len(args) > 1 else None, self._text)
        self._made.setdefault(number + 1, made)

    def _add(self, number: int, connection: nn.Module, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._heard is None:
            return None
        if isinstance(output, tuple):
            return (self._added(number, connection, cast(Tensor, output[0])),)
        return self._added(number, connection, output)

    def _enter(self, number: int, connection: nn.Module, block: nn.Module, args: Any, told: dict[str, Any]) -> Any:
        if self._heard is None:
            return None
        return args, {**told, "hidden_states": self._added(number, connection, told["hidden_states"])}

    def _skip(self, number: int, connection: nn.Module, block: nn.Module, args: Any, told: dict[str, Any]) -> Any:
        if self._heard is None:
            return None
        first, *others = told["res_hidden_states_tuple"]
        return args, {**told, "res_hidden_states_tuple": (self._added(number, connection, first), *others)}

    def _added(self, number: int, connection: nn.Module, stream: Tensor) -> Tensor:
        heard = cast(Heard, self._heard)
        return stream + heard.placed(connection(self._made[number]).to(stream.dtype))


def _layers(unet: Any, network: Any) -> Iterator[_Layer]:
    """The layers of the encoder and the middle, in the order they are run in."""
    for block, beside in zip(unet.down_blocks, network.down_blocks, strict=True):
        for i, (resnet, end) in enumerate(zip(block.resnets, _ends(block), strict=True)):
            walk = partial(_walk, beside.resnets[i], beside.attentions[i] if beside.attentions else None)
            yield _Layer(resnet, end, beside.base_to_ctrl[i], walk, beside.ctrl_to_base[i])
        if beside.downsamplers is not None:
            (down,) = block.downsamplers
            yield _Layer(down, down, beside.base_to_ctrl[-1], partial(_shrink, beside.downsamplers), beside.ctrl_to_base[-1])
    middle = network.mid_block
    yield _Layer(unet.mid_block, unet.mid_block, middle.base_to_ctrl, middle.midblock, middle.ctrl_to_base)


def _walk(resnet: nn.Module, attention: nn.Module | None, stream: Tensor, time: Tensor | None, text: Tensor) -> Tensor:
    stream = resnet(stream, time)
    return stream if attention is None else attention(stream, encoder_hidden_states=text, return_dict=False)[0]


def _shrink(downsampler: nn.Module, stream: Tensor, time: Tensor | None, text: Tensor) -> Tensor:
    return downsampler(stream)


def _ends(block: Any) -> list[nn.Module]:
    """The last modules of a block's layers."""
    return list(getattr(block, "attentions", None) or block.resnets)


def _before(block: nn.Module, hook: Callable[..., Any]) -> RemovableHandle:
    return block.register_forward_pre_hook(hook, with_kwargs=True)


def _dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype


def _check_shape(base: Base) -> None:
    unet: Mapping[str, Any] = cast(Any, base.denoiser.config)
    for name, wanted in SHAPE.items():
        if unet[name] != wanted:
            raise DeltaError(f"{base.source}: a U-Net with {name} {unet[name]}", expected=f"{wanted} for a controlnet-xs")
