"""The yardsticks measure: on fresh renders they are right, and what is different they tell apart."""

import random
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from vgm_peft.errors import BaseModelError, DataError
from vgm_peft.toybox.evaluate import Sampling, closed, measure_prompts, measure_subject, sample
from vgm_peft.toybox.oracle import Oracles, as_tensor
from vgm_peft.toybox.oracle_card import identity_separation, reading_accuracy, worn_bytes
from vgm_peft.toybox.oracle_data import controls_of, reader_labels
from vgm_peft.toybox.render import render
from vgm_peft.toybox.world import (
    BACKGROUND_PHRASES,
    SUBJECTS,
    Scene,
    draw_scene,
    heldout_prompts,
    style_scenes,
    subject_scenes,
)


@cache
def oracles() -> Oracles:
    return Oracles.load()


@cache
def fresh() -> tuple[Tensor, Tensor]:
    scenes = [p.scene for p in heldout_prompts(300, seed=424242)]
    return render(scenes).image, torch.tensor([reader_labels(scene) for scene in scenes])


def test_the_reader_is_right_on_fresh_renders() -> None:
    right = reading_accuracy(oracles(), *fresh())
    for name in ("class", "colour", "background", "position"):
        assert right[name] >= 0.98, right
    assert right["style"] >= 0.98


def test_the_reader_bears_wear() -> None:
    images, labels = fresh()
    right = reading_accuracy(oracles(), worn_bytes(images, 3), labels)
    for name in ("class", "colour", "background", "position"):
        assert right[name] >= 0.95, right


def test_reading_gives_words_and_probabilities() -> None:
    images = fresh()[0][:4]
    reading = oracles().read(images)
    assert torch.allclose(reading.probabilities["class"].sum(1), torch.ones(4))
    assert reading.words("class")[0] == heldout_prompts(1, seed=424242)[0].scene.toys[0].kind
    pictures = [Image.fromarray(image.numpy()) for image in images]
    assert torch.equal(oracles().read(pictures).labels["colour"], reading.labels["colour"])


def test_identity_tells_subjects_from_toys_of_their_class() -> None:
    found = identity_separation(oracles(), wear=False, count=8)
    assert found["same"] > 0.75
    assert found["plain_toy_of_the_class"] < 0.25 and found["another_subject"] < 0.25
    assert found["auc"] > 0.97


def test_styles_are_recognised() -> None:
    for style in ("toon", "sketch", "blueprint", "pixel"):
        seen = oracles().style(render(style_scenes(style, 12, seed=77)).image)
        assert sum(s == style for s in seen) >= 11


def test_agreement_prefers_the_picture_of_the_control() -> None:
    rng = random.Random(31)
    drawn = render([draw_scene(rng) for _ in range(24)])
    wanted = controls_of(drawn)
    right, wrong = oracles().agreement(drawn.image, wanted), oracles().agreement(drawn.image, wanted.roll(1, 0))
    assert float(right.mask.mean()) > 0.7 > 0.5 > float(wrong.mask.mean())
    assert float(right.depth.mean()) > 0.9 and float(right.edges.mean()) > float(wrong.edges.mean()) + 0.2


def test_bad_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="uint8"):
        as_tensor(torch.zeros(1, 64, 64, 3))
    with pytest.raises(DataError, match="different sizes"):
        as_tensor([Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))])
    with pytest.raises(BaseModelError, match="no oracles"):
        Oracles.load(tmp_path)


class Perfect:
    """A "pipeline" that renders what the prompt says: the upper end of every measure."""

    def __init__(self, subject: str | None = None) -> None:
        self.subject = subject

    def __call__(self, *, prompt: list[str], **options: object) -> object:
        generators = options["generator"]
        assert isinstance(generators, list) and len(generators) == len(prompt)
        image = render([self._scene(text, i) for i, text in enumerate(prompt)]).image

        class Result:
            images = image.numpy() / 255.0

        return Result()

    def _scene(self, text: str, index: int) -> Scene:
        known = {p.text: p.scene for p in heldout_prompts(24, 0)}
        if text in known:
            return known[text]
        place = next(k for k, phrase in BACKGROUND_PHRASES.items() if text.endswith(phrase))
        if "sks" in text and self.subject:
            return subject_scenes(self.subject, 1, seed=index, backgrounds=(place,))[0]
        word = text.removeprefix("a photo of ").split()[1]
        return draw_scene(random.Random(index), kind=word, background=place, toys=1, plain=True)


def test_a_perfect_pipeline_scores_full_marks() -> None:
    found = measure_prompts(Perfect(), heldout_prompts(24, 0), Sampling(batch=16), oracles())
    assert found.count == 24
    assert min(v for k, v in asdict(found).items() if k != "count") >= 0.95


def test_subject_measures_tell_base_from_delta() -> None:
    subject = SUBJECTS[0]
    base = measure_subject(Perfect(), subject, f"sks {subject.class_word}", Sampling(), oracles(), count=12)
    tuned = measure_subject(Perfect(subject.name), subject, f"sks {subject.class_word}", Sampling(), oracles(), count=12)
    assert closed(base, tuned) > 0.8
    assert tuned.backgrounds_kept >= 0.9 and tuned.class_accuracy >= 0.9
    assert tuned.class_identity < 0.3 < tuned.identity


def test_sampling_keeps_order_and_count() -> None:
    prompts = [p.text for p in heldout_prompts(5, 0)]
    whole = sample(Perfect(), prompts, Sampling(batch=5))
    assert torch.equal(whole, sample(Perfect(), prompts, Sampling(batch=2)))
