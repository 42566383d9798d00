"""The Toybox base on disk: a plain `StableDiffusionPipeline` folder in half precision, written whole or not at all."""

import json
import shutil
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from vgm_peft.families.bases import SAMPLING
from vgm_peft.toybox.nets import assemble, half_copy
from vgm_peft.toybox.state import replace_folder

GUIDANCE = 2.0
"""At which it draws best (measured: see its card); more makes colours harsh, toys less themselves and grounds blotchy."""
SHARD = "15MB"
"""No file of the folder may be larger than 16 MiB."""


def write_pipeline(
    folder: Path,
    vae: AutoencoderKL,
    text: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    card: str | None = None,
) -> None:
    """Write the folder aside in half precision and move it into place; `card` becomes its README.md.

    Without `card` an older README.md stays. The text model stays in single precision (3 MB): transformers loads the
    precision it finds and diffusers loads single precision, and in a pipeline loaded without a dtype the two must agree.
    """
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    half = assemble(half_copy(vae), text, tokenizer, half_copy(unet))
    half.save_pretrained(aside, safe_serialization=True, max_shard_size=SHARD)
    (aside / SAMPLING).write_text(json.dumps({"guidance": GUIDANCE}) + "\n", encoding="utf-8")
    readme = folder / "README.md"
    if card is None and readme.exists():
        card = readme.read_text(encoding="utf-8")
    if card is not None:
        (aside / "README.md").write_text(card, encoding="utf-8")
    replace_folder(aside, folder)
