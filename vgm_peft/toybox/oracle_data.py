"""What the oracles learn from: renders with labels, sets of look-alike toys, and the wear that generated pictures show."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as nf

from vgm_peft.toybox.canvas import FAR
from vgm_peft.toybox.drawing import draw_camera, draw_light, draw_scene, random_pattern, random_rgb
from vgm_peft.toybox.nouns import BACKGROUNDS, CLASSES, PATTERNS, POSITIONS, STYLES, Scene, Toy, attributes
from vgm_peft.toybox.oracle_net import HEADS
from vgm_peft.toybox.render import Rendered, render

NEVER = -1  # a label nobody can read from this picture
_COLOURLESS = ("sketch", "blueprint")


@dataclass(frozen=True)
class Labelled:
    """Pictures (B, 64, 64, 3) uint8, labels (B, heads) in the order of `HEADS`, controls (B, 3, 64, 64) in 0..1 fp16:
    nearness, mask, edges."""

    images: Tensor
    labels: Tensor
    controls: Tensor


def reader_scene(rng: random.Random) -> Scene:
    """One toy, any hue and pattern; one in five in a held-out style."""
    scene = draw_scene(rng, toys=1)
    return replace(scene, style=rng.choice(STYLES)) if rng.random() < 0.2 else scene


def reader_labels(scene: Scene) -> tuple[int, ...]:
    """Labels in the order of `HEADS`; `NEVER` where style or pattern hide them."""
    kind, colour, material, background, position, size = astuple(attributes(scene))
    if scene.toys[0].pattern is not None:
        material = NEVER
    if scene.style in _COLOURLESS:
        colour, material, background = NEVER, NEVER, NEVER
    style = 0 if scene.style is None else 1 + STYLES.index(scene.style)
    return (kind, colour, material, background, position, size, style)


def controls_of(drawn: Rendered) -> Tensor:
    """Nearness (1 near, 0 far), mask and edges as (B, 3, P, Q) in 0..1."""
    near = (1.5 / drawn.depth.clamp(1.5, FAR)).sub(0.125).clamp(0, 1)
    return torch.stack((near, (drawn.mask > 0).float(), drawn.edges.float()), 1)


def render_labelled(scenes: Sequence[Scene], tick: Callable[[int], None]) -> Labelled:
    """Render with labels, a few hundred at a time; `tick` hears of progress."""
    images: list[Tensor] = []
    controls: list[Tensor] = []
    for start in range(0, len(scenes), 320):
        drawn = render(scenes[start : start + 320])
        images.append(drawn.image)
        controls.append(controls_of(drawn).half())
        tick(len(drawn.image))
    labels = torch.tensor([reader_labels(scene) for scene in scenes])
    return Labelled(torch.cat(images), labels, torch.cat(controls))


def lookalikes(rng: random.Random) -> tuple[Toy, ...]:
    """Four toys that are easily confused: one, the same in other colours, with another pattern, as another class."""
    pattern = random_pattern(rng, PATTERNS) if rng.random() < 0.85 else None
    toy = Toy(rng.choice(CLASSES), random_rgb(rng), "matte", "centre", "large", 0.0, pattern)
    recoloured = replace(pattern, second=random_rgb(rng), third=random_rgb(rng)) if pattern else None
    other = rng.choice(tuple(kind for kind in CLASSES if kind != toy.kind))
    return (
        toy,
        replace(toy, colour=random_rgb(rng), pattern=recoloured),
        replace(toy, pattern=random_pattern(rng, PATTERNS) if rng.random() < 0.7 else None),
        replace(toy, kind=other),
    )


def seen(toy: Toy, rng: random.Random) -> Scene:
    """A toy in a scene of its own: any place, turn and light, mostly from near."""
    toy = replace(
        toy,
        position=rng.choice(POSITIONS),
        size="large" if rng.random() < 0.75 else "small",
        turn=rng.uniform(-0.75, 0.75),
        shift=(rng.uniform(-0.06, 0.06), rng.uniform(-0.1, 0.1)),
    )
    return Scene((toy,), rng.choice(BACKGROUNDS), draw_light(rng), draw_camera(rng))


def _each(count: int, low: float, high: float) -> Tensor:
    return torch.empty(count, 1, 1, 1).uniform_(low, high)


def _sometimes(count: int, chance: float) -> Tensor:
    return (torch.rand(count, 1, 1, 1) < chance).float()


def worn(x: Tensor) -> Tensor:
    """Network inputs as a small generator would draw them: shifted, soft, wobbly, noisy, colours a little off.

    Every picture gets its own mixture; colours stay well within their labels. Chance comes from torch's generator.
    """
    b = x.shape[0]
    dy, dx = (int(v) for v in torch.randint(-3, 4, (2,)))
    x = nf.pad(x, (3, 3, 3, 3), mode="replicate")[:, :, 3 + dy : 67 + dy, 3 + dx : 67 + dx]
    soft = nf.avg_pool2d(nf.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, soft, _each(b, -0.3, 1.0) * _sometimes(b, 0.7))
    coarse = nf.interpolate(nf.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear")
    x = torch.lerp(x, coarse, _sometimes(b, 0.25))
    blocks = nf.interpolate(nf.avg_pool2d(x, 8), scale_factor=8.0, mode="nearest")
    x = torch.lerp(x, blocks, _each(b, 0.0, 0.25) * _sometimes(b, 0.3))
    wobble = nf.interpolate(torch.randn(b, 3, 12, 12), size=(64, 64), mode="bilinear")
    x = x + wobble * _each(b, 0.0, 0.14) * _sometimes(b, 0.7)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * _each(b, 0.8, 1.15)
    x = x * _each(b, 0.88, 1.12) + _each(b, -0.08, 0.08) + torch.empty(b, 3, 1, 1).uniform_(-0.04, 0.04)
    return (x + torch.randn_like(x) * _each(b, 0.0, 0.12)).clamp(-1, 1)


def mirrored(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The pictures mirrored, with left and right exchanged in their labels."""
    labels = labels.clone()
    place = tuple(HEADS).index("position")
    labels[:, place] = (len(POSITIONS) - 1) - labels[:, place]
    return x.flip(-1), labels
