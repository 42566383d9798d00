"""A network beside the base that learns to follow a control picture, from pairs of them (Zhang et al., arXiv 2302.05543)."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vgm_peft.data import Source, load_control
from vgm_peft.family import Base, Query, Residuals
from vgm_peft.side import Side
from vgm_peft.sides import side_named
from vgm_peft.stack.controls import Control, carrying
from vgm_peft.train.config import RunConfig
from vgm_peft.train.manifest import digest_of_examples
from vgm_peft.train.objective import Lesson, Objective
from vgm_peft.train.pictures import Cut, Pictures, Prompts, Shown
from vgm_peft.train.task import Group, Preview, Setup, Task, Turn

KEPT_BYTES = 2**30
"""Control pictures kept in memory, 8 bits a value; what does not fit is read from its file at every turn."""
PREVIEWS = 4


@dataclass(frozen=True, kw_only=True)
class ControlNetOptions:
    """`[task]` of a run that trains a side network."""

    network: str = "controlnet"
    """A line of the sides table."""


@dataclass(frozen=True)
class Pair:
    """Pictures and what steers them, (B, 3, P, Q) in 0 .. 1."""

    shown: Shown
    control: Tensor


@dataclass
class ControlNet(Task[Pair]):
    """A side network on paired pictures."""

    name: ClassVar[str] = "controlnet"
    Options: ClassVar[type] = ControlNetOptions
    trains_delta: ClassVar[bool] = False

    config: RunConfig
    base: Base
    side: Side
    network: nn.Module
    pictures: Pictures
    prompts: Prompts
    objective: Objective
    kept: dict[Cut, Tensor] = field(default_factory=dict[Cut, Tensor])

    @classmethod
    def sources(cls, config: RunConfig) -> tuple[Source, ...]:
        """Every picture must have one that steers."""
        return tuple(replace(source, require_controls=True) for source in super().sources(config))

    @classmethod
    def prepare(cls, setup: Setup) -> Self:
        """Cache latents and prompts, and make the network."""
        side = side_named(setup.options(ControlNetOptions).network)
        pictures = Pictures(setup.report.examples, setup)
        prompts = Prompts(pictures.captions(), setup, live=False)
        network = side.create(setup.base, setup.config.seed)
        if setup.config.compute.gradient_checkpointing and hasattr(network, "enable_gradient_checkpointing"):
            network.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
        setup.rest(False)
        return cls(setup.config, setup.base, side, network, pictures, prompts, Objective.of(setup.base, setup.config.loss))

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

        def side(query: Query) -> Residuals:
            return self.side.residuals(self.base, self.network, query, batch.control)

        shown = batch.shown
        condition = self.prompts(shown.captions)
        return self.objective.losses(Lesson(shown.x0, condition, shown.sizes, shown.mask), turn, side=side).mean()

    def save(self, folder: Path) -> Path:
        """Write the network's diffusers folder."""
        path = folder / self.side.name
        self.side.save(self.network, path)
        return path

    @contextmanager
    def preview(self) -> Generator[Preview]:
        """The first captions and control pictures of the data."""
        self.network.eval()
        try:
            examples = self.pictures.examples[:PREVIEWS]
            controls = [self._picture(i) for i in range(len(examples))]
            pipe, arguments = carrying(self.base, [Control(self.network, controls[0], 1.0)])
            extra: dict[str, list[Any]] = {name: [value] for name, value in arguments.items()}
            extra["image"] = [[control] for control in controls]
            yield Preview(pipe, [e.caption for e in examples], extra)
        finally:
            self.network.train()

    def facts(self) -> Mapping[str, object]:
        """For the manifest."""
        examples = self.pictures.examples
        return {"data": {"pictures": len(examples), "sha256": digest_of_examples(examples)}, "network": self.side.name}

    def _control(self, cut: Cut) -> Tensor:
        """One control picture, (3, P, Q) uint8."""
        kept = self.kept.get(cut)
        if kept is None:
            floats = load_control(self.pictures.examples[cut.example], cut.crop, cut.flip)
            kept = (floats * 255.0).round().to(torch.uint8)
            if (len(self.kept) + 1) * kept.numel() <= KEPT_BYTES:
                self.kept[cut] = kept
        return kept

    def _picture(self, index: int) -> Image.Image:
        crop = next(view.crops[0] for view in self.pictures.views if view.example == index)
        return Image.fromarray(np.ascontiguousarray(self._control(Cut(index, crop, False)).permute(1, 2, 0).numpy()))
