"""The judgement of side networks: its ends are where they should be, and what it prints it also keeps."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from vgm_peft import families
from vgm_peft.beside import Beside
from vgm_peft.errors import ConfigError
from vgm_peft.family import Base
from vgm_peft.sides.controlnet import ControlNet
from vgm_peft.toybox.__main__ import main
from vgm_peft.toybox.evaluate import Sampling, sample
from vgm_peft.toybox.evaluate_side import IMAGE, MEASURED, Score, SideMeasure, draw, measure_side, score, set_exam
from vgm_peft.toybox.oracle import Oracles

KINDS = (*MEASURED, IMAGE)


@pytest.fixture(scope="module")
def oracles() -> Oracles:
    return Oracles.load()


@pytest.fixture(scope="module")
def base() -> Base:
    base = families.load("toybox")
    base.pipe.set_progress_bar_config(disable=True)
    return base


@pytest.mark.parametrize("kind", KINDS)
def test_real_renders_follow_and_those_of_other_scenes_do_not(kind: str, oracles: Oracles) -> None:
    exam = set_exam(kind, 40, seed=3)
    real, other = score(exam.real, exam, oracles), score(exam.real.roll(1, 0), exam, oracles)
    assert real.control > other.control + 0.1 and real.prompt > 0.95 > other.prompt + 0.5
    assert set(real.details) >= {"class", "colour", "background", "position"}


def test_prompts_say_what_they_are_judged_by() -> None:
    full, unplaced, image = set_exam("depth", 2), set_exam("depth", 2, placed=False), set_exam(IMAGE, 2)
    assert full.prompts[1].text == "a small matte orange duck on grass, on the right" and "position" in full.said
    assert unplaced.prompts[1].text == "a matte orange duck on grass" and unplaced.said == ("class", "colour", "background")
    assert image.prompts[1].text == "a photo of a duck" and image.said == ("class",)
    assert torch.equal(full.real, image.real) and torch.equal(image.shown[0, :, 5, 7] * 255, image.real[0, 5, 7].float())


def test_the_share_of_the_way() -> None:
    def at(value: float) -> Score:
        return Score(value, 1.0, {})

    assert SideMeasure("mask", 1, at(0.5), at(0.8), at(0.9)).share == 0.75
    assert SideMeasure("mask", 1, at(0.5), at(0.4), at(0.9)).share == -0.25
    assert SideMeasure("mask", 1, at(0.9), at(0.9), at(0.9)).share == 0.0


def test_with_and_without_the_network_only_the_network_differs(base: Base) -> None:
    """The second pictures come from another batch, and still of the same noise."""
    exam, how = set_exam("mask", 3), Sampling(steps=1, batch=2, seed=4)
    network = ControlNet().create(base)
    with Beside(base, ControlNet(), network) as beside:
        silent = draw(base.pipe, beside, exam, how)
        assert torch.equal(silent.controlled, silent.uncontrolled), "a fresh network adds nothing"
        with torch.no_grad():
            for block in network.controlnet_down_blocks:
                block.bias += 0.5
        heard = draw(base.pipe, beside, exam, how)
    assert torch.equal(heard.uncontrolled, silent.uncontrolled) and not torch.equal(heard.controlled, silent.controlled)
    alone = sample(base.pipe, [exam.prompts[2].text], replace(how, seed=6))
    assert (alone.int() - heard.uncontrolled[2:].int()).abs().max() <= 1


def test_a_network_is_judged_by_what_it_is_shown(base: Base, oracles: Oracles) -> None:
    with Beside(base, ControlNet(), ControlNet().create(base)) as beside:
        with pytest.raises(ConfigError, match="a controlnet judged by attribute match; .* shows it a control picture"):
            measure_side(base.pipe, beside, set_exam(IMAGE, 1), Sampling(steps=1), oracles)
    with pytest.raises(ConfigError, match='no oracle reads "normals"'):
        set_exam("normals", 1)


def test_the_command_prints_what_it_keeps(base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ControlNet().save(ControlNet().create(base), tmp_path / "net")
    arguments = ["evaluate-side", str(place), "--kind", "edges", "--count", "2", "--steps", "1", "--unplaced"]
    assert main([*arguments, "--json", "--output", str(tmp_path / "out")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path / "out/scores.json").read_text())
    assert said["share"] == 0.0 and said["controlled"] == said["uncontrolled"] and said["measure"] == "edge F1"
    with Image.open(tmp_path / "out/grid.png") as picture:
        assert picture.width > picture.height > 2 * 64
