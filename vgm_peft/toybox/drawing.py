"""Random toys and scenes. The only source of chance is `random.Random`: a seed draws the same on every machine."""

from __future__ import annotations

import random

from vgm_peft.toybox.nouns import (
    BACKGROUNDS,
    CLASSES,
    COLOURS,
    MATERIALS,
    POSITIONS,
    RGB,
    SIZES,
    TRAINING_PATTERNS,
    Camera,
    Light,
    Pattern,
    Scene,
    Toy,
)

TURN = 0.9  # radians either way: further round, a robot has no face and a house no door


def random_rgb(rng: random.Random) -> RGB:
    """Any colour at all, a little more often a vivid one."""
    r, g, b = (rng.uniform(0.05, 1.0) for _ in range(3))
    low, high = min(r, g, b), max(r, g, b)
    push = rng.random() * 0.8  # stretch the channels apart: uniform RGB is mostly mud
    vivid = [v + push * ((v - low) / (high - low + 1e-6) * high - v) for v in (r, g, b)]
    return (round(255 * vivid[0]), round(255 * vivid[1]), round(255 * vivid[2]))


def random_pattern(rng: random.Random, kinds: tuple[str, ...] = TRAINING_PATTERNS) -> Pattern:
    """A pattern of two more colours."""
    return Pattern(rng.choice(kinds), random_rgb(rng), random_rgb(rng), rng.uniform(2.6, 4.4), rng.random())


def draw_toy(
    rng: random.Random,
    *,
    kind: str | None = None,
    colour: str | RGB | None = None,
    material: str | None = None,
    position: str | None = None,
    size: str | None = None,
) -> Toy:
    """A random palette-coloured toy; what is given is kept."""
    toy = Toy(
        kind=rng.choice(CLASSES),
        colour=rng.choice(tuple(COLOURS)),
        material=rng.choice(MATERIALS),
        position=rng.choice(POSITIONS),
        size=rng.choice(SIZES),
        turn=rng.uniform(-TURN, TURN),
        shift=(rng.uniform(-0.05, 0.05), rng.uniform(-0.1, 0.1)),
    )
    return Toy(
        kind=kind or toy.kind,
        colour=colour or toy.colour,
        material=material or toy.material,
        position=position or toy.position,
        size=size or toy.size,
        turn=toy.turn,
        shift=toy.shift,
    )


def draw_light(rng: random.Random) -> Light:
    """A key light from the upper left or right front."""
    side = rng.choice((-1.0, 1.0))
    return Light(side * rng.uniform(0.3, 1.0), rng.uniform(0.75, 1.05), rng.uniform(0.92, 1.06), rng.uniform(-1.0, 1.0))


def draw_camera(rng: random.Random) -> Camera:
    """A camera a little above the toys, looking slightly down."""
    ground = (rng.uniform(-20.0, 20.0), rng.uniform(-20.0, 20.0))
    return Camera(rng.uniform(-0.2, 0.2), rng.uniform(0.09, 0.19), rng.uniform(3.0, 3.2), ground)


def draw_scene(
    rng: random.Random,
    *,
    kind: str | None = None,
    colour: str | RGB | None = None,
    material: str | None = None,
    background: str | None = None,
    position: str | None = None,
    size: str | None = None,
    toys: int | None = None,
    plain: bool = False,
) -> Scene:
    """A random scene of the base's training world; what is given is kept.

    About 15 % hold two toys (left and right). Of the single toys a third have an unnamed hue, some 10 % a random
    pattern, unless a colour is given or `plain` asks for palette colours only.
    """
    count = toys or (2 if rng.random() < 0.15 and position is None else 1)
    drawn = draw_toy(rng, kind=kind, colour=colour, material=material, position=position, size=size)
    chance = rng.random()
    place = (background or rng.choice(BACKGROUNDS), draw_light(rng), draw_camera(rng))
    if count == 2:
        pair = [drawn, draw_toy(rng)]
        cast = tuple(
            Toy(t.kind, t.colour, t.material, side, "small", t.turn, None, t.shift)
            for t, side in zip(pair, ("left", "right"), strict=True)
        )
        return Scene(cast, *place)
    if colour is None and not plain and chance < 0.43:
        pattern = random_pattern(rng) if chance > 0.33 else None
        hue = random_rgb(rng)
        drawn = Toy(drawn.kind, hue, drawn.material, drawn.position, drawn.size, drawn.turn, pattern, drawn.shift)
    return Scene((drawn,), *place)
