"""ControlNet: a trainable copy of the U-Net's encoder that reads a control picture (Zhang et al. 2023, arXiv 2302.05543).

The copy enters through zero convolutions (section 3.1, eq. 2 and 3), so a fresh one changes nothing. Network and saved
folder are diffusers' own `ControlNetModel`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from vgm_peft.errors import DataError, DeltaError
from vgm_peft.family import Base, Query, Residuals
from vgm_peft.folders import check_component, check_whole, first_line, read_json, replace_folder
from vgm_peft.side import Side

if TYPE_CHECKING:
    from diffusers import ControlNetModel

CLASS = "ControlNetModel"
HINT_WIDTHS = (16, 32, 96, 256)
"""Channels of the control picture's encoder; every one after the first halves the picture."""
LAYOUT = (
    "cross_attention_dim",
    "addition_embed_type",
    "in_channels",
    "down_block_types",
    "block_out_channels",
    "layers_per_block",
)


class ControlNet(Side):
    """diffusers' ControlNetModel beside a U-Net."""

    name: ClassVar[str] = "controlnet"

    def create(self, base: Base, seed: int = 0) -> "ControlNetModel":
        """Copy the base's encoder, in float32 and training mode; only the control picture's encoder depends on `seed`."""
        from diffusers import ControlNetModel

        widths = _hint_widths(base.latent_factor)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = ControlNetModel.from_unet(cast(Any, base.denoiser), conditioning_embedding_out_channels=widths)
        return _to(network.float(), base.device).requires_grad_(True).train()

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Say whether a configuration names diffusers' ControlNetModel."""
        return config.get("_class_name") == CLASS

    def load(self, folder: Path, base: Base) -> "ControlNetModel":
        """Load a diffusers folder, frozen, on the base's device and dtype.

        Raises `DeltaError` when it was made for another kind of base: other blocks, other tokens, another latent size.
        """
        from diffusers import ControlNetModel

        check_component(folder)
        _check_fit(read_json(folder / "config.json"), base, folder)
        dtype = next(base.denoiser.parameters()).dtype
        try:
            network = ControlNetModel.from_pretrained(folder, use_safetensors=True, local_files_only=True, dtype=dtype)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise DeltaError(f"{folder}: cannot be loaded ({first_line(error)})", fix="fetch or copy it anew") from error
        check_whole(network, folder)
        return _to(network, base.device).requires_grad_(False).eval()

    def save(self, network: nn.Module, folder: Path) -> None:
        """Write the diffusers folder; one that stood there before is replaced only when the new one is whole."""
        with replace_folder(folder, owned=lambda old: self.recognises(read_json(old / "config.json"))) as aside:
            cast("ControlNetModel", network).save_pretrained(aside, safe_serialization=True)

    def residuals(self, base: Base, network: nn.Module, query: Query, control: Tensor) -> Residuals:
        """Run the network; inputs are cast to its dtype and what it adds to the base's."""
        height, width = (side * base.latent_factor for side in query.noisy.shape[-2:])
        if control.shape[-2:] != (height, width):
            raise DataError(
                f"a control picture of {control.shape[-1]}x{control.shape[-2]} pixels",
                expected=f"{width}x{height}, like the picture",
            )
        dtype = next(network.parameters()).dtype
        down, mid = network(
            query.noisy.to(dtype),
            query.t,
            encoder_hidden_states=query.condition.hidden.to(dtype),
            controlnet_cond=control.to(dtype),
            added_cond_kwargs=base.family.extra(base, query),
            return_dict=False,
        )
        theirs = next(base.denoiser.parameters()).dtype
        return Residuals(tuple(d.to(theirs) for d in down), mid.to(theirs))


def _to(network: "ControlNetModel", device: torch.device) -> "ControlNetModel":
    return cast(Any, network).to(device)


def _hint_widths(factor: int) -> tuple[int, ...]:
    """Channels of an encoder that brings pictures down by `factor`, a power of two up to 32."""
    widths = [*HINT_WIDTHS, 256, 256]
    if factor not in (2**i for i in range(len(widths))):
        raise DeltaError(f"a base with {factor} pixels to a latent", expected="a power of two up to 32")
    return tuple(widths[: factor.bit_length()])


def _check_fit(config: Mapping[str, Any], base: Base, folder: Path) -> None:
    unet: Any = base.denoiser.config
    for name in LAYOUT:
        has, wants = config.get(name), unet.get(name)
        if isinstance(wants, (list, tuple)) and isinstance(has, (list, tuple)):
            has, wants = list(has), list(wants)
        if has != wants:
            raise DeltaError(
                f"{folder}: a control network with {name} {has}",
                expected=f"{wants}, as {base.source} ({base.family.name}) has it",
                fix="use it with the family of base models it was made for",
            )
    factor = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
    if factor != base.latent_factor:
        raise DeltaError(
            f"{folder}: a control network for {factor} pixels to a latent",
            expected=f"{base.latent_factor}, as {base.source} has",
        )
