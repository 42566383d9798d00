"""What every scorer promises, parametrised over the table; and that only whole models without code of their own are read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.scorer_makers import model_of, subject
from vgm_peft.errors import BaseModelError, ConfigError, VgmError
from vgm_peft.score import Scorer, Scores, distance
from vgm_peft.scores import TABLE, scorer_named
from vgm_peft.scores.clip import ClipScorer
from vgm_peft.toybox.scorer import wanted

ROBOT, DUCK = "a robot on grass", "a duck in the sky"


@pytest.fixture(scope="module", params=sorted(TABLE))
def scorer(request: pytest.FixtureRequest) -> Scorer:
    return scorer_named(request.param).load(model_of(request.param))


def test_a_scorer_is_what_its_line_says_and_scores_between_0_and_1(scorer: Scorer) -> None:
    assert type(scorer) is scorer_named(scorer.name) and len(scorer.digest) == 64
    robots = subject("robot")
    odd = [Image.new("RGB", (31, 90), "red"), *robots[:2]]  # of any sizes
    for of in ("subject", "style"):
        like = scorer.likeness(odd, robots, of)
        assert like.shape == (3,) and bool(((like >= 0) & (like <= 1)).all())
        assert torch.equal(like, scorer.likeness(odd, robots, of))
    shown = scorer.agreement(odd, [ROBOT, DUCK, ROBOT])
    assert shown is None or shown.shape == (3,) and bool(((shown >= 0) & (shown <= 1)).all())


def test_nothing_is_more_like_a_picture_than_that_picture(scorer: Scorer) -> None:
    robot, duck = subject("robot")[:1], subject("duck")[:1]
    itself, another = (float(scorer.likeness(one, robot, "subject")) for one in (robot, duck))
    assert itself == pytest.approx(1.0) and another < itself - 1e-3


def test_a_scorer_loaded_again_is_the_same(scorer: Scorer) -> None:
    torch.manual_seed(11)
    again = scorer_named(scorer.name).load(model_of(scorer.name))
    assert again.digest == scorer.digest
    robots = subject("robot")
    assert torch.equal(again.likeness(robots, robots, "subject"), scorer.likeness(robots, robots, "subject"))


def test_the_oracles_read_what_a_prompt_names() -> None:
    oracles = scorer_named("oracles").load("")
    assert wanted("a photo of a Robot at night") == {"class": 0, "background": 3}
    assert wanted("a red duck on the left and a blue car on the right") == {}
    robots = subject("robot")
    right, wrong = (oracles.agreement(robots, [f"a {kind}"] * len(robots)) for kind in ("robot", "duck"))
    assert right is not None and wrong is not None and right.mean() > 0.8 > 0.2 > wrong.mean()
    with pytest.raises(ConfigError, match='"a thing" names nothing'):
        oracles.agreement(robots[:1], ["a thing"])


def test_clip_sees_and_reads_as_transformers_does(tmp_path: Path) -> None:
    """Against its own processor and its own forward, for pictures of odd sizes."""
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    shutil.copytree(model_of("clip"), tmp_path, dirs_exist_ok=True)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    chance = np.random.default_rng(0)
    pictures = [Image.fromarray(chance.integers(0, 255, (*s, 3), dtype=np.uint8)) for s in ((64, 64), (48, 97), (91, 33))]
    pixels = torch.cat([processor(images=[p], return_tensors="pt")["pixel_values"] for p in pictures])
    ours = ClipScorer.load(str(tmp_path))
    assert torch.equal(ours.lens(pictures), pixels)
    texts = [ROBOT, DUCK, "a mug"]
    tokens = CLIPTokenizer.from_pretrained(tmp_path)(texts, padding=True, return_tensors="pt")
    model = CLIPModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        out = model(pixel_values=pixels, **tokens)
    cosines = (out.image_embeds * out.text_embeds).sum(-1)
    torch.testing.assert_close(ours.agreement(pictures, texts), (2.5 * cosines).clamp(0, 1))
    torch.testing.assert_close(ours.likeness(pictures, pictures[:2], "subject"), _cosines(out.image_embeds))


def _cosines(embeds: torch.Tensor) -> torch.Tensor:
    return (embeds @ embeds[:2].T).mean(1).clamp(0, 1)


def _other_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "clip_vision_model"}))


def _code(folder: Path) -> None:
    (folder / "modeling_own.py").write_text("")


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _part(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("visual_projection.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _cut(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def _lens(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text('{"size": "large"}')


def _other_lens(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text('{"size": 48, "crop_size": 40}')


def _wordless(folder: Path) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)


BAD: dict[Callable[[Path], None], str] = {
    _other_kind: "a model of type 'clip_vision_model'; expected clip",
    _code: "code in a model's folder is never run",
    _pickle: "pickle",
    _part: "1 tensors of CLIPModel are missing .first: visual_projection.weight",
    _cut: "cannot be loaded",
    _lens: "cannot be made sense of",
    _other_lens: "do not fit",
    _wordless: "no CLIP tokenizer",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__.strip("_"))
def test_a_model_of_another_kind_or_in_part_is_refused(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    shutil.copytree(model_of("clip"), tmp_path, dirs_exist_ok=True)
    spoil(tmp_path)
    with pytest.raises(BaseModelError, match=BAD[spoil]):
        ClipScorer.load(str(tmp_path))


def test_no_model_is_told_from_one_that_is_not_there(tmp_path: Path) -> None:
    for model, error in (
        ("", "no model is named to score by clip"),
        (str(tmp_path / "none"), "no such folder"),
        ("someone/clip", "someone/clip: neither in the local cache nor reachable"),
    ):
        with pytest.raises(VgmError, match=error):
            ClipScorer.load(model)
    with pytest.raises(ConfigError, match='unknown scorer "clop"; did you mean "clip"'):
        scorer_named("clop")


def test_the_total_is_high_only_where_both_are() -> None:
    assert Scores(1.0, 0.0).total == Scores(0.0, 1.0).total == Scores(0.0, 0.0).total == 0.0
    assert Scores(0.6, 0.6).total == pytest.approx(0.6) and Scores(0.9, 0.3).total < 0.6
    assert Scores(0.7).total == 0.7 and Scores(0.6, 0.6, drift=0.9).total == Scores(0.6, 0.6).total
    black, white = torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.full((2, 4, 4, 3), 255, dtype=torch.uint8)
    assert distance(black, white) == 1.0 and distance(white, white) == 0.0
