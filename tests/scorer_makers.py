"""Tiny feature networks of the real classes, with random weights, in folders as the hub has them."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from PIL import Image

from vgm_peft.families import toybox_folder

SUBJECTS = Path(__file__).parents[1] / "assets" / "subjects"
LAYERS = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
EYE = {"image_size": 32, "patch_size": 8}


@cache
def model_of(name: str) -> str:
    """What `scores.model` is to be for a scorer of the table; made once, so never to be written to."""
    if name == "oracles":
        return ""
    folder = Path(mkdtemp(prefix=f"tiny-{name}-"))
    {"clip": write_clip, "dino": write_dino}[name](folder)
    return str(folder)


def write_clip(folder: Path) -> None:
    """A CLIP with the Toybox's tokenizer."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    words = CLIPTokenizer.from_pretrained(toybox_folder() / "tokenizer")
    special = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    text = {**LAYERS, "vocab_size": len(words), "max_position_embeddings": 77, **special}
    torch.manual_seed(3)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**LAYERS, **EYE}, projection_dim=12))
    with torch.no_grad():
        for parameter in model.parameters():  # as they are made, all pictures look alike to them
            parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def write_dino(folder: Path) -> None:
    """A DINOv2."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(3)
    layers = {k: v for k, v in LAYERS.items() if k != "intermediate_size"}
    Dinov2Model(Dinov2Config(**layers, **EYE, mlp_ratio=2)).save_pretrained(folder)


def subject(name: str) -> list[Image.Image]:
    """The pictures of one of the Toybox's subjects."""
    return [Image.open(path).convert("RGB") for path in sorted((SUBJECTS / name).glob("*.png"))]
