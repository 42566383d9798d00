"""What the Stable Diffusion families share: pictures through an AutoencoderKL, queries to a UNet2DConditionModel.

Latent diffusion, Rombach et al. 2021, arXiv 2112.10752. Latents are in the denoiser's units: `(z - shift) * scale` of the
VAE's own z, or per channel where the VAE's configuration gives `latents_mean` and `latents_std`.
"""

from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from vgm_peft.families.layout import Layout
from vgm_peft.family import Base, Family, KeyTable, Posterior, Query
from vgm_peft.site import Site
from vgm_peft.spelling import unet_spellings

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel

UNET_PREFIXES = ("lora_unet", "unet", "diffusion_model", "model_diffusion_model", "unet_base_model_model", "oft_unet")
"""What tools write before a U-Net's modules: kohya; diffusers and OneTrainer; ComfyUI; checkpoints; peft; kohya's OFT."""
_ATTENTION = tuple(f"unet.*.{{}}.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0"))
_TEXT = tuple(f"text_encoder*.encoder.layers.*.self_attn.{layer}" for layer in ("q_proj", "k_proj", "v_proj", "out_proj"))


def _attention(which: str) -> tuple[str, ...]:
    return tuple(glob.format(which) for glob in _ATTENTION)


PRESETS: Mapping[str, tuple[str, ...]] = {
    "attention": _attention("attn[12]"),
    "self-attention": _attention("attn1"),
    "cross-attention": _attention("attn2"),
    "attention+mlp": (*_attention("attn[12]"), "unet.*.ff.net.0.proj", "unet.*.ff.net.2"),
    "conv": ("unet.*.resnets.*.conv[12]", "unet.*.downsamplers.*.conv", "unet.*.upsamplers.*.conv"),
    "all": ("unet.*",),
    "key+value": ("unet.*.attn2.to_[kv].weight",),
    "keys+mlp": ("unet.*.attn[12].to_[kv].weight", "unet.*.ff.net.2.weight"),
    "branches": ("unet.*.attn[12].to_[qkv].weight", "unet.*.attn[12].to_out.0.weight", "unet.*.ff.net.2.weight"),
    "samplers": ("unet.*.downsamplers.*.conv", "unet.*.upsamplers.*.conv"),
    "weights": ("unet.*", "-unet.*.bias", "-unet.*norm*"),
    "biases": ("unet.*.bias",),
    "norms": ("unet.*norm*",),
    "text": _TEXT,
    "text+mlp": (*_TEXT, "text_encoder*.encoder.layers.*.mlp.fc[12]"),
}


class UNetFamily(Family):
    """Families whose denoiser is diffusers' UNet2DConditionModel over AutoencoderKL latents."""

    presets: ClassVar[Mapping[str, tuple[str, ...]]] = PRESETS
    ldm_names: ClassVar[bool]
    """kohya files of this family are written with the original (LDM) block names."""

    @abstractmethod
    def layout(self, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> Layout | None:
        """Return the layout of a checkpoint in the original names, or None when it is not of this family.

        Without any tensors: that of the published base.
        """

    def published(self) -> Mapping[str, nn.Module]:
        """Build the published base's parts on the meta device."""
        return self.built({})

    def built(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, nn.Module]:
        """Build on the meta device what a checkpoint of these tensors holds."""
        layout = self.layout(shapes, {})
        with torch.device("meta"):
            return {} if layout is None else layout.build()

    def configure(self, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], folder: Path) -> bool:
        """Write the layout of a single-file checkpoint of this family, from its tensors."""
        layout = self.layout(shapes, metadata) if shapes else None
        if layout is not None:
            layout.write(folder, self.pipelines[0])
        return layout is not None

    def predict(self, base: Base, query: Query) -> Tensor:
        """Call the U-Net; inputs are cast to its dtype."""
        unet = cast(Any, base.denoiser)
        dtype = next(base.denoiser.parameters()).dtype
        return unet(
            query.noisy.to(dtype),
            query.t,
            encoder_hidden_states=query.condition.hidden.to(dtype),
            added_cond_kwargs=self.extra(base, query),
            return_dict=False,
        )[0]

    def encode_image(self, base: Base, pixels: Tensor) -> Posterior:
        """Encode pictures to the VAE's posterior, in the denoiser's units and the VAE's dtype."""
        vae = _vae(base)
        with _upcast(vae) as dtype:
            answer = vae.encode(pixels.to(vae.device, dtype)).latent_dist
        shift, scale = _units(vae, answer.mean)
        return Posterior((answer.mean - shift) * scale, answer.std * scale)

    def decode(self, base: Base, latents: Tensor) -> Tensor:
        """Decode latents to pictures, clamped to -1 .. 1."""
        vae = _vae(base)
        shift, scale = _units(vae, latents)
        with _upcast(vae) as dtype:
            pixels = vae.decode((latents / scale + shift).to(vae.device, dtype)).sample
        return pixels.clamp(-1.0, 1.0)

    def key_table(self, sites: Sequence[Site]) -> KeyTable:
        """Spell the modules as kohya does; diffusers and original block names are both read."""
        kohya: dict[tuple[str, str], str] = {}
        aliases: dict[str, tuple[str, str]] = {}
        original = unet_spellings(s.module for s in sites if s.part == "unet")
        for part, module in dict.fromkeys((s.part, s.module) for s in sites):
            if part == "unet":
                inner = [module, original.get(module, module)]
                inner = inner[::-1] if self.ldm_names else inner
            else:
                inner = [module if module.startswith("text_projection") else f"text_model.{module}"]
            prefix = self.prefixes[part][0]
            first, *others = dict.fromkeys(f"{prefix}_{name}".replace(".", "_") for name in inner)
            kohya[part, module] = first
            aliases.update(dict.fromkeys(others, (part, module)))
        return KeyTable(kohya, aliases)


VAE: Mapping[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 512,
}
"""The autoencoder that all of them share, in its published size."""


def _vae(base: Base) -> Any:
    return cast(Any, base.pipe).vae


@contextmanager
def _upcast(vae: Any) -> Generator[torch.dtype]:
    """Run the VAE in float32 where its configuration says that float16 overflows (SDXL's); exact both ways."""
    dtype = vae.dtype
    if dtype != torch.float16 or not vae.config.get("force_upcast", False):
        yield dtype
        return
    vae.to(torch.float32)
    try:
        yield torch.float32
    finally:
        vae.to(dtype)


def _units(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale from the VAE's z to the denoiser's units, broadcastable to (B, C, H, W)."""
    config = vae.config
    scale = like.new_tensor(config["scaling_factor"])
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        return like.new_tensor(mean).view(1, -1, 1, 1), scale / like.new_tensor(std).view(1, -1, 1, 1)
    return like.new_tensor(config.get("shift_factor") or 0.0), scale


def tiny_vae(factor: int) -> "AutoencoderKL":
    """Build an AutoencoderKL of toy size that maps `factor` pixels to a latent of 4 channels."""
    from diffusers import AutoencoderKL

    levels = factor.bit_length()
    build: Any = AutoencoderKL
    return build(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
        scaling_factor=0.18215,
    )


def is_unet(network: nn.Module | None) -> bool:
    """Say whether a denoiser is the U-Net class that these families share."""
    from diffusers import UNet2DConditionModel

    return isinstance(network, UNet2DConditionModel)


def tiny_unet(**config: Any) -> "UNet2DConditionModel":
    """Build a U-Net at 8 x 8 latents with 4 channels, 2 layers a block and groups of 4 channels."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, norm_num_groups=4, **config)
