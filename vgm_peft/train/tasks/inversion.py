"""Textual Inversion: a new word whose embedding rows are all that is trained (Gal et al. 2022, arXiv 2208.01618, eq. 2)."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from vgm_peft.data import Source
from vgm_peft.delta import Delta
from vgm_peft.errors import ConfigError
from vgm_peft.family import Base
from vgm_peft.train.config import RunConfig
from vgm_peft.train.exam import PLACES, Exam
from vgm_peft.train.learner import provenance, save_delta
from vgm_peft.train.limits import within
from vgm_peft.train.manifest import digest_of_examples
from vgm_peft.train.objective import Lesson, Objective
from vgm_peft.train.pictures import Cut, Pictures, Prompts, Shown
from vgm_peft.train.task import Group, Preview, Setup, Task, Turn
from vgm_peft.train.wording import Wording, WordOptions

TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "object": (
        "a {}",
        "a photo of a {}",
        "a picture of a {}",
        "a close-up of a {}",
        "one {}",
        "the {}",
        "a good photo of the {}",
    ),
    "style": ("{}", "a picture in the style of {}", "a painting in the style of {}", "a drawing in the style of {}"),
}
"""Neutral sentences in which the new word must do all the work; one is drawn for each picture without a caption."""


@dataclass(frozen=True, kw_only=True)
class InversionOptions(WordOptions):
    """`[task]` of a textual-inversion run."""

    token: str = "<new>"
    init_word: str = "object"
    vectors: int = 1
    kind: Literal["object", "style"] = "object"
    """Which sentences to use."""
    templates: tuple[str, ...] = ()
    """Sentences of your own, each with one `{}`; left out: those of the kind."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within("vectors", self.vectors, 1, 1000)
        for template in self.templates:
            if template.count("{}") != 1:
                raise ConfigError(f'task.templates: "{template}"', expected="a sentence with one {}")

    @property
    def sentences(self) -> tuple[str, ...]:
        """The sentences with the word in them; a prefix stands before them, which then say what it began as."""
        word = self.init_word if self.prefix else self.token
        return tuple(t.replace("{}", word) for t in self.templates or TEMPLATES[self.kind])


@dataclass
class TextualInversion(Task[Shown]):
    """One new word."""

    name: ClassVar[str] = "textual-inversion"
    Options: ClassVar[type] = InversionOptions
    trains_delta: ClassVar[bool] = False

    config: RunConfig
    base: Base
    options: tuple[InversionOptions, ...]
    """Those of each concept."""
    wording: Wording
    pictures: Pictures
    prompts: Prompts
    objective: Objective

    @classmethod
    def sources(cls, config: RunConfig) -> tuple[Source, ...]:
        """Nothing is put before captions: one without the word gives way to a sentence with it."""
        return tuple(replace(source, trigger=config.data.trigger) for source in super().sources(config))

    @classmethod
    def prepare(cls, setup: Setup) -> Self:
        """Encode the pictures, and put the new words on the base, one for each concept that has one of its own."""
        common = setup.options(InversionOptions)
        options = tuple(
            replace(common, token=concept.token or common.token, init_word=concept.class_prompt or common.init_word)
            for concept in setup.config.concepts
        )
        examples = setup.report.examples
        own = [text for o in options for text in o.sentences]
        wording = Wording.of(setup, options, [*own, *(example.caption for example in examples)])
        pictures = Pictures(examples, setup)
        wording.attach(setup)
        objective = Objective.of(setup.base, setup.config.loss)
        setup.rest(True)
        return cls(setup.config, setup.base, options, wording, pictures, Prompts((), setup, live=True), objective)

    def groups(self) -> list[Group]:
        """The words' rows, one stack for each text encoder."""
        return self.wording.groups(self.config.optimiser.lr)

    def batch(self, turn: Turn) -> Shown:
        """Pictures, each with its own caption if it has one, else with a sentence drawn for it."""
        return self.pictures.draw(turn)

    def loss(self, batch: Shown, turn: Turn) -> Tensor:
        """The mean over the pictures."""
        condition = self.prompts(self._captions(batch, turn))
        return self.objective.losses(Lesson(batch.x0, condition, batch.sizes, batch.mask), turn).mean()

    def _captions(self, batch: Shown, turn: Turn) -> list[str]:
        count = len(self.options[0].sentences)
        drawn = torch.randint(count, (len(batch),), generator=turn.generator("sentences")).tolist()
        return [self._caption(c, cut, i) for c, cut, i in zip(batch.captions, batch.cuts, drawn, strict=True)]

    def _caption(self, caption: str, cut: Cut, number: int) -> str:
        """The picture's own caption where that holds its word, else the sentence of that number."""
        own = self.options[self.pictures.examples[cut.example].concept]
        return caption if own.token in caption or own.prefix and caption else own.sentences[number]

    def save(self, folder: Path) -> Path:
        """Write the words and their exports."""
        words = self.wording.now()
        metadata = {**provenance(self.config, self.base), "token": ", ".join(words)}
        delta = Delta(self.base.family.name, words=words, metadata=metadata)
        return save_delta(delta, folder, self.config, self.base)

    @contextmanager
    def preview(self) -> Generator[Preview]:
        """The words in the first sentences."""
        yield Preview(self.base.pipe, [sentence for own in self.options for sentence in own.sentences[:2]])

    def exam(self) -> Exam:
        """Things in several places, styles in their sentences; prompts without a new word draw what they drew."""
        words = [(own.token, own.init_word) for own in self.options]
        if self.options[0].kind == "style":
            return Exam([sentence for own in self.options for sentence in own.sentences], words=words, common="style")
        return Exam([f"a {own.token} {place}" for place in PLACES for own in self.options], words=words)

    def facts(self) -> Mapping[str, object]:
        """For the manifest."""
        examples = self.pictures.examples
        return {
            "data": {"pictures": len(examples), "sha256": digest_of_examples(examples)},
            "words": {own.token: own.vectors for own in self.options},
        }
