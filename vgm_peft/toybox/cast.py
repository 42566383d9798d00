"""What the base never sees: eight subjects with patterns of their own and four styles. They are what users "bring"."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vgm_peft.errors import ConfigError, nearest
from vgm_peft.toybox.drawing import draw_camera, draw_light, draw_scene
from vgm_peft.toybox.nouns import BACKGROUNDS, POSITIONS, STYLES, Pattern, Scene, Toy


@dataclass(frozen=True)
class Subject:
    """One particular toy: `name` for folders and flags, `toy` as it looks anywhere, its class word."""

    name: str
    toy: Toy

    @property
    def class_word(self) -> str:
        """What kind of toy it is."""
        return self.toy.kind


def _subject(kind: str, colour: tuple[int, int, int], pattern: Pattern) -> Subject:
    return Subject(kind, Toy(kind, colour, "matte", "centre", "large", 0.0, pattern))


SUBJECTS: tuple[Subject, ...] = (
    _subject("robot", (24, 150, 150), Pattern("bullseye", (252, 208, 70), (96, 30, 92), 3.0, 0.0)),
    _subject("duck", (246, 236, 214), Pattern("zigzag", (32, 44, 120), (236, 92, 72), 4.4, 0.3)),
    _subject("car", (190, 30, 60), Pattern("tartan", (20, 120, 110), (240, 230, 190), 2.8, 0.2)),
    _subject("mug", (240, 240, 236), Pattern("bullseye", (226, 40, 130), (30, 170, 196), 3.0, 0.0)),
    _subject("rocket", (110, 196, 236), Pattern("zigzag", (214, 44, 40), (250, 240, 214), 3.4, 0.0)),
    _subject("snowman", (150, 224, 180), Pattern("spiral", (110, 60, 40), (244, 140, 160), 3.4, 0.5)),
    _subject("fish", (250, 130, 30), Pattern("bullseye", (250, 244, 232), (40, 40, 60), 3.0, 0.4)),
    _subject("house", (244, 214, 90), Pattern("tartan", (60, 70, 160), (220, 110, 60), 3.0, 0.1)),
)


def subject_named(name: str) -> Subject:
    """The subject called `name`."""
    for subject in SUBJECTS:
        if subject.name == name:
            return subject
    names = tuple(subject.name for subject in SUBJECTS)
    raise ConfigError(f'unknown Toybox subject "{name}"', expected=", ".join(names), fix=nearest(name, names))


def subject_scenes(name: str, count: int, seed: int = 0, backgrounds: Sequence[str] = BACKGROUNDS) -> tuple[Scene, ...]:
    """A subject in `count` different scenes: backgrounds in turn, other places, turns and lights each time."""
    subject, rng = subject_named(name), random.Random(f"subject {name} {seed}")
    order = rng.sample(list(backgrounds), len(backgrounds))
    places = rng.sample(list(POSITIONS), len(POSITIONS))
    scenes: list[Scene] = []
    for i in range(count):
        turn, shift = rng.uniform(-0.7, 0.7), (rng.uniform(-0.05, 0.05), rng.uniform(-0.1, 0.1))
        size = "small" if i % 5 == 3 else "large"  # people photograph their own thing from near
        toy = replace(subject.toy, position=places[i % len(places)], size=size, turn=turn, shift=shift)
        scenes.append(Scene((toy,), order[i % len(order)], draw_light(rng), draw_camera(rng)))
    return tuple(scenes)


def style_scenes(style: str, count: int, seed: int = 0) -> tuple[Scene, ...]:
    """Random palette-coloured scenes in a style."""
    if style not in STYLES:
        raise ConfigError(f'unknown Toybox style "{style}"', expected=", ".join(STYLES), fix=nearest(style, STYLES))
    rng = random.Random(f"style {style} {seed}")
    return tuple(replace(draw_scene(rng, plain=True, toys=1), style=style) for _ in range(count))
