"""Contract of the tasks table: every task trains on every family and writes what stock diffusers reads."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.ground import FAMILIES, tiny_base
from vgm_peft.attachment import attachments
from vgm_peft.families import family_named
from vgm_peft.formats import read
from vgm_peft.sides import TABLE as SIDES
from vgm_peft.sides import open_side
from vgm_peft.train import train
from vgm_peft.train.config import RunConfig
from vgm_peft.train.tasks import TABLE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", TABLE)
def test_trains_and_writes(task: str, family: str, config: Callable[..., RunConfig]) -> None:
    base = tiny_base(family)
    exports = [] if task in SIDES else ["diffusers"]
    before = {name: t.clone() for name, t in base.denoiser.state_dict().items()}
    asked = config(task, "run", {"exports": exports, "preview": {"count": 1}})
    result = train(asked, base=base)

    assert result.finished and result.steps == 4 and result.delta is not None
    after = base.denoiser.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert not attachments(base.parts)
    assert not any(m._forward_hooks for m in base.denoiser.modules())
    assert len(result.samples) == 1 and result.samples[0].is_file()
    assert len((result.folder / "metrics.jsonl").read_text().splitlines()) == 4
    assert list((result.folder / "tb").iterdir())
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["data"]["pictures"] == 3 and manifest["trained"]["parameters"] > 0 and manifest["result"]
    if task in SIDES:
        side, network = open_side(result.delta, base)
        assert side is SIDES[task]
        start = side.create(base, side.Options(), asked.seed).state_dict()
        assert any(not torch.equal(v, start[k]) for k, v in network.state_dict().items())
    else:
        _reads_elsewhere(result.folder, result.delta, family)


def _reads_elsewhere(folder: Path, result: Path, family: str) -> None:
    delta = read(result, tiny_base(family))
    pipe = family_named(family).tiny()
    if delta.words:
        tensors = load_file(folder / "exports" / "diffusers.safetensors")
        names = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}  # both in one file, as SDXL embeddings are shared
        for part in next(iter(delta.words.values())).rows:
            given = tensors[names[part]] if len(tensors) > 1 else tensors
            suffix = part.removeprefix("text_encoder")
            tokenizer, encoder = getattr(pipe, f"tokenizer{suffix}"), getattr(pipe, part)
            pipe.load_textual_inversion(given, token="<new>", tokenizer=tokenizer, text_encoder=encoder)
            row = encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("<new>")]
            assert torch.equal(row, delta.words["<new>"].rows[part][0])
        return
    pipe.load_lora_weights(folder / "exports", weight_name="diffusers.safetensors")
    assert pipe.get_list_adapters()["unet"]
