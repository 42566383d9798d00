"""The image encoder of the embedded base: trained by its command, a component that stock diffusers loads with the base."""

import json
from pathlib import Path
from typing import Any

import torch

from vgm_peft.families import TABLE, load
from vgm_peft.sides.image_encoder import find_eye
from vgm_peft.toybox.eye_train import CARD, EyeSettings, train_eye
from vgm_peft.toybox.oracle_net import HEADS

SMALL = EyeSettings(pictures=16, families=2, steps=2, batch=8, fitted=40, asked=20, sights=1)


def test_trains_and_stands_in_a_bases_folder(tmp_path: Path) -> None:
    import diffusers

    pipe = TABLE["sd15"].tiny()
    pipe.save_pretrained(tmp_path / "base")
    folder, before = tmp_path / "base" / "image_encoder", load(tmp_path / "base").digest
    for place in (folder, tmp_path / "alone"):
        train_eye(place, SMALL, tell=lambda _: None)
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "alone" / "model.safetensors").read_bytes()
    card = json.loads((folder / CARD).read_text())
    assert set(card["embedding"]) == set(card["hidden_states"]) == set(HEADS) and 0.0 <= card["subject"] <= 1.0

    stock: Any = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "base", safety_checker=None)
    base = load(tmp_path / "base")
    assert base.digest == before, "a base is what it was"
    picture = torch.rand(1, 3, 80, 64, generator=torch.Generator().manual_seed(0))
    eye = find_eye(base)
    assert eye.need.embeds == 64 and torch.equal(
        eye.embeds(picture), stock.image_encoder.float()(eye.pixels(picture)).image_embeds
    )
