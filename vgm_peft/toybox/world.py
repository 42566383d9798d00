"""What there is in the Toybox world and how it is said, without a pixel in sight (nor torch, nor numpy).

A `Scene` holds everything a picture depends on (also the jitter of light and camera), so that scene -> pixels is a pure
function. `nouns` has the tables and records, `drawing` draws random ones, `cast` holds what the base never sees; here
is how scenes are said, and all of it under one name.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from vgm_peft.toybox.cast import SUBJECTS, Subject, style_scenes, subject_named, subject_scenes
from vgm_peft.toybox.drawing import draw_camera, draw_light, draw_scene, draw_toy, random_pattern, random_rgb
from vgm_peft.toybox.nouns import (
    BACKGROUND_PHRASES,
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    MATERIALS,
    PATTERNS,
    POSITION_PHRASES,
    POSITIONS,
    RGB,
    SIZES,
    STYLES,
    TRAINING_PATTERNS,
    Attributes,
    Camera,
    Light,
    Pattern,
    Scene,
    Toy,
    attributes,
)

__all__ = [
    "Attributes",
    "BACKGROUNDS",
    "BACKGROUND_PHRASES",
    "CLASSES",
    "COLOURS",
    "Camera",
    "Light",
    "MATERIALS",
    "PATTERNS",
    "POSITIONS",
    "POSITION_PHRASES",
    "Pattern",
    "Prompt",
    "RGB",
    "SIZES",
    "STYLES",
    "SUBJECTS",
    "Scene",
    "Subject",
    "TRAINING_PATTERNS",
    "Toy",
    "attributes",
    "caption",
    "describe",
    "draw_camera",
    "draw_light",
    "draw_scene",
    "draw_toy",
    "heldout_prompts",
    "random_pattern",
    "random_rgb",
    "style_scenes",
    "subject_named",
    "subject_scenes",
]

_ARTICLED = {"orange": "an"}
_OPENINGS = ("", "a photo of ", "a picture of ")


def describe(toy: Toy, *, size: bool = True, material: bool = True, colour: bool = True) -> str:
    """A toy as a noun phrase with its article: "a small striped red robot"."""
    words: list[str] = []
    if size:
        words.append(toy.size)
    if toy.pattern is not None:
        words.append("patterned")
    elif material:
        words.append(toy.material)
    if colour and toy.colour_word:
        words.append(toy.colour_word)
    words.append(toy.kind)
    return f"{_ARTICLED.get(words[0], 'a')} {' '.join(words)}"


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """What the picture shows; with `rng` in one of several ways of saying it and with some attributes left out.

    Without `rng` everything is said: "a small striped red robot on grass, on the left". Unnamed hues are never named.
    """
    place = BACKGROUND_PHRASES[scene.background]
    opening = "" if rng is None else rng.choice(_OPENINGS)

    def said(chance: float) -> bool:
        return rng is None or rng.random() < chance

    if len(scene.toys) == 2:
        texts = [describe(t, size=False, material=said(0.6), colour=said(0.95)) for t in scene.toys]
        pair = f"{texts[0]} on the left and {texts[1]} on the right"
        return f"{opening}{pair}, {place}" if said(0.9) else f"{opening}{pair}"
    toy = scene.toys[0]
    text = describe(toy, size=said(0.5), material=said(0.6), colour=said(0.92))
    background, position = said(0.9), said(0.7)
    where = POSITION_PHRASES[toy.position]
    if background and position:
        order = (f"{place}, {where}",) if rng is None else (f"{place}, {where}", f"{where}, {place}")
        tail = order[0] if rng is None else rng.choice(order)
    else:
        tail = place if background else where if position else ""
    return f"{opening}{text} {tail}".rstrip()


@dataclass(frozen=True)
class Prompt:
    """A prompt with the labels its picture should show."""

    text: str
    scene: Scene


def heldout_prompts(count: int, seed: int = 0) -> tuple[Prompt, ...]:
    """Prompts over all attributes, classes and colours in turn; none of the training draws was made to match them."""
    rng = random.Random(f"heldout prompts {seed}")
    prompts: list[Prompt] = []
    for i in range(count):
        kind, colour = CLASSES[i % len(CLASSES)], tuple(COLOURS)[(i // len(CLASSES) + i) % len(COLOURS)]
        background, position = BACKGROUNDS[(i + i // 30) % len(BACKGROUNDS)], POSITIONS[rng.randrange(3)]
        scene = draw_scene(rng, kind=kind, colour=colour, background=background, position=position, toys=1)
        prompts.append(Prompt(caption(scene), scene))
    return tuple(prompts)
