"""What there is in the Toybox world and how it is said: toys, scenes, captions and labels, without a pixel in sight.

A `Scene` holds everything a picture depends on (also the jitter of light and camera), so that scene -> pixels is a pure
function. The only source of chance is `random.Random`: the same seed gives the same scenes on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

RGB = tuple[int, int, int]

CLASSES = ("robot", "duck", "car", "house", "mushroom", "rocket", "mug", "tree", "snowman", "fish")
COLOURS: Mapping[str, RGB] = MappingProxyType(
    {
        "red": (212, 30, 36),
        "orange": (246, 132, 16),
        "yellow": (250, 218, 44),
        "green": (36, 156, 62),
        "blue": (28, 84, 214),
        "purple": (124, 48, 172),
        "pink": (248, 132, 184),
        "white": (246, 246, 244),
    }
)
MATERIALS = ("matte", "glossy", "striped", "checkered")
BACKGROUND_PHRASES: Mapping[str, str] = MappingProxyType(
    {
        "studio": "in a studio",
        "grass": "on grass",
        "sand": "on sand",
        "night": "at night",
        "sky": "in the sky",
        "wood": "on a wooden floor",
    }
)
BACKGROUNDS = tuple(BACKGROUND_PHRASES)
POSITION_PHRASES: Mapping[str, str] = MappingProxyType(
    {"left": "on the left", "centre": "in the centre", "right": "on the right"}
)
POSITIONS = tuple(POSITION_PHRASES)
SIZES = ("small", "large")
PATTERNS = ("dots", "rings", "patches", "halves", "zigzag", "spiral")
TRAINING_PATTERNS = PATTERNS[:4]  # the other two are kept for what users "bring"
STYLES = ("toon", "sketch", "blueprint", "pixel")

TURN = 0.9  # radians either way: further round, a robot has no face and a house no door


@dataclass(frozen=True)
class Pattern:
    """A coloured pattern over a toy's own colour: `scale` is repeats per toy height, `phase` in turns of the pattern."""

    kind: str
    second: RGB
    third: RGB
    scale: float = 4.0
    phase: float = 0.0


@dataclass(frozen=True)
class Toy:
    """One toy: `turn` in radians about the vertical, `shift` moves it on the ground from its named position."""

    kind: str
    colour: str | RGB
    material: str
    position: str
    size: str
    turn: float
    pattern: Pattern | None = None
    shift: tuple[float, float] = (0.0, 0.0)

    @property
    def rgb(self) -> RGB:
        """The toy's own colour as sRGB bytes."""
        return COLOURS[self.colour] if isinstance(self.colour, str) else self.colour

    @property
    def colour_word(self) -> str | None:
        """The colour a caption may name; None for unnamed hues and for patterned toys."""
        return self.colour if isinstance(self.colour, str) and self.pattern is None else None


@dataclass(frozen=True)
class Light:
    """A distant key light: angles in radians (azimuth 0 comes from behind the camera), strength around 1."""

    azimuth: float
    elevation: float
    strength: float = 1.0
    warmth: float = 0.0


@dataclass(frozen=True)
class Camera:
    """Orbits the middle of the scene; `ground` says where in the endless background the scene stands."""

    yaw: float = 0.0
    pitch: float = 0.14
    distance: float = 3.1
    ground: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Scene:
    """All that a picture depends on; `style` names a post-process of the render."""

    toys: tuple[Toy, ...]
    background: str
    light: Light
    camera: Camera
    style: str | None = None


@dataclass(frozen=True)
class Attributes:
    """Integer labels of a scene's first toy, indices into the tables above; colour -1: unnamed or patterned."""

    kind: int
    colour: int
    material: int
    background: int
    position: int
    size: int


def attributes(scene: Scene) -> Attributes:
    """The labels an attribute reader should read from the picture of `scene`."""
    toy = scene.toys[0]
    return Attributes(
        kind=CLASSES.index(toy.kind),
        colour=-1 if toy.colour_word is None else tuple(COLOURS).index(toy.colour_word),
        material=MATERIALS.index(toy.material),
        background=BACKGROUNDS.index(scene.background),
        position=POSITIONS.index(toy.position),
        size=SIZES.index(toy.size),
    )


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
            Toy(t.kind, t.colour, t.material, side, "large", t.turn, None, t.shift)
            for t, side in zip(pair, ("left", "right"), strict=True)
        )
        return Scene(cast, *place)
    if colour is None and not plain and chance < 0.43:
        pattern = random_pattern(rng) if chance > 0.33 else None
        hue = random_rgb(rng)
        drawn = Toy(drawn.kind, hue, drawn.material, drawn.position, drawn.size, drawn.turn, pattern, drawn.shift)
    return Scene((drawn,), *place)
