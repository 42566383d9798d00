"""Textual Inversion: a new word whose embedding rows are all that is trained (Gal et al. 2022, arXiv 2208.01618, eq. 2)."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from vgm_peft.data import scan
from vgm_peft.delta import Delta
from vgm_peft.errors import ConfigError
from vgm_peft.family import Base
from vgm_peft.train.config import RunConfig, within
from vgm_peft.train.learner import provenance, save_delta
from vgm_peft.train.manifest import digest_of_examples
from vgm_peft.train.objective import Objective
from vgm_peft.train.pictures import Pictures, Prompts, Shown
from vgm_peft.train.task import Group, Preview, Setup, Task, Turn
from vgm_peft.words import WordAttachment, new_word

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
class InversionOptions:
    """`[task]` of a textual-inversion run."""

    token: str = "<new>"
    """The new word; no word that the base knows."""
    init_word: str = "object"
    """A text of the base's own from whose embedding the new word starts: what the thing roughly is."""
    vectors: int = 1
    """Embedding rows for the word, 1 .. 16; each takes a place in the prompt."""
    kind: Literal["object", "style"] = "object"
    """Which sentences to use."""
    templates: tuple[str, ...] = ()
    """Sentences of your own, each with one `{}`; left out: those of the kind."""

    def __post_init__(self) -> None:
        within("vectors", self.vectors, 1, 16)
        for template in self.templates:
            if template.count("{}") != 1:
                raise ConfigError(f'task.templates: "{template}"', expected="a sentence with one {}")

    @property
    def sentences(self) -> tuple[str, ...]:
        """The sentences with the word in them."""
        return tuple(t.replace("{}", self.token) for t in self.templates or TEMPLATES[self.kind])


@dataclass
class TextualInversion(Task[Shown]):
    """One new word."""

    name: ClassVar[str] = "textual-inversion"
    Options: ClassVar[type] = InversionOptions
    trains_delta: ClassVar[bool] = False

    config: RunConfig
    base: Base
    options: InversionOptions
    words: WordAttachment
    pictures: Pictures
    prompts: Prompts
    objective: Objective

    @classmethod
    def prepare(cls, setup: Setup) -> Self:
        """Read and encode the pictures, and put the new word on the base."""
        options = setup.options(InversionOptions)
        report = scan(setup.images)
        setup.report(report)
        pictures = Pictures(report.examples, setup)
        word = new_word(setup.base.pipe, options.token, options.init_word, options.vectors)
        words = WordAttachment(setup.base.pipe, [word], trainable=True)
        setup.cleanup.callback(words.remove)
        objective = Objective.of(setup.base, setup.config.loss)
        setup.rest(True)
        return cls(setup.config, setup.base, options, words, pictures, Prompts((), setup, live=True), objective)

    def groups(self) -> list[Group]:
        """The word's rows, one stack for each text encoder."""
        rows: dict[str, nn.Parameter] = {
            f"{token}:{part}/rows": rows for token, parts in self.words.rows.items() for part, rows in parts.items()
        }
        return [Group(self.config.optimiser.lr, rows)]

    def batch(self, turn: Turn) -> Shown:
        """Pictures, each with its own caption if it has one, else with a sentence drawn for it."""
        return self.pictures.draw(turn)

    def loss(self, batch: Shown, turn: Turn) -> Tensor:
        """The mean over the pictures."""
        captions = self._captions(batch, turn)
        return self.objective.losses(batch.x0, self.prompts(captions), batch.sizes, turn).mean()

    def _captions(self, batch: Shown, turn: Turn) -> list[str]:
        sentences = self.options.sentences
        drawn = torch.randint(len(sentences), (len(batch),), generator=turn.generator("sentences")).tolist()
        return [c if self.options.token in c else sentences[i] for c, i in zip(batch.captions, drawn, strict=True)]

    def save(self, folder: Path) -> Path:
        """Write the word and its exports."""
        metadata = {**provenance(self.config, self.base), "token": self.options.token}
        delta = Delta(self.base.family.name, words=self.words.words(), metadata=metadata)
        for word in delta.words.values():
            word.rows.update({part: rows.cpu() for part, rows in word.rows.items()})
        return save_delta(delta, folder, self.config, self.base)

    @contextmanager
    def preview(self) -> Generator[Preview]:
        """The word in the first sentences."""
        yield Preview(self.base.pipe, self.options.sentences[:2])

    def facts(self) -> Mapping[str, object]:
        """For the manifest."""
        examples = self.pictures.examples
        return {
            "data": {"pictures": len(examples), "sha256": digest_of_examples(examples)},
            "words": {self.options.token: self.options.vectors},
        }
