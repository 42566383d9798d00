"""Stable Diffusion XL: two CLIP text encoders, a pooled summary, the picture's sizes (Podell et al. 2023, arXiv 2307.01952)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from vgm_peft.errors import BaseModelError
from vgm_peft.families.clip import CLIP_G, CLIP_L, text_prefixes, tiny_text_config, tiny_tokenizer
from vgm_peft.families.latent import PRESETS, UNET_PREFIXES, VAE, UNetFamily, is_unet, tiny_unet, tiny_vae
from vgm_peft.families.layout import BETAS, Layout
from vgm_peft.families.prompts import encode, penultimate_state
from vgm_peft.family import Base, Condition, Query
from vgm_peft.site import Site

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DOWN = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
UP = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
SIZES = 6
UNET: Mapping[str, Any] = {
    "sample_size": 128,
    "down_block_types": DOWN,
    "up_block_types": UP,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
TEXT = "conditioner.embedders.1.model.ln_final.weight"


class StableDiffusionXL(UNetFamily):
    """Stable Diffusion XL base models (not the refiner, which has one text encoder)."""

    name: ClassVar[str] = "sdxl"
    parts: ClassVar[tuple[str, ...]] = ("unet", "text_encoder", "text_encoder_2")
    pipelines: ClassVar[tuple[str, ...]] = (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLControlNetPipeline",
    )
    loading: ClassVar[Mapping[str, object]] = {"feature_extractor": None, "image_encoder": None, "add_watermarker": False}
    # The blocks that hold what is shown and how (B-LoRA, Frenkel et al. 2024, arXiv 2403.14572).
    presets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **PRESETS,
        "content": ("unet.up_blocks.0.attentions.0.*.attn[12].to_*",),
        "style": ("unet.up_blocks.0.attentions.1.*.attn[12].to_*",),
    }
    prefixes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "unet": UNET_PREFIXES,
        "text_encoder": text_prefixes("text_encoder", ("lora_te1",), ("clip_l",)),
        "text_encoder_2": text_prefixes("text_encoder_2", ("lora_te2",), ("clip_g",)),
    }
    ldm_names: ClassVar[bool] = True

    def recognises(self, pipe: "DiffusionPipeline") -> bool:
        """Say whether a pipeline has this U-Net, told of text and sizes, and two CLIP text encoders."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        parts = pipe.components
        first, second = parts.get("text_encoder"), parts.get("text_encoder_2")
        encoders = isinstance(first, CLIPTextModel) and isinstance(second, CLIPTextModelWithProjection)
        return encoders and is_unet(parts.get("unet")) and parts["unet"].config.addition_embed_type == "text_time"

    def tiny(self, seed: int = 0) -> "DiffusionPipeline":
        """Build a StableDiffusionXLPipeline of three levels, 64 x 64 pictures."""
        from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        tokenizers = tiny_tokenizer(), tiny_tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet = tiny_unet(
                down_block_types=DOWN,
                up_block_types=UP,
                block_out_channels=(8, 16, 16),
                transformer_layers_per_block=(1, 1, 2),
                cross_attention_dim=32 + 16,
                attention_head_dim=(2, 2, 4),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=SIZES * 8 + 16,
            )
            first = CLIPTextModel(tiny_text_config(tokenizers[0], 32))
            second = CLIPTextModelWithProjection(tiny_text_config(tokenizers[1], 16, layers=3))
            vae = tiny_vae(8)
        build: Any = StableDiffusionXLPipeline
        return build(
            vae=vae,
            text_encoder=first,
            text_encoder_2=second,
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=unet,
            scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"),
            add_watermarker=False,
        )

    def layout(self, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> Layout | None:
        """Know it by its second text encoder; v-prediction and zero-terminal SNR as the file says, or marks with a tensor."""
        if shapes and (shapes.get(CONV_IN) != (320, 4, 3, 3) or TEXT not in shapes):
            return None
        velocity = "v_pred" in shapes or metadata.get("modelspec.prediction_type", "").startswith("v")
        noise: dict[str, Any] = {"prediction_type": "v_prediction" if velocity else "epsilon", "timestep_spacing": "leading"}
        if "ztsnr" in shapes:
            noise |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        vae = {**VAE, "scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": True}
        texts = {"text_encoder": ("CLIPTextModel", CLIP_L), "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G)}
        return Layout(UNET, vae, texts, ("EulerDiscreteScheduler", noise), {"text_encoder_2": "!"})

    def stamps(self, sites: Sequence[Site], prediction: str | None = None) -> Mapping[str, str]:
        """The one published version; v-prediction relatives of it say so in `modelspec.prediction_type`."""
        stamps = {
            "ss_base_model_version": "sdxl_base_v1-0",
            "ss_v2": "False",
            "modelspec.architecture": "stable-diffusion-xl-v1-base",
        }
        velocity = prediction == "v_prediction"
        return stamps if prediction is None else {**stamps, "modelspec.prediction_type": "v" if velocity else "epsilon"}

    def encode_prompt(self, base: Base, prompts: Sequence[str], syntax: bool = False) -> Condition:
        """Encode prompts to `hidden` (B, T, D1 + D2) and `pooled` (B, E), the second encoder's summary.

        A dropped caption is the empty text, encoded like any other: zeros, which stock pipelines put in the place of a
        missing negative prompt, are a choice of sampling and not of training.
        """
        pipe = cast(Any, base.pipe)
        first, _ = encode(pipe.tokenizer, pipe.text_encoder, prompts, penultimate_state, syntax)
        second, pooled = encode(pipe.tokenizer_2, pipe.text_encoder_2, prompts, penultimate_state, syntax)
        return Condition(torch.cat([first, second], dim=-1), pooled)

    def extra(self, base: Base, query: Query) -> dict[str, Tensor] | None:
        """The pooled summary and the sizes; without sizes, a picture as large as the latents that was never cropped."""
        pooled = query.condition.pooled
        if pooled is None:
            raise BaseModelError(
                "an SDXL query without a pooled summary", expected="Condition.pooled", fix="encode the prompts with this base"
            )
        sizes = query.sizes
        if sizes is None:
            height, width = (side * base.latent_factor for side in query.noisy.shape[-2:])
            sizes = query.noisy.new_tensor([height, width, 0, 0, height, width]).expand(len(query.noisy), SIZES)
        return {"text_embeds": pooled.to(query.noisy.dtype), "time_ids": sizes.to(query.noisy.device, torch.float32)}
