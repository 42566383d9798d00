"""A network beside the base that learns to be heard: what a picture shows follows a second picture, or is like it.

One task for the whole table of side networks; its name is the network's, its options are the network's own. Pairs of
pictures teach most of them (Zhang et al. 2023, arXiv 2302.05543); those that are taught by the picture itself need no more.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self, cast

import torch
from torch import Tensor

from vgm_peft.annotate import names_in
from vgm_peft.beside import Beside
from vgm_peft.config import build
from vgm_peft.data import Source
from vgm_peft.errors import ConfigError
from vgm_peft.family import Base
from vgm_peft.side import Side
from vgm_peft.train.config import RunConfig
from vgm_peft.train.config_data import DataConfig
from vgm_peft.train.controls import Controls
from vgm_peft.train.manifest import digest_of_examples
from vgm_peft.train.objective import Lesson, Objective
from vgm_peft.train.pictures import Cut, Pictures, Prompts, Shown
from vgm_peft.train.pupil import Pupil
from vgm_peft.train.task import Group, Preview, Setup, Task, Turn

PREVIEWS = 4


@dataclass(frozen=True)
class Pair:
    """Pictures and what steers them, (B, 3 n, P, Q) in 0 .. 1 for n conditions."""

    shown: Shown
    control: Tensor
    unseen: Tensor | None = None
    """Which of them the network is to say nothing of, (B,) of bool."""


@dataclass
class Control(Task[Pair]):
    """A side network on pictures and what steers them; `of` makes it the task of one kind of them."""

    trains_delta: ClassVar[Literal["always", "asked", "never"]] = "asked"
    continues: ClassVar[bool] = True
    side: ClassVar[Side]

    config: RunConfig
    base: Base
    pupil: Pupil
    beside: Beside
    pictures: Pictures
    prompts: Prompts
    objective: Objective
    controls: Controls

    @classmethod
    def of(cls, side: Side) -> "type[Control]":
        """Return the task that trains a side network of this kind."""
        own = {"side": side, "name": side.name, "Options": side.Options, "steered": side.paired}
        own |= {"used_by": f"{'--control' if side.paired else '--image-prompt'} {{}}:PICTURE.png"}
        return cast("type[Control]", type(side.name, (cls,), own | {"drops_controls": type(side).silence is not Side.silence}))

    @classmethod
    def sources(cls, config: RunConfig) -> tuple[Source, ...]:
        """Every picture must have one that steers, where the network is taught by pairs, unless it is computed."""
        Pupil.check(cls.side, config)
        required, count = cls.side.paired and not config.data.annotator, cls._conditions(config)
        if config.data.annotator and len(names_in(config.data.annotator)) != count:
            raise ConfigError(f"data.annotator = {config.data.annotator!r} for a {cls.name}", expected=f"{count} of them")
        return tuple(replace(s, require_controls=required, conditions=count) for s in super().sources(config))

    @classmethod
    def _conditions(cls, config: RunConfig) -> int:
        """How many control pictures belong to a picture."""
        return cls.side.conditions(build(cls.Options, config.task.options, "task."))

    @classmethod
    def prepare(cls, setup: Setup) -> Self:
        """Cache latents and prompts, and make the network."""
        pictures = Pictures(setup.report.examples, setup)
        controls = Controls(pictures, cls.side.paired, setup, cls._conditions(setup.config))
        prompts = Prompts(pictures.captions(), setup, live=False)
        pupil = Pupil.of(cls.side, setup, cls.Options)
        setup.rest(False)
        beside = setup.cleanup.enter_context(Beside(setup.base, cls.side, pupil.network))
        objective = Objective.of(setup.base, setup.config.loss)
        return cls(setup.config, setup.base, pupil, beside, pictures, prompts, objective, controls)

    def groups(self) -> list[Group]:
        """What learns of the network, or on it."""
        return self.pupil.groups()

    def batch(self, turn: Turn) -> Pair:
        """Pictures and their control pictures, cut and mirrored alike."""
        shown = self.pictures.draw(turn)
        controls = torch.stack([self.controls(cut) for cut in shown.cuts]).to(self.pictures.device).float().div_(255.0)
        controls = self.side.thinned(self.pupil.network, controls, turn.generator("conditions"))
        return Pair(shown, controls, unseen(self.config.data, shown.captions, turn))

    def loss(self, batch: Pair, turn: Turn) -> Tensor:
        """The mean over the pictures, of the base with what the network adds."""
        shown = batch.shown
        self.beside.tell(batch.control, batch.unseen)
        condition = self.prompts(shown.captions)
        return self.objective.losses(Lesson(shown.x0, condition, shown.sizes, shown.mask), turn).mean()

    def evaluating(self) -> AbstractContextManager[None]:
        """The network without dropout."""
        return self.pupil.evaluating()

    def save(self, folder: Path) -> Path:
        """Write the network in its own layout."""
        return self.pupil.save(folder)

    @contextmanager
    def preview(self) -> Generator[Preview]:
        """The first captions and control pictures of the data."""
        examples = self.pictures.examples[:PREVIEWS]
        shown = [self._upright(i) for i in range(len(examples))]
        with self.pupil.evaluating():
            try:
                yield Preview(self.base.pipe, [e.caption for e in examples], lambda i: self.beside.tell(shown[i % len(shown)]))
            finally:
                self.beside.hush()

    def facts(self) -> Mapping[str, object]:
        """For the manifest."""
        examples = self.pictures.examples
        data = {"pictures": len(examples), "sha256": digest_of_examples(examples)}
        return {"data": {**data, **self.controls.facts(), **self.pupil.origin()}, **self.pupil.facts()}

    def _upright(self, index: int) -> Tensor:
        """What steers a picture as it is drawn in a preview, (1, 3 n, P, Q) in 0 .. 1."""
        crop = next(view.crops[0] for view in self.pictures.views if view.example == index)
        return self.controls(Cut(index, crop, False))[None].to(self.pictures.device).float().div_(255.0)


def unseen(data: DataConfig, captions: Sequence[str], turn: Turn) -> Tensor | None:
    """Draw which pictures of a turn lose what steers them, (B,) of bool; more often those without a caption, if both together
    are to be more frequent than chance. None where none ever does."""
    words, controls = data.caption_dropout, data.control_dropout
    if not controls:
        return None
    both = words * controls if data.both_dropout is None else data.both_dropout
    without = both / words if words else controls
    with_words = (controls - both) / (1.0 - words) if words < 1.0 else controls
    chance = torch.tensor([with_words if caption else without for caption in captions])
    return torch.rand(len(captions), generator=turn.generator("controls")) < chance
