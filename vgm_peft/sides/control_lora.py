"""Control-LoRA: a ControlNet whose copy of the encoder is the base's own weights and a low-rank change of each (Stability AI
2023, https://huggingface.co/stabilityai/control-lora; no paper).

Every Linear and convolution of the copy is W + up down, W never saved; norms, the control picture's encoder and the zero
convolutions are whole. The file is that of the authors' code, in the original names of a U-Net's modules. It holds the biases
of the changed layers too, but these stay the base's: diffusers reads such a file without them and does not say so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.family import Base
from vgm_peft.folders import replace_file
from vgm_peft.header import listed, open_header
from vgm_peft.side import load_file
from vgm_peft.sides.controlnet import ControlNet, hint_widths, original_names

if TYPE_CHECKING:
    from diffusers import ControlNetModel

MARKER = "lora_controlnet"
"""An empty tensor of this name says what the file is."""
OWN = "controlnet_"
"""How modules begin that a ControlNet has and its base has not; they are whole."""


@dataclass(frozen=True, kw_only=True)
class ControlLoraOptions:
    """What may be chosen when one is made."""

    rank: int = 32
    """Of every change, or as many as the layer has channels where these are fewer; the published ones have 128 and 256."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank = {self.rank}", expected="at least 1")


class ControlLora(ControlNet):
    """diffusers' ControlNetModel beside a U-Net, most of whose weights are the base's and stay so."""

    name: ClassVar[str] = "control-lora"
    Options: ClassVar[type] = ControlLoraOptions
    fresh: ClassVar[tuple[str, ...]] = ("*",)

    def create(self, base: Base, options: object = None, seed: int = 0) -> "ControlNetModel":
        """Copy the base's encoder, and give each of its layers a low-rank change that is zero at first.

        Trainable parameters are float32 and in training mode; the copied weights and biases are buffers, in float32 too.
        """
        chosen = options if isinstance(options, ControlLoraOptions) else ControlLoraOptions()
        network = super().create(base, None, seed)
        layers = _copied(network)
        _thin(network, {name: min(chosen.rank, *layer.weight.shape[:2]) for name, layer in layers.items()})
        generator = torch.Generator().manual_seed(seed)
        for layer in layers.values():
            drawn = nn.init.kaiming_uniform_(torch.empty(layer.down.shape, device="cpu"), a=5**0.5, generator=generator)
            layer.down.data.copy_(drawn)
        return network

    def recognises(self, place: Path) -> bool:
        """Say whether a safetensors file carries the authors' marker."""
        return place.is_file() and MARKER in open_header(place).tensors

    def load(self, place: Path, base: Base) -> "ControlNetModel":
        """Load a file of the authors' layout, frozen, on the base's device and dtype, over a copy of this base's weights.

        Raises `DeltaError` when a tensor is missing, or it was made for another kind of base.
        """
        from diffusers import ControlNetModel

        held = load_file(place)
        held.pop(MARKER, None)
        with torch.device("meta"):
            network = ControlNetModel.from_unet(
                cast(Any, base.denoiser),
                load_weights_from_unet=False,
                conditioning_embedding_out_channels=hint_widths(base.latent_factor),
            )
        layers, spelled = _copied(network), _spelled(network)
        _thin(network, {name: _rank(held.get(f"{spelled[name]}.down")) for name in layers})
        wanted = {_key(spelled, name): (name, tensor.shape) for name, tensor in network.state_dict().items()}
        _check_fit(place, base, held, {key: shape for key, (_, shape) in wanted.items()})
        like = next(base.denoiser.parameters())
        tensors = {name: held[key].reshape(shape).to(like) for key, (name, shape) in wanted.items()}
        network.load_state_dict(tensors, assign=True)
        for name, layer in layers.items():
            layer.weight = cast(Any, base.denoiser.get_submodule(name)).weight.detach().clone()
        return network.requires_grad_(False).eval()

    def save(self, network: nn.Module, place: Path) -> Path:
        """Write `place.safetensors` in the authors' layout, which diffusers and ComfyUI read."""
        place = place if place.suffix == ".safetensors" else place.with_name(f"{place.name}.safetensors")
        spelled = _spelled(network)
        tensors = {_key(spelled, name): t.detach().cpu().contiguous() for name, t in network.state_dict().items()}
        with replace_file(place, owned=self.recognises) as aside:
            save_file({**tensors, MARKER: torch.empty(0)}, aside, {"format": "pt"})
        return place

    def facts(self, network: nn.Module) -> dict[str, object]:
        """The rank of its changes; layers with fewer channels have less."""
        return {"rank": max(layer.down.shape[0] for layer in _copied(network).values())}


def _copied(network: nn.Module) -> dict[str, Any]:
    """The layers whose weights are the base's, by name; they have the same names there."""
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    return {name: layer for name, layer in layers.items() if not name.startswith(OWN)}


def _thin(network: nn.Module, ranks: Mapping[str, int]) -> None:
    """Turn weights into buffers that are not saved, biases into buffers that are, and put beside them `up` of zeros and `down`
    of no values yet."""
    for name, rank in ranks.items():
        layer: Any = network.get_submodule(name)
        weight: Tensor = layer.weight.detach()
        del layer.weight
        layer.register_buffer("weight", weight, persistent=False)
        if layer.bias is not None:
            bias: Tensor = layer.bias.detach()
            del layer.bias
            layer.register_buffer("bias", bias)
        layer.down = nn.Parameter(weight.new_empty(rank, *weight.shape[1:]))
        layer.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank, *[1] * (weight.dim() - 2)))
        layer.register_forward_hook(_add)


def _add(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    """Add what the change makes of a layer's input: rank by rank, without ever forming up down."""
    this: Any = layer
    if isinstance(layer, nn.Conv2d):
        conv = nn.functional.conv2d
        return out + conv(conv(args[0], this.down, None, layer.stride, layer.padding, layer.dilation), this.up)
    linear = nn.functional.linear
    return out + linear(linear(args[0], this.down), this.up)


def _spelled(network: nn.Module) -> dict[str, str]:
    """The original names of all modules that hold tensors."""
    hint = [name for name in network.state_dict() if name.startswith("controlnet_cond_embedding.")]
    encoder = dict.fromkeys(name.rpartition(".")[0] for name in hint)  # in the order they act in
    names = original_names(network)
    return names | {name: f"input_hint_block.{2 * i}" for i, name in enumerate(encoder)}  # between them are activations


def _key(spelled: Mapping[str, str], name: str) -> str:
    """The file's name of a parameter."""
    module, _, tensor = name.rpartition(".")
    return f"{spelled[module]}.{tensor}"


def _rank(down: Tensor | None) -> int:
    """The rank of a change by its first factor; of one that is not there, any."""
    return 1 if down is None or down.dim() < 2 else down.shape[0]


def _check_fit(place: Path, base: Base, held: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> None:
    """Raise `DeltaError` unless the tensors are those that are wanted; factors of convolutions may be stored flat."""
    flat = {key: (*t.shape[:1], prod(t.shape[1:])) for key, t in held.items()}
    asked = {key: (*shape[:1], prod(shape[1:])) for key, shape in wanted.items()}
    if wrong := sorted({key for key, _ in flat.items() ^ asked.items()}):
        raise DeltaError(
            f"{place}: {len(wrong)} tensors are missing, left over or of another shape ({listed(wrong)})",
            expected=f"a control-lora made for {base.source} ({base.family.name})",
            fix="use it with the family of base models it was made for, or fetch it anew",
        )
