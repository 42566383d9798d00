"""DreamBooth: a particular subject from a few pictures, bound to a rare word, without spoiling its class.

Ruiz et al. 2022, arXiv 2208.12242, eq. 2: the loss on the subject's pictures under "a [token] class", plus lambda times
the loss on pictures of the class that the untouched base drew under "a class". Unless the paper's own form is asked for,
their target is what the untouched base predicts for them: of what should stay as it is, that is the exact measure. Those
class pictures are kept as the latents they were sampled as; they never go through the VAE, and the cache has them for the
next run.
"""

import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from vgm_peft.config import build
from vgm_peft.data import Example, Source, names_word
from vgm_peft.errors import ConfigError, DataError
from vgm_peft.family import Query
from vgm_peft.train.config import RunConfig
from vgm_peft.train.exam import PLACES, Exam
from vgm_peft.train.learner import Learner, tag_frequency
from vgm_peft.train.limits import within
from vgm_peft.train.manifest import digest_of_examples
from vgm_peft.train.objective import Lesson, Objective, Teacher
from vgm_peft.train.pictures import Pictures, Prompts, Shown
from vgm_peft.train.prior import ClassPictures, ClassPlan
from vgm_peft.train.task import Group, Preview, Setup, Task, Turn
from vgm_peft.train.wording import PivotalOptions

LOOSE = frozenset("a an the of on in at with and by from to under near beside".split())
"""Words that end no name of a thing."""


@dataclass(frozen=True, kw_only=True)
class DreamBoothOptions(PivotalOptions):
    """`[task]` of a DreamBooth run."""

    token: str = "sks"
    """The rare word that comes to mean the subject; where `vectors` asks for a new one, a word that the base does not have."""
    class_prompt: str = ""
    """What kind of thing it is: `a robot`. The subject is then `a sks robot`; left out, there are no class pictures."""
    prompt: str = ""
    """The text of pictures that have no caption of their own; left out: the class prompt with the token in it."""
    prior_weight: float = 1.0
    """Lambda: what the class pictures weigh against the subject's; 0 is none of them (it saves half of each step)."""
    class_images: int = 100
    """How many class pictures the base draws: by the class prompt and, where there are any, the captions without the token."""
    prior: Literal["pictures", "base"] = "base"
    """What the class pictures teach: `pictures` what they show (eq. 2), `base` to be predicted as the untouched base does:
    nothing drifts then, even when they are few or bad, for half a forward more."""
    class_batch: int = 0
    """Class pictures per micro-batch; 0 is as many as `data.batch`."""
    class_steps: int = 25
    class_guidance: float | None = None
    """Classifier-free guidance of the class pictures; the base's own when left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within("prior_weight", self.prior_weight, 0.0, 1000.0)
        within("class_images", self.class_images, 0, 100_000)
        within("class_batch", self.class_batch, 0, 4096)
        within("class_steps", self.class_steps, 1, 1000)
        within("class_guidance", self.class_guidance or 0.0, 0.0, 100.0)

    @property
    def instance_prompt(self) -> str:
        """The text for the subject."""
        return self.prompt or with_token(self.class_prompt, self.token)

    def plan(self, prompts: Sequence[str], batch: int) -> ClassPlan | None:
        """How classes are drawn, if at all: by `prompts` in turn; `batch` is the subjects' pictures per turn."""
        if not (prompts and self.prior_weight and self.class_images):
            return None
        texts, batch = tuple(dict.fromkeys(prompts)), self.class_batch or batch
        return ClassPlan(texts, self.class_images, batch, self.class_steps, self.class_guidance)


@dataclass(frozen=True)
class Both:
    """A batch: the subject's pictures, and latents of its class (B', C, H, W) with their prompts where there are any."""

    subject: Shown
    kind: tuple[Tensor, list[str]] | None


@dataclass
class DreamBooth(Task[Both]):
    """A delta that knows a subject by a word, or several, each by its own."""

    name: ClassVar[str] = "dreambooth"
    Options: ClassVar[type] = DreamBoothOptions

    subjects: tuple[DreamBoothOptions, ...]
    """What is known of each; they differ in token, class and prompt alone."""
    learner: Learner
    pictures: Pictures
    kind: ClassPictures | None
    prompts: Prompts
    untouched: Prompts
    """The class prompts as the untouched base reads them."""
    objective: Objective

    @classmethod
    def sources(cls, config: RunConfig) -> tuple[Source, ...]:
        """Pictures without a caption are trained under the subject's prompt."""
        subjects = _subjects(config)
        return tuple(
            replace(source, caption=subject.instance_prompt, trigger=config.data.trigger)
            for source, subject in zip(super().sources(config), subjects, strict=True)
        )

    @classmethod
    def prepare(cls, setup: Setup) -> Self:
        """Have the base draw the subjects' classes, cache latents and prompts, attach the delta."""
        subjects, prompts_of_class = _read(setup)
        options = subjects[0]
        examples = [_named(example, subjects[example.concept]) for example in setup.report.examples]
        words = [replace(s, init_word=(s.init_word or "{}").replace("{}", noun_of(s.class_prompt))) for s in subjects]
        learner = Learner.fit(setup, words, [example.caption for example in examples])
        pictures = Pictures(examples, setup)
        plan = options.plan(prompts_of_class, setup.config.data.batch)
        kind = ClassPictures.drawn(setup, plan) if plan else None
        if options.prior_weight and not all(subject.class_prompt for subject in subjects):
            setup.notice("no --class-prompt: nothing keeps the base from taking everything of that kind for this subject")
        texts = [*pictures.captions(), *(plan.prompts if plan else ())]
        prompts = Prompts(texts, setup, live=learner.trains_text, wording=learner.wording)
        untouched = Prompts(plan.prompts if plan and options.prior == "base" else (), setup, live=False)
        learner.attach(setup)
        setup.rest(prompts.live)
        return cls(subjects, learner, pictures, kind, prompts, untouched, Objective.of(setup.base, setup.config.loss))

    def groups(self) -> list[Group]:
        """The delta's parameters."""
        return self.learner.groups()

    def batch(self, turn: Turn) -> Both:
        """Pictures of the subject and latents of its class."""
        return Both(self.pictures.draw(turn), None if self.kind is None else self.kind.draw(turn))

    def loss(self, batch: Both, turn: Turn) -> Tensor:
        """Eq. 2: each part is averaged over its own pictures; parts of one size go through the network together."""
        subject = batch.subject
        lesson = Lesson(subject.x0, self.prompts(subject.captions), subject.sizes, subject.mask)
        if batch.kind is None or self.kind is None:
            return self.objective.losses(lesson, turn).mean()
        (kind, texts), count = batch.kind, len(subject)
        prior, teacher = Lesson(kind, self.prompts(texts), self.kind.sizes(len(kind))), self._teacher(texts)
        if kind.shape[1:] != subject.x0.shape[1:]:
            ours = self.objective.losses(lesson, turn)
            theirs = self.objective.losses(prior, turn, teacher=teacher, purpose="class noise")
        else:
            both = self.objective.losses(lesson + prior, turn, teacher=teacher)
            ours, theirs = both[:count], both[count:]
        return ours.mean() + self.subjects[0].prior_weight * theirs.mean()

    def _teacher(self, texts: list[str]) -> Teacher | None:
        """What the untouched base answers for the class pictures, which are the last of a question."""
        if self.subjects[0].prior == "pictures":
            return None

        def answer(query: Query, target: Tensor) -> Tensor:
            first = len(target) - len(texts)
            sizes = None if query.sizes is None else query.sizes[first:]
            asked = Query(query.noisy[first:], query.t[first:], self.untouched(texts), sizes)
            with self.learner.untouched():
                kept = self.objective.base.family.predict(self.objective.base, asked)
            return torch.cat([target[:first], kept.to(target.dtype)])

        return answer

    def evaluating(self) -> AbstractContextManager[None]:
        """The delta without dropout."""
        return self.learner.evaluating()

    def save(self, folder: Path) -> Path:
        """Write the delta and its exports."""
        subjects = self.subjects
        words = {
            "token": ", ".join(subject.token for subject in subjects),
            "prompt": "; ".join(subject.instance_prompt for subject in subjects),
            "class_prompt": "; ".join(subject.class_prompt for subject in subjects),
        }
        return self.learner.save(folder, {**words, **tag_frequency(self.pictures.captions())})

    @contextmanager
    def preview(self) -> Generator[Preview]:
        """Each subject and, to see that it stays as it was, its class."""
        prompts = [text for subject in self.subjects for text in (subject.instance_prompt, subject.class_prompt) if text]
        with self.learner.evaluating():
            yield Preview(self.learner.base.pipe, prompts)

    def unlearned(self) -> AbstractContextManager[None]:
        """The base without the delta."""
        return self.learner.untouched()

    def exam(self) -> Exam:
        """Each subject in several places; its class there should stay what it was."""
        both = [(subject, place) for place in PLACES for subject in self.subjects]
        return Exam(
            prompts=[f"{with_token(subject.class_prompt, subject.token)} {place}" for subject, place in both],
            others=[f"{subject.class_prompt} {place}" for subject, place in both if subject.class_prompt],
            words=[(subject.token, "") for subject in self.subjects],
        )

    def facts(self) -> Mapping[str, object]:
        """For the manifest."""
        examples = self.pictures.examples
        return {
            "data": {"pictures": len(examples), "sha256": digest_of_examples(examples)},
            "class_pictures": 0 if self.kind is None else len(self.kind),
            "delta": self.learner.facts(),
        }


def _subjects(config: RunConfig) -> tuple[DreamBoothOptions, ...]:
    """What is asked for each folder of pictures. Raises `ConfigError` for subjects that would share a word unasked."""
    common, concepts = build(DreamBoothOptions, config.task.options, "task."), config.concepts
    for number, concept in enumerate(concepts if len(concepts) > 1 else ()):
        if not concept.token:
            raise ConfigError(f"concept[{number}] ({concept.images}) has no token", expected="a word of its own for each")
    return tuple(
        replace(
            common,
            token=concept.token or common.token,
            class_prompt=concept.class_prompt or common.class_prompt,
            prompt=concept.prompt or common.prompt,
        )
        for concept in concepts
    )


def _read(setup: Setup) -> tuple[tuple[DreamBoothOptions, ...], list[str]]:
    """What is known of each subject, and the prompts for all their classes.

    Captions that do not name the subject are prompts for its class. Pictures with captions need no class prompt: what all
    captions begin with says what they show.
    """
    subjects: list[DreamBoothOptions] = []
    prompts: list[str] = []
    for number, subject in enumerate(_subjects(setup.config)):
        examples = [example for example in setup.report.examples if example.concept == number]
        captions = [example.caption for example in examples if not names_word(example.caption, subject.token)]
        if captions and not subject.class_prompt:
            subject = replace(subject, class_prompt=common_start(captions))
            setup.notice(f'the class is taken from the captions: --class-prompt "{subject.class_prompt}"')
        if captions:
            setup.notice(f'"{subject.token}" is put into the captions: "{_named(examples[0], subject).caption}"')
        subjects.append(subject)
        if subject.class_prompt:
            prompts += [*captions, subject.class_prompt]
    return tuple(subjects), prompts


def common_start(captions: Sequence[str]) -> str:
    """The words that all captions begin with, without a preposition or article at the end."""
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*(caption.split() for caption in captions), strict=False))
    start = [column[0] for column in alike]
    while start and start[-1].lower() in LOOSE:
        start.pop()
    return " ".join(start).rstrip(",;:")


def with_token(text: str, token: str, noun: str = "") -> str:
    """Put the token before the noun: `a red robot` becomes `a sks red robot`.

    The noun is what follows the last article, or `noun` where that is given and found; without either, the token leads.
    """
    if noun:
        return re.sub(rf"\b{re.escape(noun)}\b", lambda found: f"{token} {found[0]}", text, count=1, flags=re.IGNORECASE)
    articles = list(re.finditer(r"\b(?:a|an|the)\s+", text, re.IGNORECASE))
    place = articles[-1].end() if articles else 0
    return f"{text[:place]}{token} {text[place:]}".strip()


def noun_of(class_prompt: str) -> str:
    """What the class prompt is about: what follows its last article."""
    return re.split(r"\b(?:a|an|the)\s+", class_prompt, flags=re.IGNORECASE)[-1].strip()


def _named(example: Example, options: DreamBoothOptions) -> Example:
    """Make sure that the caption names the subject: a picture's own caption gets the token before the class's noun."""
    if names_word(example.caption, options.token):
        return example
    noun = noun_of(options.class_prompt)
    caption = with_token(example.caption, options.token, noun) if noun else example.caption
    if caption == example.caption:
        raise DataError(
            f'the caption of {example.path.name}, "{example.caption}"',
            expected=f'"{options.token}" or "{noun or "the class"}" in it',
            fix=f'write "{options.token}" before the word for the subject, or delete the caption file',
        )
    return replace(example, caption=caption)
