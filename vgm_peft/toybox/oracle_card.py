"""What the oracles are worth: their accuracy on fresh renders, clean and worn, written to `card.json`."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from vgm_peft.toybox.cast import SUBJECTS, style_scenes, subject_scenes
from vgm_peft.toybox.drawing import draw_scene
from vgm_peft.toybox.nouns import COLOURS, MATERIALS, STYLES
from vgm_peft.toybox.oracle import Oracles
from vgm_peft.toybox.oracle_data import NEVER, controls_of, reader_labels, worn
from vgm_peft.toybox.oracle_net import HEADS, to_input
from vgm_peft.toybox.render import render


class Separation(TypedDict):
    """Identity similarity (means, 0..1) and how often the right answer is given."""

    same: float
    plain_toy_of_the_class: float
    another_subject: float
    right_at_one_half: float
    auc: float


def worn_bytes(images: Tensor, seed: int) -> Tensor:
    """Pictures with the wear of generated ones, as uint8 again."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x = torch.cat([worn(part) for part in to_input(images).split(64)])
    return ((x + 1) * 127.5 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def reading_accuracy(oracles: Oracles, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of right labels by head, of the pictures where there is one."""
    read = oracles.read(images).labels
    result: dict[str, float] = {}
    for k, name in enumerate(HEADS):
        known = labels[:, k] != NEVER
        if known.any():
            result[name] = round(float((read[name] == labels[:, k])[known].float().mean()), 4)
    return result


def _auc(same: Tensor, other: Tensor) -> float:
    """Chance that a same pair scores above a different one."""
    return float((same[:, None] > other[None]).float().mean() + 0.5 * (same[:, None] == other[None]).float().mean())


def identity_separation(oracles: Oracles, wear: bool, count: int = 16) -> Separation:
    """The eight subjects across scenes against plain toys of their class and against the other subjects."""
    sights = [render(subject_scenes(s.name, count, seed=991)).image for s in SUBJECTS]
    sights = [worn_bytes(images, 5) for images in sights] if wear else sights
    same, plain, other = [], [], []
    for k, subject in enumerate(SUBJECTS):
        references = render(subject_scenes(subject.name, 5)).image
        rng = random.Random(f"plain {subject.name}")
        toys = render([draw_scene(rng, kind=subject.class_word, toys=1, plain=True) for _ in range(count)]).image
        same.append(oracles.identity(sights[k], references))
        plain.append(oracles.identity(toys, references))
        others = torch.cat([images for j, images in enumerate(sights) if j != k])
        other.append(oracles.identity(others, references))
    yes, no = torch.cat(same), torch.cat((*plain, *other))
    right = 0.5 * ((yes > 0.5).float().mean() + (no < 0.5).float().mean())
    return Separation(
        same=round(float(yes.mean()), 4),
        plain_toy_of_the_class=round(float(torch.cat(plain).mean()), 4),
        another_subject=round(float(torch.cat(other).mean()), 4),
        right_at_one_half=round(float(right), 4),
        auc=round(_auc(yes, no), 4),
    )


def _control_agreement(oracles: Oracles, seed: int) -> dict[str, float]:
    rng = random.Random(f"card controls {seed}")
    drawn = render([draw_scene(rng) for _ in range(256)])
    wanted = controls_of(drawn)
    right, wrong = oracles.agreement(drawn.image, wanted), oracles.agreement(drawn.image, wanted.roll(1, 0))
    names = ("depth", "mask", "edges")
    result = {name: round(float(getattr(right, name).mean()), 4) for name in names}
    return result | {f"{name}_of_another_scene": round(float(getattr(wrong, name).mean()), 4) for name in names}


def write_card(oracles: Oracles, path: Path, seed: int = 0, count: int = 1600) -> None:
    """Measure on scenes that no training drew and write the card."""
    rng = random.Random(f"oracle card {seed}")
    scenes = [draw_scene(rng, toys=1, colour=rng.choice(tuple(COLOURS)), material=rng.choice(MATERIALS)) for _ in range(count)]
    images, labels = render(scenes).image, torch.tensor([reader_labels(scene) for scene in scenes])
    styled = [replace(s, style=style) for style in STYLES for s in style_scenes(style, 100, seed=991)]
    styled_images, styled_labels = render(styled).image, torch.tensor([reader_labels(s) for s in styled])
    card = {
        "pictures": count,
        "reading": reading_accuracy(oracles, images, labels),
        "reading_worn": reading_accuracy(oracles, worn_bytes(images, 7), labels),
        "reading_styled": reading_accuracy(oracles, styled_images, styled_labels),
        "identity_span": [round(v, 4) for v in oracles.span],
        "identity": identity_separation(oracles, wear=False),
        "identity_worn": identity_separation(oracles, wear=True),
        "controls": _control_agreement(oracles, seed),
    }
    path.write_text(json.dumps(card, indent=2) + "\n")
