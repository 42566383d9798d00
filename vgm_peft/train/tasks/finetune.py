"""Fine-tuning on captioned pictures: teach a style, a world, many things at once; each picture says what is on it."""

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

from torch import Tensor

from vgm_peft.data import Source
from vgm_peft.errors import ConfigError
from vgm_peft.train.config import RunConfig
from vgm_peft.train.exam import Exam
from vgm_peft.train.learner import Learner, tag_frequency
from vgm_peft.train.manifest import digest_of_examples
from vgm_peft.train.objective import Lesson, Objective
from vgm_peft.train.pictures import Pictures, Prompts, Shown
from vgm_peft.train.task import Group, Preview, Setup, Task, Turn
from vgm_peft.train.wording import PivotalOptions

PREVIEWS = 4
"""Captions of the data that are drawn when no prompts are given."""


@dataclass(frozen=True, kw_only=True)
class FineTuneOptions(PivotalOptions):
    """Those of a new word, which some captions hold, where one is to be trained along. Captions come with the pictures."""


@dataclass
class FineTune(Task[Shown]):
    """A delta that lowers the denoising loss on captioned pictures."""

    name: ClassVar[str] = "finetune"
    Options: ClassVar[type] = FineTuneOptions

    learner: Learner
    pictures: Pictures
    prompts: Prompts
    objective: Objective

    @classmethod
    def sources(cls, config: RunConfig) -> tuple[Source, ...]:
        """Every picture must have a caption."""
        return tuple(replace(source, require_captions=True) for source in super().sources(config))

    @classmethod
    def prepare(cls, setup: Setup) -> Self:
        """Encode the pictures and their captions."""
        learner = Learner.fit(setup, _words(setup), [example.caption for example in setup.report.examples])
        pictures = Pictures(setup.report.examples, setup)
        prompts = Prompts(pictures.captions(), setup, live=learner.trains_text, wording=learner.wording)
        learner.attach(setup)
        setup.rest(prompts.live)
        return cls(learner, pictures, prompts, Objective.of(setup.base, setup.config.loss))

    def groups(self) -> list[Group]:
        """The delta's parameters."""
        return self.learner.groups()

    def batch(self, turn: Turn) -> Shown:
        """Pictures and their captions."""
        return self.pictures.draw(turn)

    def loss(self, batch: Shown, turn: Turn) -> Tensor:
        """The mean over the pictures."""
        condition = self.prompts(batch.captions)
        return self.objective.losses(Lesson(batch.x0, condition, batch.sizes, batch.mask), turn).mean()

    def evaluating(self) -> AbstractContextManager[None]:
        """The delta without dropout."""
        return self.learner.evaluating()

    def save(self, folder: Path) -> Path:
        """Write the delta and its exports."""
        return self.learner.save(folder, tag_frequency(self.pictures.captions()))

    @contextmanager
    def preview(self) -> Generator[Preview]:
        """The first captions of the data."""
        captions = list(dict.fromkeys(e.caption for e in self.pictures.examples))[:PREVIEWS]
        with self.learner.evaluating():
            yield Preview(self.learner.base.pipe, captions)

    def unlearned(self) -> AbstractContextManager[None]:
        """The base without the delta."""
        return self.learner.untouched()

    def exam(self) -> Exam:
        """The captions of the data; all else may change with them."""
        config = self.learner.config
        words = [(concept.token or config.data.trigger, "") for concept in config.concepts]
        return Exam(list(dict.fromkeys(e.caption for e in self.pictures.examples)), words=words, common="style")

    def facts(self) -> Mapping[str, object]:
        """For the manifest."""
        examples = self.pictures.examples
        return {"data": {"pictures": len(examples), "sha256": digest_of_examples(examples)}, "delta": self.learner.facts()}


def _words(setup: Setup) -> list[FineTuneOptions]:
    """The new words asked for: that of the task, or one for each concept that has a token. Each must stand in a caption."""
    common = setup.options(FineTuneOptions)
    if not common.vectors:
        return []
    tokens = dict.fromkeys(concept.token or common.token or setup.config.data.trigger for concept in setup.config.concepts)
    words = [replace(common, token=token) for token in tokens]
    captions = [example.caption for example in setup.report.examples]
    for word in words:
        if not word.prefix and not any(word.token and word.token in caption for caption in captions):
            raise ConfigError(
                f'no caption holds the new word "{word.token}"',
                expected="one that does, or the word would not be trained",
                fix='write it into the captions, or have it put before them all: --set data.trigger="<new>"',
            )
    return words
