"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, epsilon or v-prediction (Rombach et al. 2021, arXiv 2112.10752)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from vgm_peft.families.clip import tiny_text_config, tiny_tokenizer
from vgm_peft.families.latent import UNetFamily, is_unet, tiny_unet, tiny_vae
from vgm_peft.families.prompts import last_state
from vgm_peft.family import Base, Condition
from vgm_peft.process import Prediction
from vgm_peft.site import Site

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")


class StableDiffusion(UNetFamily):
    """Stable Diffusion 1.x and 2.x, and everything of their shape (Toybox too)."""

    name: ClassVar[str] = "sd15"
    parts: ClassVar[tuple[str, ...]] = ("unet", "text_encoder")
    pipelines: ClassVar[tuple[str, ...]] = (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionControlNetPipeline",
    )
    loading: ClassVar[Mapping[str, object]] = {
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        "requires_safety_checker": False,
    }
    text_prefixes: ClassVar[Mapping[str, tuple[str, ...]]] = {"text_encoder": ("lora_te", "lora_te1")}
    ldm_names: ClassVar[bool] = False

    def recognises(self, pipe: "DiffusionPipeline") -> bool:
        """Say whether a pipeline has this U-Net and one CLIP text encoder."""
        from transformers import CLIPTextModel

        parts = pipe.components
        encoder = isinstance(parts.get("text_encoder"), CLIPTextModel) and "text_encoder_2" not in parts
        return encoder and is_unet(parts.get("unet")) and parts["unet"].config.addition_embed_type is None

    def tiny(self, seed: int = 0, prediction: Prediction = "epsilon") -> "DiffusionPipeline":
        """Build a StableDiffusionPipeline of four levels, 64 x 64 pictures; v-prediction comes with zero-terminal SNR."""
        from diffusers import DDIMScheduler, StableDiffusionPipeline
        from transformers import CLIPTextModel

        velocity = prediction == "v_prediction"
        tokenizer = tiny_tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet = tiny_unet(
                down_block_types=DOWN,
                up_block_types=UP,
                block_out_channels=(8, 16, 16, 16),
                cross_attention_dim=32,
                attention_head_dim=2,
            )
            encoder = CLIPTextModel(tiny_text_config(tokenizer, 32))
            vae = tiny_vae(8)
        build: Any = StableDiffusionPipeline
        return build(
            vae=vae,
            text_encoder=encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
                prediction_type=prediction,
                rescale_betas_zero_snr=velocity,
                timestep_spacing="trailing" if velocity else "leading",
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def published(self) -> Mapping[str, nn.Module]:
        """Build Stable Diffusion 1.5's U-Net (859,520,964 values) and text encoder (123,060,480) on the meta device."""
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        with torch.device("meta"):
            unet = UNet2DConditionModel(
                sample_size=64,
                down_block_types=DOWN,
                up_block_types=UP,
                block_out_channels=(320, 640, 1280, 1280),
                layers_per_block=2,
                cross_attention_dim=768,
                attention_head_dim=8,
            )
            text = CLIPTextConfig(
                vocab_size=49408,
                hidden_size=768,
                intermediate_size=3072,
                projection_dim=768,
                num_hidden_layers=12,
                num_attention_heads=12,
                max_position_embeddings=77,
            )
            return {"unet": unet, "text_encoder": CLIPTextModel(text)}

    def stamps(self, sites: Sequence[Site], prediction: str | None = None) -> Mapping[str, str]:
        """Tell 1.x from 2.x by what the text is wide (2.x: 1024); a v-prediction base has `_v` behind its version."""
        second = any(s.columns == 1024 and (s.module.endswith("attn2.to_k") or s.part == "text_encoder") for s in sites)
        velocity = prediction == "v_prediction"
        architecture = f"stable-diffusion-v2-{'768-v' if velocity else '512'}" if second else "stable-diffusion-v1"
        stamps = {
            "ss_base_model_version": f"sd_v{2 if second else 1}" + "_v" * velocity,
            "ss_v2": str(second),
            "modelspec.architecture": architecture,
        }
        return stamps if prediction is None else {**stamps, "modelspec.prediction_type": "v" if velocity else "epsilon"}

    def encode_prompt(self, base: Base, prompts: Sequence[str]) -> Condition:
        """Encode prompts to `hidden` (B, T, D)."""
        pipe = cast(Any, base.pipe)
        return Condition(last_state(pipe.tokenizer, pipe.text_encoder, prompts))
