"""ControlNet: a trainable copy of the U-Net's encoder that reads a control picture (Zhang et al. 2023, arXiv 2302.05543).

The copy enters through zero convolutions (section 3.1, eq. 2 and 3), so a fresh one changes nothing. Network and saved
folder are diffusers' own `ControlNetModel`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vgm_peft.errors import DeltaError
from vgm_peft.family import Base
from vgm_peft.folders import check_component, read_json, replace_folder
from vgm_peft.side import Features, Side, Speaker, check_size, class_of, load_folder, question
from vgm_peft.spelling import unet_spellings

if TYPE_CHECKING:
    from diffusers import ControlNetModel

CLASS = "ControlNetModel"
HINT_WIDTHS = (16, 32, 96, 256)
"""Channels of the control picture's encoder; every one after the first halves the picture."""
FIT = {
    name: name
    for name in (
        "cross_attention_dim",
        "addition_embed_type",
        "in_channels",
        "down_block_types",
        "block_out_channels",
        "layers_per_block",
    )
}
"""In which settings of its own a network must agree with which of a U-Net's."""


@dataclass(frozen=True, kw_only=True)
class ControlNetOptions:
    """What may be chosen when one is made."""

    network: Literal["controlnet"] = "controlnet"


class ControlNet(Side):
    """diffusers' ControlNetModel beside a U-Net."""

    name: ClassVar[str] = "controlnet"
    Options: ClassVar[type] = ControlNetOptions
    fresh: ClassVar[tuple[str, ...]] = ("controlnet_*",)
    guesses: ClassVar[bool] = True

    def create(self, base: Base, options: object = None, seed: int = 0) -> "ControlNetModel":
        """Copy the base's encoder, in float32 and training mode; only the control picture's encoder depends on `seed`."""
        from diffusers import ControlNetModel

        widths = hint_widths(base.latent_factor)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = ControlNetModel.from_unet(cast(Any, base.denoiser), conditioning_embedding_out_channels=widths)
        return _to(network.float(), base.device).requires_grad_(True).train()

    def recognises(self, place: Path) -> bool:
        """Say whether a folder's configuration names diffusers' ControlNetModel."""
        return class_of(place) == CLASS

    def load(self, place: Path, base: Base) -> "ControlNetModel":
        """Load a diffusers folder, frozen, on the base's device and dtype.

        Raises `DeltaError` when it was made for another kind of base: other blocks, other tokens, another latent size.
        """
        from diffusers import ControlNetModel

        check_component(place)
        check_fit(read_json(place / "config.json"), base, place, FIT)
        return load_folder(ControlNetModel, place, base)

    def save(self, network: nn.Module, place: Path) -> Path:
        """Write the diffusers folder; one that stood there before is replaced only when the new one is whole."""
        with replace_folder(place, owned=self.recognises) as aside:
            cast("ControlNetModel", network).save_pretrained(aside, safe_serialization=True)
        return place

    def read(self, base: Base, network: nn.Module, pictures: Tensor) -> Features:
        """The pictures themselves: the network reads them together with the noise."""
        return (pictures.to(next(network.parameters()).dtype),)

    def hint(self, base: Base, features: Features, latents: torch.Size) -> Tensor | Features:
        """Return what the network is shown of them. Raises `DataError` unless it is as large as the latents (height, width)."""
        (control,) = features
        check_size(base, control, latents)
        return control

    def join(self, base: Base, network: nn.Module, speaker: Speaker) -> list[RemovableHandle]:
        """One hook: the network is asked what the denoiser is asked, and its residuals go to the skips and the middle."""
        dtype = next(network.parameters()).dtype

        def add(unet: nn.Module, args: tuple[Any, ...], told: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            noisy, t = question(args, told)
            heard = speaker.heard(len(noisy), t)
            if heard is None:
                return None
            shown = self.hint(base, heard.features, noisy.shape[-2:])
            extra = told.get("added_cond_kwargs")
            hidden = told["encoder_hidden_states"] if len(args) < 3 else args[2]
            down, mid = network(
                heard.told(noisy).to(dtype),
                heard.told(t) if t.dim() else t,
                encoder_hidden_states=heard.told(hidden).to(dtype),
                controlnet_cond=shown,
                added_cond_kwargs=None if extra is None else {name: heard.told(v) for name, v in extra.items()},
                return_dict=False,
            )
            shares = _shares(len(down) + 1) if heard.half else [1.0] * (len(down) + 1)
            placed = [heard.placed(r.to(noisy.dtype), heard.strength * s) for r, s in zip((*down, mid), shares, strict=True)]
            before = told.get("down_block_additional_residuals")  # of another one, whose hook came first
            if before is not None:
                placed = [new + old for new, old in zip(placed, (*before, told["mid_block_additional_residual"]), strict=True)]
            told |= {"down_block_additional_residuals": tuple(placed[:-1]), "mid_block_additional_residual": placed[-1]}
            return args, told

        return [base.denoiser.register_forward_pre_hook(add, with_kwargs=True)]


def _shares(count: int) -> list[float]:
    """The shares of guess mode, as its authors' code has them: 1 in the middle, less with every layer before it."""
    return [0.825 ** (count - 1 - i) for i in range(count)]


def _to(network: "ControlNetModel", device: torch.device) -> "ControlNetModel":
    return cast(Any, network).to(device)


def original_names(network: nn.Module) -> dict[str, str]:
    """The original names of the modules that hold tensors, the encoder of the control picture apart."""
    holding = [name for name, module in network.named_modules() if any(True for _ in module.parameters(recurse=False))]
    zeros = (name for name in holding if name.startswith("controlnet_down_blocks."))
    names = unet_spellings(holding) | {name: f"zero_convs.{name.rpartition('.')[2]}.0" for name in zeros}
    return names | {"controlnet_mid_block": "middle_block_out.0"}


def hint_widths(factor: int) -> tuple[int, ...]:
    """Channels of an encoder that brings pictures down by `factor`, a power of two up to 32."""
    widths = [*HINT_WIDTHS, 256, 256]
    if factor not in (2**i for i in range(len(widths))):
        raise DeltaError(f"a base with {factor} pixels to a latent", expected="a power of two up to 32")
    return tuple(widths[: factor.bit_length()])


def check_fit(config: Mapping[str, Any], base: Base, folder: Path, settings: Mapping[str, str]) -> None:
    """Raise `DeltaError` unless a network's settings agree with those of the base's U-Net, and it reads pictures of the base's
    pixels to a latent."""
    unet: Any = base.denoiser.config
    for name, theirs in settings.items():
        has, wants = config.get(name), unet.get(theirs)
        if isinstance(wants, (list, tuple)) and isinstance(has, (list, tuple)):
            has, wants = list(has), list(wants)
        if has != wants:
            raise DeltaError(
                f"{folder}: a control network with {name} {has}",
                expected=f"{wants}, as {base.source} ({base.family.name}) has it",
                fix="use it with the family of base models it was made for",
            )
    factor = 2 ** (len(config.get("conditioning_embedding_out_channels", HINT_WIDTHS)) - 1)
    if factor != base.latent_factor:
        raise DeltaError(
            f"{folder}: a control network for {factor} pixels to a latent",
            expected=f"{base.latent_factor}, as {base.source} has",
        )
