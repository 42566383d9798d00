"""What drawn pictures tell of a run: always the same prompts from the same noise, read by a scorer (see `score.py`).

Twice scored with the same parameters the pictures get the same scores to the last bit, and nothing of the training is changed.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vgm_peft.data import names_word
from vgm_peft.data.pictures import decode, read_bytes
from vgm_peft.score import Common, Scorer, Scores, distance
from vgm_peft.train.preview import easel
from vgm_peft.train.sampler import Drawing, draw
from vgm_peft.train.task import Setup, Task

PLACES = ("in a studio", "on grass", "on sand", "at night", "in the sky", "on a wooden floor")
"""Where a thing is asked for: places that photographs and the Toybox know, and hardly one of them those of its own pictures."""
REFERENCES, LONGEST = 32, 1024
"""Most pictures to learn from that drawn ones are compared with, and the longest side in pixels at which they are kept."""


@dataclass(frozen=True)
class Exam:
    """What a task suggests to draw for its scores."""

    prompts: Sequence[str]
    """They ask for what is learned."""
    others: Sequence[str] = ()
    """They ask for what should stay as it was; none where nothing else can change, or where all may."""
    words: Sequence[tuple[str, str]] = ()
    """For each concept the new word, and what a scorer is told in its place."""
    common: Common = "subject"
    """What the pictures to learn from have in common."""

    def told(self, prompt: str) -> str:
        """A prompt in words that a scorer can know."""
        for word, known in self.words:
            prompt = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", lambda _, known=known: known, prompt) if word else prompt
        return " ".join(prompt.split())

    def concepts(self, prompt: str) -> frozenset[int]:
        """Numbers of the concepts whose word a prompt names; all of them where it names none."""
        named = frozenset(i for i, (word, _) in enumerate(self.words) if word and names_word(prompt, word))
        return named or frozenset(range(len(self.words)))


class Examiner:
    """Draws and scores for one run. The pictures of the untouched base are drawn when it is made, the same after a resume."""

    def __init__(self, task: Task[Any], setup: Setup, scorer: Scorer) -> None:
        self._task, self._setup, self._scorer = task, setup, scorer
        self.exam, plan = task.exam(), setup.config.scores
        self._asked = _in_turn(plan.prompts or self.exam.prompts, plan.pictures)
        self._others = _in_turn(plan.others or self.exam.others, plan.pictures)
        self._references = {key: self._pictures_of(key) for key in map(self.exam.concepts, self._asked)}
        self._theirs = torch.empty(0)
        self.base = self._agreed(self._first)
        """The scores of the untouched base."""

    def scores(self) -> Scores:
        """Draw and score the parameters as they are."""
        return self._agreed(lambda: self._scores(*self._drawn()))

    def facts(self) -> dict[str, object]:
        """For the manifest: what is asked, by what it is read, and where the base stands."""
        told = {"prompts": list(dict.fromkeys(self._asked)), "others": list(dict.fromkeys(self._others))}
        return {"by": self._scorer.name, "sha256": self._scorer.digest, **told, "base": self.base.table()}

    def _first(self) -> Scores:
        with self._task.unlearned():
            asked, self._theirs = self._drawn()
        return self._scores(asked, self._theirs)

    def _drawn(self) -> tuple[Tensor, Tensor]:
        """Pictures of what is asked, and of others, (B, P, Q, 3) uint8."""
        with easel(self._task, self._setup) as (_, pipe):
            return self._draw(pipe, self._asked), self._draw(pipe, self._others)

    def _draw(self, pipe: Any, prompts: Sequence[str]) -> Tensor:
        config, base = self._setup.config, self._setup.base
        plan, together, parts = config.scores, config.data.batch, list[Tensor]()
        for start in range(0, len(prompts), together):  # as many at once as a step has pictures, for which there is room
            how = Drawing(seed=config.seed + start, steps=plan.steps, guidance=plan.guidance)
            parts.append(draw(pipe, base, prompts[start : start + together], how))
        return torch.cat(parts) if parts else torch.empty(0)

    def _scores(self, asked: Tensor, others: Tensor) -> Scores:
        pictures = [Image.fromarray(one.numpy()) for one in asked]
        keys = [self.exam.concepts(prompt) for prompt in self._asked]
        self._scorer.to(self._setup.device)
        like = torch.empty(len(pictures))
        for key, references in self._references.items():
            places = [i for i, own in enumerate(keys) if own == key]
            like[places] = self._scorer.likeness([pictures[i] for i in places], references, self.exam.common)
        shown = self._scorer.agreement(pictures, [self.exam.told(prompt) for prompt in self._asked])
        self._scorer.to("cpu")  # it leaves the training its memory
        drift = distance(others, self._theirs) if self._others else None
        return Scores(float(like.mean()), None if shown is None else float(shown.mean()), drift)

    def _pictures_of(self, concepts: frozenset[int]) -> list[Image.Image]:
        """The pictures to learn from of some concepts, or evenly spread ones of very many."""
        examples = [e for e in self._setup.report.examples if e.concept in concepts]
        count = min(len(examples), REFERENCES)
        found = [decode(read_bytes(examples[i * len(examples) // count].path)) for i in range(count)]
        for picture in found:
            picture.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)  # no scorer sees more; smaller ones stay
        return found

    def _agreed(self, score: Callable[[], Scores]) -> Scores:
        """The scores as the main process has them, for all: they must draw the same conclusions."""
        accelerator = self._setup.accelerator
        if accelerator.num_processes == 1:
            return score()
        from accelerate.utils import broadcast_object_list

        found: list[Any] = [score() if accelerator.is_main_process else None]
        return broadcast_object_list(found)[0]


def _in_turn(prompts: Sequence[str], count: int) -> list[str]:
    return [prompts[i % len(prompts)] for i in range(count)] if prompts else []
