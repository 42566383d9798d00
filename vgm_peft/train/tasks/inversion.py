"""Textual Inversion: a new word whose embedding rows are all that is trained (Gal et al. 2022, arXiv 2208.01618, eq. 2)."""

import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from vgm_peft.data import Example, Source, names_word
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
"""Neutral sentences in which the new word does all the work; one is drawn for a picture whose caption has no place for it."""

RANDOM = re.compile(r"<rand[^>]*>|\{\}")
"""What in a beginning is no text of a caption's."""


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

    def says_it(self, caption: str) -> bool:
        """Say whether a caption holds the word; a prefix stands before every one that is not empty."""
        return names_word(caption, self.token) or self.prefix and bool(caption)

    def in_caption(self, caption: str) -> str:
        """Return a caption with the word in it, in place of what it begins as; one that names neither is returned as it is."""
        noun = RANDOM.sub("", self.init_word).strip()
        if not noun or self.says_it(caption):
            return caption
        return re.sub(rf"(?<!\w){re.escape(noun)}(?!\w)", lambda _: self.token, caption, count=1, flags=re.IGNORECASE)

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
    trains_delta: ClassVar[Literal["always", "asked", "never"]] = "never"

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
        """Nothing is put before captions: the word takes the place of what it begins as, or a sentence that of the caption."""
        return tuple(replace(source, trigger=config.data.trigger) for source in super().sources(config))

    @classmethod
    def prepare(cls, setup: Setup) -> Self:
        """Encode the pictures, and put the new words on the base, one for each concept that has one of its own."""
        common = setup.options(InversionOptions)
        options = tuple(
            replace(common, token=concept.token or common.token, init_word=concept.class_prompt or common.init_word)
            for concept in setup.config.concepts
        )
        examples = _named(setup, options)
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
        return caption if own.says_it(caption) else own.sentences[number]

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


def _named(setup: Setup, options: Sequence[InversionOptions]) -> tuple[Example, ...]:
    """The examples with the word in their captions; what is done to captions is said."""
    examples = setup.report.examples
    named = tuple(replace(e, caption=options[e.concept].in_caption(e.caption)) for e in examples)
    changed = [new.caption for old, new in zip(examples, named, strict=True) if new.caption != old.caption]
    if changed:
        setup.notice(f'the new word takes the place of what it begins as: "{changed[0]}" ({len(changed)} captions)')
    strange = [e for e in named if e.caption and not options[e.concept].says_it(e.caption)]
    if strange:
        own = options[strange[0].concept]
        setup.notice(
            f'{len(strange)} captions name neither "{own.token}" nor "{own.init_word}", as "{strange[0].caption}" does not: '
            f'sentences such as "{own.sentences[0]}" take their place'
        )
    return named
