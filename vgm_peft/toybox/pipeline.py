"""The Toybox base on disk: a plain `StableDiffusionPipeline` folder in half precision, written whole or not at all."""

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from vgm_peft.toybox.state import replace_folder
from vgm_peft.toybox.unet import make_scheduler

SHARD = "15MB"
"""No file of the folder may be larger than 16 MiB."""


def assemble(
    vae: AutoencoderKL, text: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """Put the parts together as the pipeline that users load."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write_pipeline(pipe: StableDiffusionPipeline, folder: Path, card: str | None = None) -> None:
    """Write the folder aside in half precision and move it into place; `card` becomes its README.md.

    The text model stays in single precision (3 MB): transformers loads the precision it finds and diffusers loads
    single precision, and in a pipeline loaded without a dtype the two must agree. The parts given are not changed.
    """
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    vae, unet = AutoencoderKL.from_config(pipe.vae.config), UNet2DConditionModel.from_config(pipe.unet.config)
    vae.load_state_dict(pipe.vae.state_dict())
    unet.load_state_dict(pipe.unet.state_dict())
    half = assemble(vae.to(torch.float16), pipe.text_encoder, pipe.tokenizer, unet.to(torch.float16))
    half.save_pretrained(aside, safe_serialization=True, max_shard_size=SHARD)
    if card is None and (folder / "README.md").exists():
        card = (folder / "README.md").read_text()
    if card is not None:
        (aside / "README.md").write_text(card)
    replace_folder(aside, folder)


def load_pipeline(folder: Path, device: str = "cpu") -> StableDiffusionPipeline:
    """Load the folder in single precision, silent."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
