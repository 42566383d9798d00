"""Typed doors to the networks of the Toybox base: how each is built and called, for a type checker that cannot follow
diffusers' and transformers' own annotations. `B` batch, `C` channels, `H W` latents, `P Q` pixels, `T` tokens, `D` width.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

Net = TypeVar("Net", bound=nn.Module)

DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")


@dataclass(frozen=True)
class Posterior:
    """The Gaussian that the encoder gives for a picture: `mean` and `logvar` (B, C, H, W)."""

    mean: Tensor
    logvar: Tensor

    @property
    def deviation(self) -> Tensor:
        """The standard deviation."""
        return (0.5 * self.logvar).exp()

    def sample(self) -> Tensor:
        """Draw a latent with torch's global generator."""
        return self.mean + self.deviation * torch.randn_like(self.mean)


def place(net: Net, device: str, dtype: torch.dtype = torch.float32) -> Net:
    """Move a network, in place."""
    moved: Any = net
    return cast(Net, moved.to(device, dtype))


def make_vae(widths: tuple[int, ...] = (16, 32, 64), layers: int = 1) -> AutoencoderKL:
    """Build an untrained VAE of `layers` blocks a level that halves the picture once less often than it has levels."""
    build: Any = AutoencoderKL
    levels = len(widths)
    return build(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=widths,
        layers_per_block=layers,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
    )


def encode(vae: AutoencoderKL, pictures: Tensor) -> Posterior:
    """Encode pictures (B, 3, P, Q) in -1..1."""
    call: Any = vae
    posterior = call.encode(pictures).latent_dist
    return Posterior(posterior.mean, posterior.logvar)


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Draw latents (B, C, H, W) as pictures (B, 3, P, Q), about -1..1."""
    call: Any = vae
    return call.decode(latents).sample


def one_by_one(vae: AutoencoderKL) -> tuple[nn.Conv2d, nn.Conv2d]:
    """The 1x1 convolutions just after the encoder and just before the decoder."""
    return cast(nn.Conv2d, vae.quant_conv), cast(nn.Conv2d, vae.post_quant_conv)


def make_unet(widths: tuple[int, ...], heads: tuple[int, ...], text_width: int) -> UNet2DConditionModel:
    """Build an untrained U-Net: four levels, two layers a block, the module names of SD1.5."""
    build: Any = UNet2DConditionModel
    return build(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=DOWN,
        up_block_types=UP,
        block_out_channels=widths,
        layers_per_block=2,
        cross_attention_dim=text_width,
        attention_head_dim=heads,
        norm_num_groups=16 if all(width % 16 == 0 for width in widths) else 8,
    )


def predict(unet: UNet2DConditionModel, noisy: Tensor, step: Tensor, text: Tensor) -> Tensor:
    """What the U-Net says of noisy latents (B, C, H, W) at timesteps (B,) with text features (B, T, D)."""
    call: Any = unet
    return call(noisy, step, text).sample


def make_text_model(tokenizer: CLIPTokenizer, width: int, layers: int, heads: int, tokens: int) -> CLIPTextModel:
    """Build an untrained text model for this tokenizer."""
    build: Any = CLIPTextConfig
    config = build(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokens,
        projection_dim=width,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def read_text(model: CLIPTextModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Features of every token (B, T, D) and of the end token (B, D)."""
    call: Any = model
    output = call(tokens)
    return output.last_hidden_state, output.pooler_output


def make_scheduler() -> DDIMScheduler:
    """The sampler that the pipeline ships: v-prediction, zero terminal SNR, trailing steps."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def assemble(
    vae: AutoencoderKL, text: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """Put the parts together as the pipeline that users load."""
    build: Any = StableDiffusionPipeline
    return build(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def half_copy(net: Net) -> Net:
    """A copy of a diffusers network in half precision; the original stays as it is."""
    original: Any = net
    copy: Any = type(net).from_config(original.config)  # pyright: ignore
    copy.load_state_dict(original.state_dict())
    return copy.to(torch.float16)


def load_vae(folder: Path) -> AutoencoderKL:
    """Read a VAE folder in single precision."""
    load: Any = AutoencoderKL
    return load.from_pretrained(folder, dtype=torch.float32)


def load_text_model(folder: Path) -> CLIPTextModel:
    """Read a text model folder in single precision."""
    load: Any = CLIPTextModel
    return load.from_pretrained(folder, dtype=torch.float32)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Read a tokenizer folder."""
    load: Any = CLIPTokenizer
    return load.from_pretrained(folder)


def load_pipeline(folder: Path, device: str = "cpu") -> StableDiffusionPipeline:
    """Load a pipeline folder in single precision, without progress bars."""
    load: Any = StableDiffusionPipeline
    pipe = load.from_pretrained(folder, dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
