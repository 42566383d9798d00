"""What steers a run's pictures: beside them, computed from them once, or the pictures themselves."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from tests.train.ground import picture, tiny_base
from vgm_peft.annotate import Annotator, open_annotator, plain
from vgm_peft.data import Cache, load_pixels, plan_crops, scan
from vgm_peft.errors import ConfigError, DataError
from vgm_peft.train import train
from vgm_peft.train.config import RunConfig, bind
from vgm_peft.train.controls import Controls, annotated
from vgm_peft.train.pictures import Pictures
from vgm_peft.train.recipes import portable
from vgm_peft.train.task import Setup, Turn


@pytest.fixture
def plain_pictures(tmp_path: Path) -> Path:
    for number in range(3):
        picture(tmp_path / "plain" / f"{number}.png", number)
        (tmp_path / "plain" / f"{number}.txt").write_text(f"a robot, picture {number}")
    return tmp_path / "plain"


def test_a_control_picture_is_computed_once_of_what_is_shown(plain_pictures: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, ...]] = []

    def draw(pixels: plain.Pixels) -> plain.Pixels:
        calls.append(pixels.shape)
        return plain.canny(pixels)

    example, other = scan(plain_pictures).examples[:2]
    crop, small = plan_crops([(64, 64)], 64, 8)[0], plan_crops([(64, 64)], 32, 8)[0]
    counted, cache = Annotator("canny", "1", draw), Cache(tmp_path / "cache")
    found = annotated(example, crop, counted, cache)
    assert torch.equal(found.permute(1, 2, 0), torch.from_numpy(plain.canny(np.array(Image.open(example.path)))))
    assert torch.equal(annotated(example, crop, counted, Cache(tmp_path / "cache")), found) and len(calls) == 1
    assert annotated(example, small, counted, cache).shape == (3, 32, 32) and calls[-1] == (32, 32, 3)
    assert not torch.equal(annotated(other, crop, counted, cache), found)
    annotated(example, crop, Annotator("canny", "2", draw), cache)  # another version of it
    annotated(example, crop, Annotator("grey", "1", draw), cache)
    assert len(calls) == 5


@pytest.mark.parametrize("annotator", ("", "grey"))
def test_what_steers_is_cut_and_mirrored_like_its_picture(
    annotator: str, config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Control pictures of twice the size, and computed ones; the pictures are cut at several places."""
    for number in range(2):
        made = Image.open(picture(tmp_path / "set" / f"{number}.png", number, 96, 80))
        (tmp_path / "set" / "control").mkdir(exist_ok=True)
        if not annotator:
            made.resize((192, 160), Image.Resampling.NEAREST).save(tmp_path / "set" / "control" / f"{number}.png")
    data = {"images": str(tmp_path / "set"), "annotator": annotator, "flip": True, "crops": 3, "zoom": 1.2}
    with ExitStack() as cleanup:
        setup = Setup(config("controlnet", "run", {"data": data}), tiny_base("sd15"), Cache(), Accelerator(), cleanup)
        pictures = Pictures(setup.report.examples, setup)
        controls = Controls(pictures, True, setup)
        cuts = {cut for number in range(12) for cut in pictures.draw(Turn(0, number)).cuts}
    assert {cut.flip for cut in cuts} == {True, False} and len({cut.crop for cut in cuts}) > 2
    for cut in cuts:
        shown = (load_pixels(pictures.examples[cut.example], cut.crop, cut.flip) + 1.0) * 127.5
        if annotator:
            wanted = torch.from_numpy(plain.grey(shown.round().byte().permute(1, 2, 0).numpy())).permute(2, 0, 1)
            assert torch.equal(controls(cut), wanted)
        else:
            other = (load_pixels(pictures.examples[cut.example], cut.crop, not cut.flip) + 1.0) * 127.5
            found = controls(cut).float()
            assert (found - shown).abs().mean() < 0.5 * (found - other).abs().mean()


def test_the_same_control_pictures_beside_the_pictures_train_the_same(
    plain_pictures: Path, config: Callable[..., RunConfig]
) -> None:
    """Mirrored ones too: a control picture is mirrored with its picture, whichever way it came."""
    own = {"data": {"images": str(plain_pictures), "flip": True}}
    computed = train(config("controlnet", "computed", {"data": {**own["data"], "annotator": "grey"}}), base=tiny_base("sd15"))
    manifest = json.loads((computed.folder / "manifest.json").read_text())
    assert manifest["data"]["annotator"] == f"grey {open_annotator('grey').identity}"
    for name in ("data.json", "data.md"):
        assert "control pictures are computed from the pictures: grey" in (computed.folder / name).read_text()
    for path in sorted(plain_pictures.glob("*.png")):
        (plain_pictures / "control").mkdir(exist_ok=True)
        Image.fromarray(plain.grey(np.array(Image.open(path)))).save(plain_pictures / "control" / path.name)
    beside = train(config("controlnet", "beside", own), base=tiny_base("sd15"))
    first, second = (r.folder / "controlnet/diffusion_pytorch_model.safetensors" for r in (computed, beside))
    assert first.read_bytes() == second.read_bytes()


def test_several_annotators_are_the_conditions_of_one_network(plain_pictures: Path, config: Callable[..., RunConfig]) -> None:
    """In their order, each cached by itself; a run keeps some of them from the network by chance, always the same way."""
    data = {"images": str(plain_pictures), "annotator": "grey,tile", "flip": True}
    asked = config("uni-controlnet", "run", {"data": data, "task": {"conditions": 2}})
    with ExitStack() as cleanup:
        setup = Setup(asked, tiny_base("sd15"), Cache(), Accelerator(), cleanup)
        task = asked.task_class().prepare(setup)
        pictures, controls = (getattr(task, name) for name in ("pictures", "controls"))
        for cut in {cut for number in range(8) for cut in pictures.draw(Turn(0, number)).cuts}:
            grey, tile = (
                annotated(pictures.examples[cut.example], cut.crop, open_annotator(n), Cache()) for n in ("grey", "tile")
            )
            assert torch.equal(controls(cut), torch.cat([grey, tile]).flip(-1) if cut.flip else torch.cat([grey, tile]))
        drawn = [task.batch(Turn(0, number)).control for number in range(12)]
        assert all(torch.equal(task.batch(Turn(0, number)).control, found) for number, found in enumerate(drawn))
    kept = {tuple(rows.flatten(2).any(2).any(0).tolist()) for rows in (torch.cat(drawn)[i][None] for i in range(12))}
    assert {found[::3] for found in kept} == {(True, True), (True, False), (False, True), (False, False)}
    for annotator, conditions, wanted in (("grey", 2, "2 of them"), ("grey,tile", 1, "1 of them")):
        with pytest.raises(ConfigError, match=wanted):
            wrong = config(
                "uni-controlnet", "no", {"data": {**data, "annotator": annotator}, "task": {"conditions": conditions}}
            )
            wrong.task_class().sources(wrong)
    with pytest.raises(ConfigError, match='unknown annotator "cany"'):
        bind({"task": {"name": "uni-controlnet"}, "data": {"images": "me", "annotator": "grey,cany"}})


def test_weights_in_a_folder_are_found_from_the_run_s_own(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    for weights, kept in ((str(tmp_path / "weights"), "../weights"), ("some/repository", "some/repository")):
        data = {"images": "me", "annotator": "depth", "annotator_weights": weights}
        text = portable(bind({"task": {"name": "controlnet"}, "data": data}), tmp_path / "run")
        assert f'annotator_weights = "{kept}"' in text


def test_what_cannot_be_computed_is_refused_before_a_base_is_loaded(
    plain_pictures: Path, config: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ConfigError, match='unknown annotator "cany"'):
        bind({"task": {"name": "controlnet"}, "data": {"images": "me", "annotator": "cany"}})
    with pytest.raises(ConfigError, match="data.annotator is set, but ip-adapter learns from no control pictures"):
        bind({"task": {"name": "ip-adapter"}, "data": {"images": "me", "annotator": "canny"}})
    with pytest.raises(ConfigError, match='annotator_weights = "here" without an annotator'):
        bind({"task": {"name": "controlnet"}, "data": {"images": "me", "annotator_weights": "here"}})
    with pytest.raises(DataError, match="0.png has no control picture"):
        train(config("controlnet", "run", {"data": {"images": str(plain_pictures)}}), base=tiny_base("sd15"))
