"""Scenes are drawn and said the same everywhere, and captions tell the truth."""

import random
import subprocess
import sys

import pytest

from vgm_peft.errors import ConfigError
from vgm_peft.toybox.world import (
    BACKGROUND_PHRASES,
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    MATERIALS,
    POSITION_PHRASES,
    POSITIONS,
    SIZES,
    STYLES,
    SUBJECTS,
    TRAINING_PATTERNS,
    Scene,
    attributes,
    caption,
    draw_scene,
    heldout_prompts,
    style_scenes,
    subject_named,
    subject_scenes,
)


def drawn(count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [draw_scene(rng) for _ in range(count)]


def test_the_world_needs_no_torch() -> None:
    code = "import sys, vgm_peft.toybox.world; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_seed_draws_the_same_scenes() -> None:
    assert drawn(50, 3) == drawn(50, 3)
    assert drawn(50, 3) != drawn(50, 4)
    # Pinned: what a seed draws must never change, the base was trained on it.
    assert caption(drawn(1, 3)[0]) == "a large striped yellow snowman on sand, on the right"


def test_the_mixture_is_as_described() -> None:
    scenes = drawn(4000)
    single = [s for s in scenes if len(s.toys) == 1]
    assert 0.12 < 1 - len(single) / len(scenes) < 0.18
    unnamed = [s for s in single if attributes(s).colour == -1]
    assert 0.39 < len(unnamed) / len(single) < 0.47
    patterned = [s for s in single if s.toys[0].pattern is not None]
    assert 0.07 < len(patterned) / len(single) < 0.13
    assert {s.toys[0].pattern.kind for s in patterned if s.toys[0].pattern} == set(TRAINING_PATTERNS)


def test_captions_say_what_is_there() -> None:
    for scene in drawn(300):
        text = caption(scene)
        assert BACKGROUND_PHRASES[scene.background] in text
        for toy in scene.toys:
            assert toy.kind in text
            assert POSITION_PHRASES[toy.position] in text
            if toy.colour_word:
                assert f"{toy.colour_word} {toy.kind}" in text
        if len(scene.toys) == 1 and scene.toys[0].colour_word is None:
            assert not set(COLOURS) & set(text.split())


def test_varied_captions_never_lie() -> None:
    rng = random.Random(1)
    for scene in drawn(300):
        words = set(caption(scene, rng).replace(",", "").split())
        kinds = {toy.kind for toy in scene.toys}
        assert words & set(CLASSES) == kinds
        assert words & set(COLOURS) <= {toy.colour_word for toy in scene.toys}
        assert words & set(MATERIALS) <= {toy.material for toy in scene.toys}
        assert words & {"left", "right", "centre"} <= {toy.position for toy in scene.toys}


def test_attributes_are_indices_into_the_tables() -> None:
    for scene in drawn(300):
        labels, toy = attributes(scene), scene.toys[0]
        assert CLASSES[labels.kind] == toy.kind
        assert MATERIALS[labels.material] == toy.material
        assert BACKGROUNDS[labels.background] == scene.background
        assert POSITIONS[labels.position] == toy.position
        assert SIZES[labels.size] == toy.size
        assert labels.colour == -1 or tuple(COLOURS)[labels.colour] == toy.colour


def test_given_attributes_are_kept() -> None:
    rng = random.Random(0)
    for _ in range(50):
        scene = draw_scene(rng, kind="fish", colour="pink", background="night", position="left", size="small")
        (toy,) = scene.toys
        assert (toy.kind, toy.colour, toy.position, toy.size) == ("fish", "pink", "left", "small")
        assert scene.background == "night"


def test_heldout_prompts_cover_everything() -> None:
    prompts = heldout_prompts(400, 0)
    assert prompts == heldout_prompts(400, 0)
    pairs = {(p.scene.toys[0].kind, p.scene.toys[0].colour) for p in prompts}
    assert len(pairs) == len(CLASSES) * len(COLOURS)
    assert len({(p.scene.toys[0].kind, p.scene.background) for p in prompts}) == len(CLASSES) * len(BACKGROUNDS)
    assert all(p.text == caption(p.scene) for p in prompts)


def test_subjects_and_styles_are_held_out() -> None:
    assert len(SUBJECTS) == 8 and len({s.name for s in SUBJECTS}) == 8
    for subject in SUBJECTS:
        pattern = subject.toy.pattern
        assert pattern is not None and pattern.kind not in TRAINING_PATTERNS
        scenes = subject_scenes(subject.name, 5)
        assert len({s.background for s in scenes}) == 5
        assert all(s.toys[0].pattern == pattern for s in scenes)
    assert all(scene.style is None for scene in drawn(500))
    assert {s.style for style in STYLES for s in style_scenes(style, 2)} == set(STYLES)


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(ConfigError, match='unknown Toybox subject "robt".*did you mean "robot"'):
        subject_named("robt")
    with pytest.raises(ConfigError, match="toon"):
        style_scenes("cartoon", 1)
