"""ControlNeXt: no second encoder, but a light module and increments of some of the base's weights (Peng et al. 2024, arXiv
2408.06070).

What the module makes of the control picture is brought to the mean and deviation of the U-Net's own stream (cross
normalisation) and added to it once, while a few layers of the U-Net learn to follow; those are held as increments beside the
untouched base and heard by hooks, W + strength * dW. As in its authors' code nothing begins at zero: a normalised control is
as loud as the stream whatever the weights, and a last layer of zeros would have no deviation to divide by.

Strength multiplies both, so at 0 nothing is left and at 1 it is as trained. The authors' own factor of the control alone
(0.35 for lines, 1 for depth), in training and after, is `scale`, a part of the network.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.family import Base
from vgm_peft.folders import check_component
from vgm_peft.side import Ear, Features, Side, Speaker, check_size
from vgm_peft.sides import controlnext_files as files
from vgm_peft.sides.controlnext_module import ControlNeXtNetwork, Form, Place, normalised
from vgm_peft.socket import socket_of

LAYERS = {"to_out": "*.to_out.0", "attn2.to_out": "*.attn2.to_out.0"}
USUAL: Mapping[Place, str] = {"block": "to_out", "stem": "attn2.to_out"}


@dataclass(frozen=True, kw_only=True)
class ControlNeXtOptions:
    """What may be chosen when one is made."""

    network: Literal["controlnext"] = "controlnext"
    scale: float = 1.0
    """What the control is multiplied by, in training and ever after: 1 for dense pictures such as depth, 0.35 for lines."""
    width: int = 64
    """Channels of the module's first layers; 64 is its authors', less does for small bases. A multiple of 4."""
    weights: Literal["usual", "to_out", "attn2.to_out"] = "usual"
    """Which of the base's layers learn along: the last of every attention, or of every cross-attention. The authors chose
    the first for bases like Stable Diffusion 1.5 and the second for those like SDXL."""
    place: Literal["usual", "block", "stem"] = "usual"
    """Where it is heard: behind the first block or before it. The authors chose the first for bases like Stable Diffusion 1.5
    and the second for those like SDXL; on small pictures what is before the block is finer."""

    def __post_init__(self) -> None:
        if self.width < 4 or self.width % 4:
            raise ConfigError(f"width = {self.width}", expected="a multiple of 4")
        if not 0.0 < self.scale <= 10.0:
            raise ConfigError(f"scale = {self.scale:g}", expected="more than 0 and at most 10")


class ControlNeXt(Side):
    """A `ControlNeXtNetwork` beside a U-Net."""

    name: ClassVar[str] = "controlnext"
    Options: ClassVar[type] = ControlNeXtOptions
    zero: ClassVar[bool] = False

    def create(self, base: Base, options: object = None, seed: int = 0) -> ControlNeXtNetwork:
        """Make a module as wide as the base's first block, and increments of zero, in float32 and training mode."""
        chosen = options if isinstance(options, ControlNeXtOptions) else ControlNeXtOptions()
        usual = _form(base)
        place = usual.place if chosen.place == "usual" else chosen.place
        form = replace(usual, width=chosen.width, scale=chosen.scale, place=place)
        which = USUAL[usual.place] if chosen.weights == "usual" else chosen.weights
        layers = {name: layer for name, layer in _layers(base) if fnmatchcase(name, LAYERS[which])}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = ControlNeXtNetwork(form, layers)
        return network.to(base.device).requires_grad_(True).train()

    def recognises(self, place: Path) -> bool:
        """Say whether it is a folder of ours, or one of the authors' by its files."""
        return files.is_one(place)

    def load(self, place: Path, base: Base) -> ControlNeXtNetwork:
        """Load a folder, frozen, on the base's device and dtype; weights given whole become increments over this base's.

        Raises `DeltaError` when a file is missing or was made for another kind of base.
        """
        check_component(place)
        network = files.read(place, base, _form(base), dict(_layers(base)))
        return network.to(base.device, next(base.denoiser.parameters()).dtype).requires_grad_(False).eval()

    def save(self, network: nn.Module, place: Path) -> Path:
        """Write the authors' two files, with increments, and a configuration of ours."""
        files.write(cast(ControlNeXtNetwork, network), place)
        return place

    def read(self, base: Base, network: nn.Module, pictures: Tensor) -> Features:
        """Compute the module's first layers, which do not depend on the timestep."""
        return (cast(ControlNeXtNetwork, network).module.see(pictures.to(next(network.parameters()).dtype)),)

    def join(self, base: Base, network: nn.Module, speaker: Speaker) -> list[RemovableHandle]:
        """Hooks around the first block, where the control is added, and around every layer whose weight grows."""
        network = cast(ControlNeXtNetwork, network)
        ear, block = Ear(base, speaker), base.denoiser.get_submodule("down_blocks.0")
        stream = _Stream(base, network, ear)
        if network.form.place == "block":
            look = block.register_forward_hook(stream.look_after, prepend=True)
            hooks = [look, block.register_forward_hook(stream.add_after)]
        else:
            look = block.register_forward_pre_hook(stream.look_before, with_kwargs=True, prepend=True)
            hooks = [look, block.register_forward_pre_hook(stream.add_before, with_kwargs=True)]
        for name, increment in network.changed():
            grown, layer = _Grown(increment, ear), base.denoiser.get_submodule(name)
            dropout = base.denoiser.get_submodule(f"{name.removesuffix('.0')}.1")
            hooks += [layer.register_forward_pre_hook(grown.look), dropout.register_forward_pre_hook(grown.add)]
        return [ear.hook, *hooks]

    def rate(self, parameter: str) -> float:
        """The base's weights learn ten times slower than the module, as in the authors' code."""
        return 0.1 if parameter.startswith("increments.") else 1.0

    def facts(self, network: nn.Module) -> dict[str, object]:
        """Its form."""
        return asdict(cast(ControlNeXtNetwork, network).form)


class _Stream:
    """The main stream at the first block, and what is added to it.

    The stream is looked at before anything was added: several networks each see the same one, so their order is all one.
    """

    def __init__(self, base: Base, network: ControlNeXtNetwork, ear: Ear) -> None:
        self._base, self._network, self._ear = base, network, ear
        self._seen: Tensor | None = None

    def look_before(self, block: nn.Module, args: tuple[Any, ...], told: dict[str, Any]) -> None:
        self._seen = args[0] if args else told["hidden_states"]

    def add_before(self, block: nn.Module, args: tuple[Any, ...], told: dict[str, Any]) -> Any:
        if args:
            return (self._added(args[0]), *args[1:]), told
        return args, {**told, "hidden_states": self._added(told["hidden_states"])}

    def look_after(self, block: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, tuple[Tensor, ...]]) -> None:
        self._seen = output[0]

    def add_after(self, block: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, tuple[Tensor, ...]]) -> Any:
        return self._added(output[0]), output[1]  # the skips of the block stay as they are

    def _added(self, stream: Tensor) -> Tensor:
        heard, seen, t = self._ear.heard, self._seen, self._ear.time
        self._seen = None
        if heard is None or seen is None or t is None:
            return stream
        module, form = self._network.module, self._network.form
        (features,) = heard.features
        check_size(self._base, features, self._ear.latents, module.stride)
        control = normalised(module(features, heard.told(t) if t.dim() else t), heard.told(seen))
        return stream + heard.placed(control.to(stream.dtype), heard.strength * form.scale)


class _Grown:
    """A layer of the base and what is added to its weight.

    It reads the layer's own input, not what deltas on the layer make of it, and is added where the layer's output goes next,
    so that those deltas in turn see the layer's own output.
    """

    def __init__(self, increment: nn.Linear, ear: Ear) -> None:
        self._increment, self._ear = increment, ear
        self._x: Tensor | None = None

    def look(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        socket = socket_of(layer)
        self._x = args[0] if socket is None or socket.x is None else socket.x

    def add(self, dropout: nn.Module, args: tuple[Tensor, ...]) -> Tensor | None:
        heard, x, grown = self._ear.heard, self._x, self._increment
        self._x = None
        if heard is None or x is None:
            return None
        change: Tensor = grown(heard.told(x).to(grown.weight.dtype))
        return args[0] + heard.placed_tokens(change.to(args[0].dtype), self._ear.latents)


def _form(base: Base) -> Form:
    """The form that a base asks for; one that is told more than time and text is treated as SDXL is."""
    config: Any = base.denoiser.config
    if base.latent_factor not in (1, 2, 4, 8):
        raise DeltaError(f"a base with {base.latent_factor} pixels to a latent", expected="1, 2, 4 or 8")
    return Form(
        channels=config.block_out_channels[0],
        factor=base.latent_factor,
        context=config.cross_attention_dim,
        place="block" if config.addition_embed_type is None else "stem",
    )


def _layers(base: Base) -> Iterator[tuple[str, nn.Linear]]:
    """The base's layers that may learn along."""
    named = base.denoiser.named_modules()
    return ((n, m) for n, m in named if isinstance(m, nn.Linear) and fnmatchcase(n, LAYERS["to_out"]))
