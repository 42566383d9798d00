"""Folders with a folder of peft's for every part are one delta, for reading, for the verbs, and for drawing."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.formats.ground import assert_same_change, make_delta, make_word
from vgm_peft import formats
from vgm_peft.cli import main
from vgm_peft.delta import Delta
from vgm_peft.errors import DeltaError
from vgm_peft.family import Base
from vgm_peft.formats.export import export

peft: Any = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
Make = Callable[[str], Base]


def both(base: Base) -> Delta:
    """A change of the U-Net and of every text encoder, and two tokens."""
    delta = make_delta(base, "lora", ("unet.mid_block.*.to_k",), rank=2)
    for part in base.family.parts[1:]:
        delta.patches |= make_delta(base, "hra", (f"{part}.*.q_proj",), rank=2).patches
    delta.words |= {token: make_word(base, token, 2) for token in ("<toy>", "<cup>")}
    return delta


@pytest.mark.parametrize("family", ("sd15", "sdxl"))
def test_what_is_exported_is_read_as_one(shared: Make, family: str, tmp_path: Path) -> None:
    base = shared(family)
    delta = both(base)
    export(delta, tmp_path / "me", "peft", base)
    found = formats.read(tmp_path / "me", base)
    assert_same_change(found, delta, base)
    assert set(found.words) == set(delta.words)
    assert all(torch.equal(found.words[t].rows[p], rows) for t, word in delta.words.items() for p, rows in word.rows.items())
    assert formats.sniff(tmp_path / "me") == "peft"


def test_the_parts_tell_the_family_together(shared: Make, tmp_path: Path) -> None:
    """The smaller text encoder of SDXL is that of SD1.5, which alone it would be read as."""
    base = shared("sdxl")
    delta = make_delta(base, "lora", ("unet.down_blocks.2.*.to_k", "text_encoder.*.q_proj"), rank=2)
    export(delta, tmp_path / "me", "peft", base)
    assert formats.read(tmp_path / "me" / "text_encoder").family == "sd15"
    found = formats.read(tmp_path / "me")
    assert found.family == "sdxl" and set(found.patches) == set(delta.patches)


def test_what_peft_saved_by_part_is_read_as_one(shared: Make, tmp_path: Path) -> None:
    base = shared("sd15")
    expected: dict[str, torch.Tensor] = {}
    for part, target in {"unet": "to_q", "text_encoder": "q_proj"}.items():
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[target], init_lora_weights=False)
        model = peft.get_peft_model(copy.deepcopy(base.parts[part]), config)
        model.save_pretrained(tmp_path / part)
        before = base.parts[part].state_dict()
        for name, after in model.merge_and_unload().state_dict().items():
            if name.endswith(f"{target}.weight"):
                expected[f"{part}.{name.removeprefix('text_model.')}"] = after - before[name]
    delta = formats.read(tmp_path, base)
    assert set(delta.patches) == set(expected)
    for name, patch in delta.patches.items():
        assert torch.allclose(patch.change(torch.zeros(patch.site.shape)), expected[name], atol=1e-6)


def test_what_does_not_belong_there_is_named(shared: Make, tmp_path: Path) -> None:
    base = shared("sd15")
    export(both(base), tmp_path / "me", "peft", base)
    (tmp_path / "me" / "unet" / "README.md").write_text("as peft does")
    formats.read(tmp_path / "me", base)
    (tmp_path / "me" / "optimizer.pt").write_bytes(b"x")
    (tmp_path / "me" / "vae").mkdir()
    (tmp_path / "me" / "unet" / "adapter_model.bin").write_bytes(b"x")
    save_file({"unet.x.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "me" / "more.safetensors")
    names = "'more.safetensors', 'optimizer.pt', 'vae'"
    with pytest.raises(DeltaError, match=f"4 entries are neither a part's adapter nor a trained token .*{names}"):
        formats.read(tmp_path / "me", base)


def test_a_part_without_its_configuration_and_a_token_told_twice_are_refused(shared: Make, tmp_path: Path) -> None:
    base = shared("sd15")
    export(both(base), tmp_path / "me", "peft", base)
    (token,) = [file for file in (tmp_path / "me").glob("*.safetensors") if file.stem == "toy"]
    (tmp_path / "me" / "copy.safetensors").write_bytes(token.read_bytes())
    with pytest.raises(DeltaError, match="a second file for the token '<toy>'"):
        formats.read(tmp_path / "me", base)
    (tmp_path / "me" / "copy.safetensors").unlink()
    (tmp_path / "me" / "unet" / "adapter_config.json").unlink()
    with pytest.raises(DeltaError, match="alpha is in its adapter_config.json"):
        formats.read(tmp_path / "me", base)


def test_the_verbs_take_it(shared: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = shared("sd15")
    delta = make_delta(base, "lora", ("unet.mid_block.*.to_k", "text_encoder.*.q_proj"), rank=2)
    delta.words["<toy>"] = make_word(base, "<toy>", 2)
    export(delta, tmp_path / "me", "peft", base)
    folder, one = str(tmp_path / "me"), str(tmp_path / "one.safetensors")
    assert main("delta", ["verify", folder]) == 0
    assert main("delta", ["inspect", folder]) == 0
    told = capsys.readouterr().out
    assert "me: LoRA of peft" in told and re.search("parts +text_encoder 2, unet 2|parts +unet 2, text_encoder 2", told)
    assert main("delta", ["convert", folder, "-o", one]) == 0
    assert_same_change(formats.read(one), delta, base)
    assert main("delta", ["merge", folder, one, "-o", str(tmp_path / "both.safetensors"), "--for", "native"]) == 0
    assert main("delta", ["export", folder, "--for", "comfyui", "-o", str(tmp_path / "ui.safetensors")]) == 0


def test_pictures_are_drawn_with_it_and_a_changed_configuration_is_noticed(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny("sd15")
    base.pipe.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    delta = make_delta(base, "lora", ("unet.mid_block.*.to_k", "text_encoder.*.q_proj"), rank=2)
    export(delta, "me", "peft", base)
    formats.write(delta, "one.safetensors")
    for name in ("me", "one.safetensors"):
        told = ["--prompt", "a toy", "--delta", f"{name}:0.8", "--steps", "2", "--seed", "3", "--output", f"{name[:3]}.png"]
        assert main("generate", ["--base", "base", *told]) == 0
    assert main("generate", ["--stack", "me.png", "--base", "base", "--output", "again.png"]) == 0
    pictures = [torch.from_numpy(numpy.array(Image.open(name))).int() for name in ("me.png", "again.png", "one.png")]
    assert torch.equal(pictures[0], pictures[1])
    assert int((pictures[0] - pictures[2]).abs().max()) <= 1
    config = Path("me/unet/adapter_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 7}))
    assert main("generate", ["--stack", "me.png", "--base", "base", "--output", "again.png"]) == 2
    assert re.search(r'"me": .*has other bytes', capsys.readouterr().err)
