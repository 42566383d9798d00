"""The things of the Toybox: tables of what there is, and the frozen records a picture depends on."""

from __future__ import annotations

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
PATTERNS = ("dots", "rings", "patches", "halves", "zigzag", "spiral", "tartan", "bullseye")
TRAINING_PATTERNS = PATTERNS[:4]  # the other four are kept for what users "bring"
STYLES = ("toon", "sketch", "blueprint", "pixel")


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
