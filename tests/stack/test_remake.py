"""`vgm-generate --from`: the same bytes again, from files found by what is in them; what differs is named."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vgm_peft
from tests.contract.ground import base_of
from tests.contract.test_sides import trained
from tests.stack_makers import make_delta
from vgm_peft.cli import main
from vgm_peft.families import TABLE as FAMILIES
from vgm_peft.picture import read_stack
from vgm_peft.sides import side_named
from vgm_peft.stack import ControlUse, DeltaUse, Region, Stack


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, deltas in three spellings, a side network, pictures, and a stack of all of them."""
    folder, base = tmp_path_factory.mktemp("home"), base_of("sd15")
    FAMILIES["sd15"].tiny().save_pretrained(folder / "bases" / "mine")
    for seed, (kind, spelling) in enumerate((("krona", "native"), ("lora", "kohya"), ("dora", "peft"))):
        vgm_peft.write(make_delta(base, kind, seed), folder / kind / "delta.safetensors", spelling, base)
    side_named("controlnet").save(trained("controlnet", "sd15"), folder / "nets" / "edges")
    for number, name in enumerate(("seen.png", "mask.png")):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (64, 64, 3), "uint8")).save(folder / name)
    stack = Stack(
        base="bases/mine", prompt="a toy", negative="red", steps=3, guidance=3.0, scheduler="euler_a", seed=5,
        deltas=(
            DeltaUse(file="krona/delta.safetensors", strength=0.7, end=0.67),
            DeltaUse(file="lora/delta.safetensors", strength=0.4, blocks={"unet.up_blocks.*": 0.5, "unet.*": 1.5}),
            DeltaUse(file="dora/delta.safetensors", strength=-0.3, schedule=(0.5, 1.0)),
            DeltaUse(file="krona/delta.safetensors", strength=0.3, region="left"),
        ),
        controls=(ControlUse(network="nets/edges", image="seen.png", strength=0.5, start=0.3),),
        regions=(Region(name="left", prompt="a car", mask="mask.png"),),
    )  # fmt: skip
    (folder / "stack.toml").write_text(stack.toml(), encoding="utf-8")
    return folder


def test_a_picture_is_made_again_byte_for_byte(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main("generate", ["--stack", str(home / "stack.toml"), "--output", "first.png"]) == 0
    first = (tmp_path / "first.png").read_bytes()
    carried = read_stack(tmp_path / "first.png")
    assert carried.base == "mine" and len(carried.deltas) == 4 and carried.regions[0].mask_digest
    assert str(home).encode() not in first
    again = ["--from", "first.png", "--output", "again.png"]
    assert main("generate", [*again, "--library", str(home)]) == 0
    assert "byte for byte" in capsys.readouterr().out
    assert (tmp_path / "again.png").read_bytes() == first

    # Elsewhere and under another name: where a file lies decides nothing, not even the order in which floats are added.
    moved = shutil.copytree(home, tmp_path / "elsewhere")
    (moved / "krona").rename(moved / "zoo")
    assert main("generate", [*again, "--library", str(moved)]) == 0
    assert "pixel for pixel" in capsys.readouterr().out

    (moved / "seen.png").write_bytes((home / "mask.png").read_bytes())
    assert main("generate", [*again, "--library", str(moved)]) == 2
    assert '"seen.png": ' in (said := capsys.readouterr().err) and "has other bytes" in said
    FAMILIES["sd15"].tiny(seed=1).save_pretrained(moved / "other")
    assert main("generate", [*again, "--library", str(home), "--base", str(moved / "other")]) == 2
    assert "its weights are not those the stack was made with" in capsys.readouterr().err
    assert main("generate", [*again, "--library", "nowhere"]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--steps", "3"], ["--delta", "a"], ["--image-prompt", "a:b"], ["--stack", "x.toml"]])
def test_nothing_is_mixed_with_a_picture_that_is_made_again(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main("generate", ["--from", "me.png", *more]) == 2
    assert f"--from with {more[0]}" in capsys.readouterr().err
    assert main("generate", ["--library", "."]) == 2
    assert "--library without --from" in capsys.readouterr().err
