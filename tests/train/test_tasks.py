"""Contract of the tasks table: every task trains on every family and writes what stock diffusers reads."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, tiny_base
from diffusers import ControlNetModel

from vgm_peft.families import family_named
from vgm_peft.formats import read
from vgm_peft.train import train
from vgm_peft.train.config import RunConfig
from vgm_peft.train.tasks import TABLE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", TABLE)
def test_trains_and_writes(task: str, family: str, config: Callable[..., RunConfig]) -> None:
    base = tiny_base(family)
    exports = ["diffusers"] if TABLE[task].trains_delta else ["embedding"] if "inversion" in task else []
    before = {name: t.clone() for name, t in base.denoiser.state_dict().items()}
    result = train(config(task, "run", {"exports": exports, "preview": {"count": 1}}), base=base)

    assert result.finished and result.steps == 4 and result.delta is not None
    after = base.denoiser.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert not any(m._forward_hooks for part in base.parts.values() for m in part.modules())
    assert len(result.samples) == 1 and result.samples[0].is_file()
    assert len((result.folder / "metrics.jsonl").read_text().splitlines()) == 4
    assert list((result.folder / "tb").iterdir())
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["data"]["pictures"] == 3 and manifest["trained"]["parameters"] > 0 and manifest["result"]
    _reads_elsewhere(result.folder, result.delta, family)


def _reads_elsewhere(folder: Path, result: Path, family: str) -> None:
    if result.is_dir():
        network = ControlNetModel.from_pretrained(result)
        assert any(bool(p.any()) for name, p in network.named_parameters() if name.startswith("controlnet_down_blocks"))
        return
    delta = read(result, tiny_base(family))
    pipe = family_named(family).tiny()
    if delta.words:
        files = sorted((folder / "exports").iterdir())
        assert files
        for number, part in enumerate(sorted(next(iter(delta.words.values())).rows)):
            file = next(f for f in files if part in f.name) if len(files) > 1 else files[0]
            suffix = part.removeprefix("text_encoder")
            tokenizer, encoder = getattr(pipe, f"tokenizer{suffix}"), getattr(pipe, part)
            pipe.load_textual_inversion(str(file), token=None, tokenizer=tokenizer, text_encoder=encoder)
            assert "<new>" in tokenizer.get_vocab(), number
        return
    pipe.load_lora_weights(folder / "exports", weight_name="diffusers.safetensors")
    assert pipe.get_list_adapters()["unet"]
