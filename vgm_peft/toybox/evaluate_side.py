"""Judging a side network by the oracles: held-out scenes drawn with it and without, beside their real renders.

What steers is the exact control picture of each scene, and the oracles read the same off what was drawn; or it is the
picture itself, the prompt names the toy's class alone, and the reader says how much of the rest came over. With the same
prompts and the same noise, what the base draws unaided is one end of the scale and what real renders reach is the other.
A caption that says place and size settles much of a toy's outline by itself; unplaced, the control alone must tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from vgm_peft.beside import Beside
from vgm_peft.errors import ConfigError, nearest
from vgm_peft.toybox.evaluate import Sampling, TextToImage, sample
from vgm_peft.toybox.oracle import Oracles
from vgm_peft.toybox.oracle_data import controls_of, reader_labels
from vgm_peft.toybox.oracle_net import HEADS
from vgm_peft.toybox.pairs import CONTROLS
from vgm_peft.toybox.render import render
from vgm_peft.toybox.world import BACKGROUND_PHRASES, Prompt, Scene, describe, heldout_prompts

MEASURED = {"depth": "depth correlation", "mask": "mask IoU", "edges": "edge F1"}
"""Control pictures that an oracle reads off a drawing, and what it says of them."""
IMAGE = "image"
SAID = ("class", "colour", "background", "position")
"""What the reader must see of a caption; material and size, which it says too, are the hardest to read."""
TAKEN = ("colour", "material", "background", "position", "size")
"""What an image prompt must bring when the prompt names the class alone."""
Tick = Callable[[int], None]


@dataclass(frozen=True)
class Exam:
    """Held-out scenes: what is asked for, what steers (B, 3, P, Q) in 0 .. 1, and real renders (B, P, Q, 3) uint8 with
    their nearness, mask and edges (B, 3, P, Q). `said` are the attributes by which a prompt is judged."""

    kind: str
    prompts: tuple[Prompt, ...]
    said: tuple[str, ...]
    shown: Tensor
    real: Tensor
    controls: Tensor


@dataclass(frozen=True)
class Score:
    """What the oracles read in pictures, all but depth (-1 .. 1) in 0 .. 1.

    `control` is the agreement with what steers, `prompt` the share of pictures in which all that the prompt said is read;
    `details` has the parts of both.
    """

    control: float
    prompt: float
    details: Mapping[str, float]


@dataclass(frozen=True)
class SideMeasure:
    """Scores of pictures drawn without and with a side network, of the real renders, and how many of each there were."""

    kind: str
    count: int
    uncontrolled: Score
    controlled: Score
    real: Score

    @property
    def share(self) -> float:
        """How far from uncontrolled to real renders the controlled pictures come; 1 is all the way."""
        way = self.real.control - self.uncontrolled.control
        return round((self.controlled.control - self.uncontrolled.control) / way, 4) if abs(way) > 1e-6 else 0.0

    def table(self) -> dict[str, object]:
        """All of it as plain values."""
        return {**asdict(self), "measure": measured(self.kind), "share": self.share}


@dataclass(frozen=True)
class Drawn:
    """Pictures (B, P, Q, 3) uint8 without and with the network."""

    uncontrolled: Tensor
    controlled: Tensor


def measured(kind: str) -> str:
    """What agreement with a kind of control is called. Raises `ConfigError` for one that nothing measures."""
    kinds = [*MEASURED, IMAGE]
    if kind not in kinds:
        raise ConfigError(f'no oracle reads "{kind}"', expected=", ".join(kinds), fix=nearest(kind, kinds))
    return "attribute match" if kind == IMAGE else MEASURED[kind]


def set_exam(kind: str, count: int, seed: int = 0, *, placed: bool = True) -> Exam:
    """Render the held-out scenes of an exam; unless `placed`, the prompts leave out where the toy is and how large.

    Raises `ConfigError` for a kind that nothing measures, or no scenes.
    """
    _ = measured(kind)
    if count < 1:
        raise ConfigError(f"{count} held-out scenes", expected="at least one")
    prompts, said = heldout_prompts(count, seed), SAID
    drawn = render([prompt.scene for prompt in prompts])
    if kind == IMAGE:
        prompts, said = tuple(replace(p, text=f"a photo of {_class(p.scene)}") for p in prompts), SAID[:1]
    elif not placed:
        prompts, said = tuple(replace(p, text=_unplaced(p.scene)) for p in prompts), SAID[:3]
    steers = drawn.image if kind == IMAGE else CONTROLS[kind](drawn)
    shown = steers.permute(0, 3, 1, 2).float().div(255.0)
    return Exam(kind, prompts, said, shown, drawn.image, controls_of(drawn))


def _class(scene: Scene) -> str:
    return describe(scene.toys[0], size=False, material=False, colour=False)


def _unplaced(scene: Scene) -> str:
    return f"{describe(scene.toys[0], size=False)} {BACKGROUND_PHRASES[scene.background]}"


def draw(pipe: TextToImage, beside: Beside, exam: Exam, how: Sampling, tick: Tick | None = None) -> Drawn:
    """Draw an exam with the network silent, and again with it heard; picture i has the same noise in both."""
    texts, device = [prompt.text for prompt in exam.prompts], beside.base.device
    beside.hush()
    uncontrolled = sample(pipe, texts, how, tick)
    controlled: list[Tensor] = []
    for start in range(0, len(texts), how.batch):
        part = slice(start, start + how.batch)
        with torch.no_grad():
            beside.tell(exam.shown[part].to(device))
        controlled.append(sample(pipe, texts[part], replace(how, seed=how.seed + start), tick))
    beside.hush()
    return Drawn(uncontrolled, torch.cat(controlled))


def score(images: Tensor, exam: Exam, oracles: Oracles) -> Score:
    """Read pictures of an exam's scenes."""
    read = oracles.read(images).labels
    wanted = torch.tensor([reader_labels(prompt.scene) for prompt in exam.prompts])
    right = {name: read[name] == wanted[:, k] for k, name in enumerate(HEADS) if name in (*SAID, *TAKEN)}
    seen = {name: _mean(values) for name, values in right.items()}
    prompt = _mean(torch.stack([right[name] for name in exam.said]).all(0))
    if exam.kind == IMAGE:
        return Score(round(sum(seen[name] for name in TAKEN) / len(TAKEN), 4), prompt, seen)
    agreement = oracles.agreement(images, exam.controls)
    followed = {kind: _mean(getattr(agreement, kind)) for kind in MEASURED}
    return Score(followed[exam.kind], prompt, followed | seen)


def measure_side(
    pipe: TextToImage, beside: Beside, exam: Exam, how: Sampling, oracles: Oracles, tick: Tick | None = None
) -> tuple[SideMeasure, Drawn]:
    """Draw an exam and judge it. Raises `ConfigError` for a network that is not steered by what the exam shows."""
    if beside.side.paired == (exam.kind == IMAGE):
        wants = "a control picture" if beside.side.paired else "the picture itself"
        raise ConfigError(f"a {beside.side.name} judged by {measured(exam.kind)}", expected=f"a kind that shows it {wants}")
    drawn = draw(pipe, beside, exam, how, tick)
    scores = [score(images, exam, oracles) for images in (drawn.uncontrolled, drawn.controlled, exam.real)]
    return SideMeasure(exam.kind, len(exam.prompts), *scores), drawn


def _mean(values: Tensor) -> float:
    return round(float(values.float().mean()), 4)
