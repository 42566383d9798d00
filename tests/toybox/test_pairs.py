"""Pairs to learn from: what steers is exact, nothing is random twice, and training takes the folder as it is."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vgm_peft.data import Source, load_control, plan_crops, scan_all
from vgm_peft.errors import DataError
from vgm_peft.toybox import pairs
from vgm_peft.toybox.__main__ import main
from vgm_peft.toybox.oracle_data import controls_of
from vgm_peft.toybox.pairs import CONTROLS, pair_scene, write_pairs
from vgm_peft.toybox.render import render
from vgm_peft.toybox.world import Scene, heldout_prompts


def pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path)))


@pytest.mark.parametrize("kind", CONTROLS)
def test_pictures_captions_and_controls_are_those_of_the_scenes(kind: str, tmp_path: Path) -> None:
    assert main(["pairs", "--kind", kind, "--count", "3", "--output", str(tmp_path / "set"), "--seed", "5"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "set/metadata.jsonl").read_text().splitlines()]
    made = [pair_scene(5, i) for i in range(3)]
    drawn = render([scene for scene, _ in made])
    for row, (_, text), image, control in zip(rows, made, drawn.image, CONTROLS[kind](drawn), strict=True):
        assert row["text"] == text
        assert torch.equal(pixels(tmp_path / "set" / row["file_name"]), image)
        assert torch.equal(pixels(tmp_path / "set" / row["control"]), control)
    again = write_pairs(tmp_path / "again", kind, 3, seed=5)
    for path in sorted((tmp_path / "set").rglob("*.*")):
        assert path.read_bytes() == (again / path.relative_to(tmp_path / "set")).read_bytes()


def test_a_control_is_what_the_oracle_is_asked_for() -> None:
    drawn = render([pair_scene(0, i)[0] for i in range(2)])
    for k, kind in enumerate(("depth", "mask", "edges")):
        assert torch.allclose(CONTROLS[kind](drawn)[..., 0] / 255.0, controls_of(drawn)[:, k], atol=0.5 / 255 + 1e-6)
    inside = drawn.mask > 0
    assert CONTROLS["normals"](drawn)[..., 2][inside].float().mean() > 180, "what is seen looks towards the camera"


def test_training_takes_the_folder_as_it_is(tmp_path: Path) -> None:
    report = scan_all([Source(folder=write_pairs(tmp_path, "mask", 4), require_controls=True)])
    assert len(report.examples) == 4 and not report.notes and not report.ignored
    control = load_control(report.examples[0], plan_crops([(64, 64)], 64, 8)[0])
    assert set(control.unique().tolist()) == {0.0, 1.0}


def test_several_kinds_lie_side_by_side_and_are_cut_and_mirrored_apart(tmp_path: Path) -> None:
    first, *others = (
        scan_all([Source(folder=write_pairs(tmp_path / kind, kind, 2), require_controls=True, conditions=kind.count(",") + 1)])
        for kind in ("mask,depth", "mask", "depth")
    )
    crop = plan_crops([(64, 64)], 32, 8)[0]
    for flip in (False, True):
        found = load_control(first.examples[0], crop, flip, count=2)
        alone = [load_control(other.examples[0], crop, flip) for other in others]
        assert found.shape == (6, 32, 32) and torch.equal(found, torch.cat(alone))
    for conditions, expected in ((1, "the same proportions"), (3, "3 of the same proportions side by side")):
        with pytest.raises(DataError, match=rf"0001\.png is 128 x 64(.|\n)*{expected}"):
            scan_all([Source(folder=tmp_path / "mask,depth", require_controls=True, conditions=conditions)])


def test_of_scenes_that_look_alike_by_chance_one_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def alike(seed: int, index: int) -> tuple[Scene, str]:
        scene, text = pair_scene(seed, 0 if index == 1 else index)
        turned = replace(scene.camera, yaw=scene.camera.yaw + 0.001)
        return (replace(scene, camera=turned) if index == 1 else scene), text

    monkeypatch.setattr(pairs, "pair_scene", alike)
    write_pairs(tmp_path, "mask", 3)
    assert torch.equal(pixels(tmp_path / "0002.png"), render([pair_scene(0, 3)[0]]).image[0])
    assert len(scan_all([Source(folder=tmp_path, require_controls=True)]).examples) == 3


def test_no_judgement_draws_a_scene_that_was_learned_from() -> None:
    learned = {pair_scene(seed, i)[0] for seed in range(3) for i in range(200)}
    assert len(learned) == 600 and not learned & {p.scene for seed in range(3) for p in heldout_prompts(200, seed)}


@pytest.mark.parametrize(
    "arguments,message",
    (
        (["--count", "0"], "at least one"),
        (["--size", "63"], "multiple of 4"),
        (["--kind", "mask,dept"], 'no control picture "dept"'),
    ),
    ids=("none", "size", "kind"),
)
def test_what_cannot_be_drawn_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pairs", "--kind", "depth", "--output", str(tmp_path / "set"), *arguments]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and message in text


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path, "depth", 3)
    before = (tmp_path / "0001.png").read_bytes()
    assert main(["pairs", "--kind", "depth", "--count", "2", "--output", str(tmp_path), "--seed", "1"]) == 2
    assert "holds 0003.png already" in capsys.readouterr().err
    assert (tmp_path / "0001.png").read_bytes() == before
