"""The oracles as a scorer of runs on the Toybox: is it this toy, or this style, and does it show what the prompt says?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Self

import torch
from PIL import Image
from torch import Tensor

from vgm_peft.digests import digest_of_files
from vgm_peft.errors import ConfigError
from vgm_peft.score import Common, Scorer
from vgm_peft.toybox.assets import asset_folder
from vgm_peft.toybox.nouns import BACKGROUND_PHRASES, POSITION_PHRASES
from vgm_peft.toybox.oracle import WEIGHTS, Oracles
from vgm_peft.toybox.oracle_net import HEADS

SIDE = 64
PHRASES: Mapping[str, Mapping[str, str]] = {"background": BACKGROUND_PHRASES, "position": POSITION_PHRASES}
"""How a prompt says the labels of a head; of the other heads it says the labels themselves."""


class OracleScorer(Scorer):
    """The identity oracle compares with the pictures to learn from; the reader says how surely it sees what was asked for."""

    name: ClassVar[str] = "oracles"

    def __init__(self, oracles: Oracles, digest: str) -> None:
        self.oracles, self.digest = oracles, digest

    @classmethod
    def load(cls, model: str) -> Self:
        """Load the project's oracles, or those of a folder. Raises `BaseModelError` when there are none."""
        folder = Path(model).expanduser() if model else asset_folder("oracles", WEIGHTS)
        return cls(Oracles.load(folder), digest_of_files([folder / WEIGHTS]))

    def likeness(self, pictures: Sequence[Image.Image], references: Sequence[Image.Image], of: Common) -> Tensor:
        """How surely pictures show the references' toy, 0 being its look-alikes; or the style that most references have."""
        ours, theirs = _seen(pictures), _seen(references)
        if of == "subject":
            return self.oracles.identity(ours, theirs)
        style = self.oracles.read(theirs).probabilities["style"].mean(0).argmax()
        return self.oracles.read(ours).probabilities["style"][:, style]

    def agreement(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """The mean probability of what each text names. Raises `ConfigError` for a text that names nothing of the world."""
        chances, scores = self.oracles.read(_seen(pictures)).probabilities, list[Tensor]()
        for number, text in enumerate(texts):
            named = wanted(text)
            if not named:
                raise ConfigError(
                    f'"{text}" names nothing that the Toybox has',
                    expected="a kind of toy, colour, material, background, place or size",
                    fix="ask for other pictures in scores.prompts",
                )
            scores.append(torch.stack([chances[head][number, label] for head, label in named.items()]).mean())
        return torch.stack(scores)


def wanted(text: str) -> dict[str, int]:
    """By head the label that a prompt names; heads of which it names several are left out, as is the style."""
    out: dict[str, int] = {}
    for head, labels in HEADS.items():
        said = PHRASES.get(head, {})
        found = [i for i, label in enumerate(labels) if re.search(rf"\b{said.get(label, label)}\b", text, re.IGNORECASE)]
        if len(found) == 1 and head != "style":
            out[head] = found[0]
    return out


def _seen(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures of any sizes at the size that the oracles know."""
    size = (SIDE, SIDE)
    return [p if p.size == size else p.convert("RGB").resize(size, Image.Resampling.BILINEAR) for p in pictures]
