"""A network beside the base that learns to be heard: what a picture shows follows a second picture, or is like it.

One task for the whole table of side networks; its name is the network's, its options are the network's own. Pairs of
pictures teach most of them (Zhang et al. 2023, arXiv 2302.05543); those that are taught by the picture itself need no more.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self, cast

import torch
from torch import Tensor, nn

from vgm_peft.beside import Beside
from vgm_peft.data import Source
from vgm_peft.family import Base
from vgm_peft.side import Side
from vgm_peft.train.config import RunConfig
from vgm_peft.train.config_data import DataConfig
from vgm_peft.train.controls import Controls
from vgm_peft.train.manifest import digest_of_examples
from vgm_peft.train.objective import Lesson, Objective
from vgm_peft.train.pictures import Cut, Pictures, Prompts, Shown
from vgm_peft.train.task import Group, Preview, Setup, Task, Turn

PREVIEWS = 4


@dataclass(frozen=True)
class Pair:
    """Pictures and what steers them, (B, 3, P, Q) in 0 .. 1."""

    shown: Shown
    control: Tensor
    unseen: Tensor | None = None
    """Which of them the network is to say nothing of, (B,) of bool."""


@dataclass
class Control(Task[Pair]):
    """A side network on pictures and what steers them; `of` makes it the task of one kind of them."""

    trains_delta: ClassVar[bool] = False
    side: ClassVar[Side]

    config: RunConfig
    base: Base
    network: nn.Module
    beside: Beside
    pictures: Pictures
    prompts: Prompts
    objective: Objective
    controls: Controls

    @classmethod
    def of(cls, side: Side) -> "type[Control]":
        """Return the task that trains a side network of this kind."""
        own = {"side": side, "name": side.name, "Options": side.Options, "steered": side.paired}
        return cast("type[Control]", type(side.name, (cls,), own | {"drops_controls": type(side).silence is not Side.silence}))

    @classmethod
    def sources(cls, config: RunConfig) -> tuple[Source, ...]:
        """Every picture must have one that steers, where the network is taught by pairs, unless it is computed."""
        required = cls.side.paired and not config.data.annotator
        return tuple(replace(source, require_controls=required) for source in super().sources(config))

    @classmethod
    def prepare(cls, setup: Setup) -> Self:
        """Cache latents and prompts, and make the network."""
        pictures = Pictures(setup.report.examples, setup)
        controls = Controls(pictures, cls.side.paired, setup)
        prompts = Prompts(pictures.captions(), setup, live=False)
        network = cls.side.create(setup.base, setup.options(cls.Options), setup.config.seed)
        if setup.config.compute.gradient_checkpointing and hasattr(network, "enable_gradient_checkpointing"):
            network.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
        setup.rest(False)
        beside = setup.cleanup.enter_context(Beside(setup.base, cls.side, network))
        objective = Objective.of(setup.base, setup.config.loss)
        return cls(setup.config, setup.base, network, beside, pictures, prompts, objective, controls)

    def groups(self) -> list[Group]:
        """The network's parameters; its first-level modules are what must move."""
        rated: dict[float, dict[str, nn.Parameter]] = {}
        for name, parameter in self.network.named_parameters():
            head, _, rest = name.partition(".")
            rated.setdefault(self.side.rate(name), {})[f"{self.side.name}.{head}/{rest}"] = parameter
        return [Group(self.config.optimiser.lr * share, named) for share, named in rated.items()]

    def batch(self, turn: Turn) -> Pair:
        """Pictures and their control pictures, cut and mirrored alike."""
        shown = self.pictures.draw(turn)
        controls = [self.controls(cut) for cut in shown.cuts]
        return Pair(
            shown,
            torch.stack(controls).to(self.pictures.device).float().div_(255.0),
            unseen(self.config.data, shown.captions, turn),
        )

    def loss(self, batch: Pair, turn: Turn) -> Tensor:
        """The mean over the pictures, of the base with what the network adds."""
        shown = batch.shown
        self.beside.tell(batch.control, batch.unseen)
        condition = self.prompts(shown.captions)
        return self.objective.losses(Lesson(shown.x0, condition, shown.sizes, shown.mask), turn).mean()

    def save(self, folder: Path) -> Path:
        """Write the network in its own layout."""
        return self.side.save(self.network, folder / self.side.name)

    @contextmanager
    def preview(self) -> Generator[Preview]:
        """The first captions and control pictures of the data."""
        examples = self.pictures.examples[:PREVIEWS]
        shown = [self._upright(i) for i in range(len(examples))]
        self.network.eval()
        try:
            yield Preview(self.base.pipe, [e.caption for e in examples], lambda i: self.beside.tell(shown[i % len(shown)]))
        finally:
            self.beside.hush()
            self.network.train()

    def facts(self) -> Mapping[str, object]:
        """For the manifest."""
        examples = self.pictures.examples
        data = {"pictures": len(examples), "sha256": digest_of_examples(examples), **self.controls.facts()}
        return {"data": data, "network": self.side.name}

    def _upright(self, index: int) -> Tensor:
        """What steers a picture as it is drawn in a preview, (1, 3, P, Q) in 0 .. 1."""
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
