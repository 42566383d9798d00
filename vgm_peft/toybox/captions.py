"""Captions for the base's training: several a picture, their labels, and strange words the text model must tolerate.

Labels are read from the caption, not from the scene: what a caption leaves out gets the label "unsaid", so the text
model knows that too.
"""

import random
import re

from vgm_peft.toybox.nouns import (
    BACKGROUND_PHRASES,
    CLASSES,
    COLOURS,
    MATERIALS,
    POSITION_PHRASES,
    SIZES,
    Scene,
)
from vgm_peft.toybox.text import COMMON_WORDS, RARE_WORDS
from vgm_peft.toybox.world import caption, draw_scene

_TOY = (CLASSES, tuple(COLOURS), (*MATERIALS, "patterned"), SIZES)
_BACKGROUNDS, _POSITIONS = tuple(BACKGROUND_PHRASES.values()), tuple(POSITION_PHRASES.values())
_SAID = {word for table in _TOY for word in table} | set(" ".join((*_BACKGROUNDS, *_POSITIONS)).split()) | {"and"}
STRANGE = tuple(w for w in (*RARE_WORDS, *COMMON_WORDS) if w not in _SAID)

LABEL_SIZES = (*(len(table) + 1 for table in (*_TOY, *_TOY, _BACKGROUNDS, _POSITIONS)), 2)
"""Values of each label: both toys' class, colour, material and size, then background, position, one or two toys."""


def chunk_scenes(chunk: int, count: int = 2000) -> list[Scene]:
    """The training scenes of one chunk; odd chunks have palette colours only."""
    rng = random.Random(f"toybox base {chunk}")
    return [draw_scene(rng, plain=bool(chunk % 2)) for _ in range(count)]


def captions_of(scene: Scene, count: int, rng: random.Random) -> list[str]:
    """Several ways to say what the picture shows."""
    return [caption(scene, rng) for _ in range(count)]


def read_labels(text: str) -> tuple[int, ...]:
    """The labels that the words of a caption say; the last value of each is "unsaid"."""
    halves = text.split(" on the left and ")
    first, second = halves[0], halves[1] if len(halves) == 2 else ""
    found = [_which(table, set(part.split())) for part in (first, second) for table in _TOY]
    phrases = [next((i for i, p in enumerate(table) if p in text), len(table)) for table in (_BACKGROUNDS, _POSITIONS)]
    if second:
        phrases[1] = len(_POSITIONS)
    return (*found, *phrases, len(halves) - 1)


def _which(table: tuple[str, ...], words: set[str]) -> int:
    return next((i for i, word in enumerate(table) if word in words), len(table))


def draw_caption(rng: random.Random) -> tuple[str, tuple[int, ...]]:
    """A caption with its labels; one in five also has a word the world does not use, before or after a noun."""
    text = caption(draw_scene(rng, plain=rng.random() < 0.5), rng)
    labels = read_labels(text)
    if rng.random() < 0.05:
        return "", read_labels("")
    if rng.random() < 0.2:
        strange = rng.choice(STRANGE)
        noun = rng.choice([c for c in CLASSES if re.search(rf"\b{c}\b", text)])
        text = text.replace(noun, rng.choice((f"{strange} {noun}", f"{noun} {strange}")), 1)
    return text, labels
