"""Measuring a base and a delta with the oracles, on any stock diffusers text-to-image pipeline.

`measure_prompts`: does the picture show what the prompt said? `measure_subject`: is it the subject, where it was asked
to be, and is the class without the token still the class? All sampling is seeded picture by picture, so numbers repeat
whatever the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vgm_peft.errors import ConfigError
from vgm_peft.toybox.cast import Subject, subject_scenes
from vgm_peft.toybox.nouns import BACKGROUND_PHRASES, BACKGROUNDS, CLASSES
from vgm_peft.toybox.oracle import Oracles
from vgm_peft.toybox.oracle_data import NEVER, reader_labels
from vgm_peft.toybox.oracle_net import HEADS
from vgm_peft.toybox.pipeline import GUIDANCE
from vgm_peft.toybox.render import render
from vgm_peft.toybox.world import Prompt

Tick = Callable[[int], None]
_JUDGED = ("class", "colour", "background", "position")


class TextToImage(Protocol):
    """What is needed of a diffusers pipeline."""

    def __call__(self, *, prompt: list[str], **options: Any) -> Any:
        """Draw the prompts; the result has `images`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are drawn: picture i of a measurement has the seed `seed + i`."""

    steps: int = 25
    guidance: float = GUIDANCE
    seed: int = 0
    batch: int = 16


@dataclass(frozen=True)
class PromptMeasure:
    """Shares (0..1) of pictures in which what the prompt said is read; `everything`: all four at once."""

    count: int
    class_accuracy: float
    colour_accuracy: float
    background_accuracy: float
    position_accuracy: float
    everything: float


@dataclass(frozen=True)
class SubjectMeasure:
    """What a pipeline draws for a subject's token, and for its class without it; all 0..1.

    `identity` is the mean similarity to fresh renders of the subject, `identity_real` what other fresh renders reach.
    The pictures of the class: are they still of the class, and how like the subject are they?
    """

    count: int
    identity: float
    identity_real: float
    class_read: float
    backgrounds_kept: float
    class_count: int
    class_accuracy: float
    class_identity: float


def sample(pipe: TextToImage, prompts: Sequence[str], how: Sampling, tick: Tick | None = None) -> Tensor:
    """Pictures (B, P, Q, 3) uint8 of the prompts."""
    if not prompts:
        raise ConfigError("no prompt to measure", expected="at least one")
    parts: list[Tensor] = []
    for start in range(0, len(prompts), how.batch):
        texts = list(prompts[start : start + how.batch])
        chance = [torch.Generator().manual_seed(how.seed + start + i) for i in range(len(texts))]
        drawn = pipe(
            prompt=texts,
            num_inference_steps=how.steps,
            guidance_scale=how.guidance,
            generator=chance,
            output_type="np",
        ).images
        parts.append(torch.from_numpy((np.asarray(drawn) * 255).round().astype(np.uint8)))
        if tick is not None:
            tick(len(texts))
    return torch.cat(parts)


def score_prompts(images: Tensor, prompts: Sequence[Prompt], oracles: Oracles) -> PromptMeasure:
    """Compare what is read in pictures with what their prompts said."""
    read = oracles.read(images).labels
    wanted = torch.tensor([reader_labels(prompt.scene) for prompt in prompts])
    names = tuple(HEADS)
    right = {name: read[name] == wanted[:, names.index(name)] for name in _JUDGED}
    named = wanted[:, names.index("colour")] != NEVER
    everything = torch.stack([right[name] | ~named if name == "colour" else right[name] for name in _JUDGED]).all(0)
    return PromptMeasure(
        count=len(prompts),
        class_accuracy=_share(right["class"]),
        colour_accuracy=_share(right["colour"][named]),
        background_accuracy=_share(right["background"]),
        position_accuracy=_share(right["position"]),
        everything=_share(everything),
    )


def _share(right: Tensor) -> float:
    return round(float(right.float().mean()), 4) if len(right) else 0.0


def measure_prompts(
    pipe: TextToImage, prompts: Sequence[Prompt], how: Sampling, oracles: Oracles, tick: Tick | None = None
) -> PromptMeasure:
    """Draw the prompts and read the pictures."""
    return score_prompts(sample(pipe, [prompt.text for prompt in prompts], how, tick), prompts, oracles)


def subject_prompts(noun: str, count: int) -> tuple[tuple[str, str], ...]:
    """(prompt, background) with every background in turn: "a photo of a sks robot on grass"."""
    return tuple(
        (f"a photo of {noun} {BACKGROUND_PHRASES[place]}", place)
        for place in (BACKGROUNDS[i % len(BACKGROUNDS)] for i in range(count))
    )


def measure_subject(
    pipe: TextToImage, subject: Subject, name: str, how: Sampling, oracles: Oracles, count: int = 24
) -> SubjectMeasure:
    """Draw "a NAME" (such as `sks robot`) and "a class" on every background and compare with fresh renders of the subject."""
    word = subject.class_word
    references = render(subject_scenes(subject.name, 24, seed=7001)).image
    real = render(subject_scenes(subject.name, 24, seed=7002)).image
    asked, plain = subject_prompts(f"a {name}", count), subject_prompts(f"a {word}", count)
    images = sample(pipe, [text for text, _ in asked], how)
    others = sample(pipe, [text for text, _ in plain], how)
    read, kind = oracles.read(images).labels, CLASSES.index(word)
    wanted = torch.tensor([BACKGROUNDS.index(place) for _, place in asked])
    return SubjectMeasure(
        count=count,
        identity=_mean(oracles.identity(images, references)),
        identity_real=_mean(oracles.identity(real, references)),
        class_read=_share(read["class"] == kind),
        backgrounds_kept=_share(read["background"] == wanted),
        class_count=count,
        class_accuracy=_share(oracles.read(others).labels["class"] == kind),
        class_identity=_mean(oracles.identity(others, references)),
    )


def _mean(values: Tensor) -> float:
    return round(float(values.mean()), 4)


def closed(base: SubjectMeasure, tuned: SubjectMeasure) -> float:
    """The share of the distance between the untuned base and real renders that a delta closes."""
    distance = tuned.identity_real - base.identity
    return round((tuned.identity - base.identity) / distance, 4) if distance > 1e-6 else 0.0
