"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, epsilon or v-prediction (Rombach et al. 2021, arXiv 2112.10752)."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from vgm_peft.families.clip import CLIP_H, CLIP_L, text_prefixes, tiny_text_config, tiny_tokenizer
from vgm_peft.families.latent import UNET_PREFIXES, VAE, UNetFamily, is_unet, tiny_unet, tiny_vae
from vgm_peft.families.layout import BETAS, Layout
from vgm_peft.families.prompts import encode, last_state
from vgm_peft.family import Base, Condition
from vgm_peft.process import Prediction
from vgm_peft.site import Site

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
UNET: Mapping[str, Any] = {
    "sample_size": 64,
    "down_block_types": DOWN,
    "up_block_types": UP,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
FIRST_TEXT = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"
SECOND_TEXT = "cond_stage_model.model.ln_final.weight"


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
    prefixes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "unet": UNET_PREFIXES,
        "text_encoder": text_prefixes("text_encoder", ("lora_te", "lora_te1", "oft_te"), ("clip_l", "clip_h")),
    }
    ldm_names: ClassVar[bool] = False
    guidance: ClassVar[float] = 7.5

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
                **BETAS,
                clip_sample=False,
                set_alpha_to_one=False,
                prediction_type=prediction,
                rescale_betas_zero_snr=velocity,
                timestep_spacing="trailing" if velocity else "leading",
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def layout(self, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> Layout | None:
        """Tell 1.x from 2.x by the text encoder; 2.x at 768 pixels predicts v, unless the file says otherwise."""
        first, second = FIRST_TEXT in shapes, SECOND_TEXT in shapes
        if shapes and (shapes.get(CONV_IN) != (320, 4, 3, 3) or first == second):
            return None
        # Of the two 2.x bases only the smaller, 512 pixels, predicts epsilon; it was saved at this step.
        guess = "v" if second and metadata.get("global_step") != "875000" else "epsilon"
        velocity = metadata.get("modelspec.prediction_type", guess).startswith("v")
        noise = {"prediction_type": "v_prediction" if velocity else "epsilon"}
        vae = {**VAE, "scaling_factor": 0.18215}
        scheduler = ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, **noise})
        if not second:
            return Layout(UNET, vae, {"text_encoder": ("CLIPTextModel", CLIP_L)}, scheduler)
        unet = {**UNET, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
        unet |= {"sample_size": 96 if velocity else 64, "upcast_attention": True}
        return Layout(unet, vae, {"text_encoder": ("CLIPTextModel", CLIP_H)}, scheduler, {"text_encoder": "!"})

    def editions(self) -> Mapping[str, Callable[[], Mapping[str, nn.Module]]]:
        """Stable Diffusion 1.x and 2.x."""
        return {"sd1": self.published, "sd2": lambda: self.built({CONV_IN: (320, 4, 3, 3), SECOND_TEXT: ()})}

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

    def encode_prompt(self, base: Base, prompts: Sequence[str], syntax: bool = False) -> Condition:
        """Encode prompts to `hidden` (B, T, D)."""
        pipe = cast(Any, base.pipe)
        return Condition(encode(pipe.tokenizer, pipe.text_encoder, prompts, last_state, syntax)[0])
