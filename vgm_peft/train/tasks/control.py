"""A network beside the base that learns to be heard: what a picture shows follows a second picture, or is like it.

One task for the whole table of side networks; its name is the network's, its options are the network's own. Pairs of
pictures teach most of them (Zhang et al. 2023, arXiv 2302.05543); those that are taught by the picture itself need no more.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Self, cast

import torch
from torch import Tensor, nn

from vgm_peft.beside import Beside
from vgm_peft.data import Source, load_control, load_pixels
from vgm_peft.family import Base
from vgm_peft.side import Side
from vgm_peft.train.config import RunConfig
from vgm_peft.train.manifest import digest_of_examples
from vgm_peft.train.objective import Lesson, Objective
from vgm_peft.train.pictures import Cut, Pictures, Prompts, Shown
from vgm_peft.train.task import Group, Preview, Setup, Task, Turn

KEPT_BYTES = 2**30
"""Control pictures kept in memory, 8 bits a value; what does not fit is read from its file at every turn."""
PREVIEWS = 4


@dataclass(frozen=True)
class Pair:
    """Pictures and what steers them, (B, 3, P, Q) in 0 .. 1."""

    shown: Shown
    control: Tensor


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
    kept: dict[Cut, Tensor] = field(default_factory=dict[Cut, Tensor])

    @classmethod
    def of(cls, side: Side) -> "type[Control]":
        """Return the task that trains a side network of this kind."""
        return cast("type[Control]", type(side.name, (cls,), {"side": side, "name": side.name, "Options": side.Options}))

    @classmethod
    def sources(cls, config: RunConfig) -> tuple[Source, ...]:
        """Every picture must have one that steers, where the network is taught by pairs."""
        return tuple(replace(source, require_controls=cls.side.paired) for source in super().sources(config))

    @classmethod
    def prepare(cls, setup: Setup) -> Self:
        """Cache latents and prompts, and make the network."""
        pictures = Pictures(setup.report.examples, setup)
        prompts = Prompts(pictures.captions(), setup, live=False)
        network = cls.side.create(setup.base, setup.options(cls.Options), setup.config.seed)
        if setup.config.compute.gradient_checkpointing and hasattr(network, "enable_gradient_checkpointing"):
            network.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
        setup.rest(False)
        beside = setup.cleanup.enter_context(Beside(setup.base, cls.side, network))
        objective = Objective.of(setup.base, setup.config.loss)
        return cls(setup.config, setup.base, network, beside, pictures, prompts, objective)

    def groups(self) -> list[Group]:
        """The network's parameters; its first-level modules are what must move."""
        named: dict[str, nn.Parameter] = {}
        for name, parameter in self.network.named_parameters():
            head, _, rest = name.partition(".")
            named[f"{self.side.name}.{head}/{rest}"] = parameter
        return [Group(self.config.optimiser.lr, named)]

    def batch(self, turn: Turn) -> Pair:
        """Pictures and their control pictures, cut and mirrored alike."""
        shown = self.pictures.draw(turn)
        controls = [self._control(cut) for cut in shown.cuts]
        return Pair(shown, torch.stack(controls).to(self.pictures.device).float().div_(255.0))

    def loss(self, batch: Pair, turn: Turn) -> Tensor:
        """The mean over the pictures, of the base with what the network adds."""
        shown = batch.shown
        self.beside.tell(batch.control)
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
        return {"data": {"pictures": len(examples), "sha256": digest_of_examples(examples)}, "network": self.side.name}

    def _control(self, cut: Cut) -> Tensor:
        """One control picture, (3, P, Q) uint8."""
        kept = self.kept.get(cut)
        if kept is None:
            example = self.pictures.examples[cut.example]
            if self.side.paired:
                floats = load_control(example, cut.crop, cut.flip)
            else:
                floats = (load_pixels(example, cut.crop, cut.flip) + 1.0) / 2.0
            kept = (floats * 255.0).round().to(torch.uint8)
            if (len(self.kept) + 1) * kept.numel() <= KEPT_BYTES:
                self.kept[cut] = kept
        return kept

    def _upright(self, index: int) -> Tensor:
        """What steers a picture as it is drawn in a preview, (1, 3, P, Q) in 0 .. 1."""
        crop = next(view.crops[0] for view in self.pictures.views if view.example == index)
        return self._control(Cut(index, crop, False))[None].to(self.pictures.device).float().div_(255.0)
