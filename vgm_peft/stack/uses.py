"""What a `Stack` names: deltas, side networks and regions, each with where, when and how strongly it acts; frozen data."""

import math
from collections.abc import Mapping, Sized
from dataclasses import dataclass, field
from typing import ClassVar

from vgm_peft.errors import ConfigError
from vgm_peft.stack.files import Named

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, as shares of the picture's width and height."""
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class DeltaUse:
    """One delta of a stack."""

    file: str
    """Path of the delta, in any format that can be read."""
    strength: float = 1.0
    """`W + strength * dW`; 0 is the same as leaving the delta out, bit for bit."""
    start: float = 0.0
    """From which share of the steps it acts, 0 .. 1."""
    end: float = 1.0
    """Until which."""
    schedule: tuple[float, ...] = ()
    """Further factors on the strength, spread evenly over its steps, with straight lines between; none: constant."""
    blocks: Mapping[str, float] = field(default_factory=dict[str, float])
    """Further factors by patterns of site names (`unet.down_blocks.*`, `text_encoder.*`); the first that matches, else 1."""
    region: str = ""
    """The region of the stack in which it acts; everywhere without one."""
    digest: str = ""
    """SHA-256 of the file; checked where given."""
    files: ClassVar[Named] = (("delta", "file", "digest"),)

    def __post_init__(self) -> None:
        check_text("deltas.file", self.file, 1, 4096)
        check_number(f"strength of {self.file}", self.strength, -100.0, 100.0)
        check_span(self.file, self.start, self.end)
        if self.start == self.end:
            raise ConfigError(f"{self.file} acts from {self.start:g} to {self.end:g}", expected="a start before the end")
        check_length(f"schedule of {self.file}", self.schedule, 1000)
        check_length(f"blocks of {self.file}", self.blocks, 1000)
        for factor in self.schedule:
            check_number(f"schedule of {self.file}", factor, -100.0, 100.0)
        for pattern, factor in self.blocks.items():
            check_text(f"blocks of {self.file}", pattern, 1, 200)
            check_number(f'blocks of {self.file}: "{pattern}"', factor, -100.0, 100.0)
        check_text("deltas.region", self.region, 0, 40)
        check_hex("deltas.digest", self.digest)

    @property
    def name(self) -> str:
        """What tells it from the stack's others: its file, and the region where the file may stand once for each."""
        return f"{self.file} in {self.region}" if self.region else self.file

    @property
    def constant(self) -> bool:
        """Whether it acts alike in every step and everywhere, so that it can be added into the weights once."""
        return (self.start, self.end) == (0.0, 1.0) and not self.schedule and not self.region

    def factor(self, begin: float, end: float) -> float:
        """Return the factor on its strength in a step from one share of all steps to another (see `drawing.moment`).

        0 in a step that does not lie wholly within its span. A schedule is spread over the steps that do: its first factor
        stands at the first of them, its last at the last.
        """
        if not (self.start <= begin and end <= self.end):
            return 0.0
        if not self.schedule:
            return 1.0
        if begin < end:
            steps = round(1 / (end - begin))
            mine = [i for i in range(steps) if self.start <= i / steps and (i + 1) / steps <= self.end]
            place = mine.index(round(begin * steps)) / max(len(mine) - 1, 1)
        else:
            place = (begin - self.start) / (self.end - self.start)
        below = min(int(place * (len(self.schedule) - 1)), max(len(self.schedule) - 2, 0))
        low, high = self.schedule[below], self.schedule[min(below + 1, len(self.schedule) - 1)]
        return low + (place * (len(self.schedule) - 1) - below) * (high - low)

    @property
    def first(self) -> float:
        """The factor on its strength while prompts are read, which is before the first step: that of the beginning."""
        return 0.0 if self.start > 0.0 else self.schedule[0] if self.schedule else 1.0


@dataclass(frozen=True, kw_only=True)
class ControlUse:
    """One side network of a stack, with the picture it looks at."""

    network: str
    """Path of the network's folder or file."""
    image: str
    """Path of the picture it looks at."""
    strength: float = 1.0
    """Factor on what the network adds; 0 is the same as leaving it out, bit for bit."""
    start: float = 0.0
    """From which share of the steps it is heard, 0 .. 1."""
    end: float = 1.0
    """Until which."""
    mask: str = ""
    """Path of a picture that is white where the network is heard; everywhere without one."""
    layers: str = ""
    """Which layers hear it, where its kind knows choices: `style`, `layout`, `style+layout` (IP-Adapters); else all."""
    guess: bool = False
    """Whether the half without the prompt does not hear it, for pictures from the control alone (ControlNets)."""
    network_digest: str = ""
    """SHA-256 over the network's files; checked where given."""
    image_digest: str = ""
    """SHA-256 of the control picture's file; checked where given."""
    mask_digest: str = ""
    """SHA-256 of the mask's file; checked where given."""
    files: ClassVar[Named] = (
        ("network", "network", "network_digest"),
        ("picture", "image", "image_digest"),
        ("picture", "mask", "mask_digest"),
    )

    def __post_init__(self) -> None:
        check_text("controls.network", self.network, 1, 4096)
        check_text("controls.image", self.image, 1, 4096)
        check_text("controls.mask", self.mask, 0, 4096)
        check_text("controls.layers", self.layers, 0, 200)
        check_number(f"strength of {self.network}", self.strength, -100.0, 100.0)
        check_span(self.network, self.start, self.end)
        for name in ("network_digest", "image_digest", "mask_digest"):
            check_hex(f"controls.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class Region:
    """A part of the picture with a prompt of its own, in which deltas may act that act nowhere else."""

    name: str
    """By which deltas name it."""
    prompt: str = ""
    """What is there; the stack's own prompt, without one."""
    box: Box = WHOLE
    """Where it is, unless there is a mask."""
    mask: str = ""
    """Path of a picture that is white where the region is."""
    mask_digest: str = ""
    """SHA-256 of the mask's file; checked where given."""
    files: ClassVar[Named] = (("picture", "mask", "mask_digest"),)

    def __post_init__(self) -> None:
        check_text("regions.name", self.name, 1, 40)
        check_text("regions.prompt", self.prompt, 0, 8_000)
        check_text("regions.mask", self.mask, 0, 4096)
        check_hex("regions.mask_digest", self.mask_digest)
        left, top, right, bottom = self.box
        if not (0.0 <= left < right <= 1.0 and 0.0 <= top < bottom <= 1.0):
            raise ConfigError(
                f"box {list(self.box)} of the region {self.name}",
                expected="left, top, right, bottom as shares of the picture, as in [0.0, 0.0, 0.5, 1.0]",
            )
        if self.mask and self.box != WHOLE:
            raise ConfigError(f"the region {self.name} has a box and a mask", fix="keep one of them")


def check_span(name: str, start: float, end: float) -> None:
    """Refuse what is no part of 0 .. 1."""
    check_number(f"start of {name}", start, 0.0, 1.0)
    check_number(f"end of {name}", end, start, 1.0)


def check_number(name: str, value: float, low: float, high: float) -> None:
    """Refuse a number that is not finite or out of range."""
    if not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"{name} = {value}", expected=f"{low:g} .. {high:g}" if high < 1e6 else f"at least {low:g}")


def check_length(name: str, values: Sized, most: int) -> None:
    """Refuse what has too many entries."""
    if len(values) > most:
        raise ConfigError(f"{name}: {len(values)} entries", expected=f"at most {most}")


def check_text(name: str, value: str, low: int, high: int) -> None:
    """Refuse a text that is too short or too long, or holds a NUL."""
    if not low <= len(value) <= high:
        raise ConfigError(f"{name} has {len(value)} characters", expected=f"{low} .. {high}")
    if "\0" in value:
        raise ConfigError(f"{name} holds a NUL character", fix="remove it")


def check_hex(name: str, value: str) -> None:
    """Refuse what is given as a SHA-256 and is none."""
    if value and (len(value) != 64 or set(value) - set("0123456789abcdef")):
        raise ConfigError(f'{name} = "{value[:80]}"', expected="a SHA-256 in 64 lower-case hexadecimal digits")
