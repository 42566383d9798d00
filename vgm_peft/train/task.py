"""The `Task` noun: what a run optimises; and the `Turn`, the one source of all chance in a run.

The loop asks a task for four things: its parameters, the batch of a turn, the loss of that batch, and, at the end, to
save what it made. A new task is one file under `tasks/` and one line in its table.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from vgm_peft.config import build
from vgm_peft.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DiffusionPipeline

    from vgm_peft.data import Cache, Report, Source
    from vgm_peft.family import Base
    from vgm_peft.train.config import RunConfig
    from vgm_peft.train.exam import Exam

Batch = TypeVar("Batch")
Options = TypeVar("Options")


@dataclass(frozen=True)
class Turn:
    """One micro-batch of one process, numbered over the whole run: (step * accumulation + micro) * processes + rank.

    Whatever is random in it is a function of `seed` and `number` alone, so there is no state of chance to save: a resumed
    run draws what the uninterrupted one would have drawn.
    """

    seed: int
    number: int
    held_out: bool = False
    """A turn that is never trained on, only measured; its pictures are those kept back, where there are any."""

    def value(self, purpose: str = "") -> int:
        """A number in 0 .. 2^63-1 for one purpose; different purposes are independent."""
        text = f"{self.seed}/{self.number}/{purpose}{'/held out' if self.held_out else ''}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1

    def generator(self, purpose: str = "") -> torch.Generator:
        """A fresh CPU generator for one purpose."""
        return torch.Generator().manual_seed(self.value(purpose))


def own_chance(device: torch.device) -> AbstractContextManager[None]:
    """A context whose use of torch's global chance leaves no trace outside."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@dataclass(frozen=True)
class Length:
    """How long rows of a parameter are to be: at most `mean` after each step (`clamp`), or drawn towards it (`pull`)."""

    kind: Literal["clamp", "pull"]
    mean: float


@dataclass(frozen=True)
class Group:
    """Parameters that are trained alike, by name `unit/parameter`; a unit is what must have moved when the run ends."""

    rate: float
    parameters: Mapping[str, nn.Parameter]
    decay: float | None = None
    """Weight decay; left out: the run's."""
    span: tuple[float, float] = (0.0, 1.0)
    """The share of the run in which they are trained, from one point to another; before and after, they rest."""
    length: Length | None = None


@dataclass(frozen=True)
class Setup:
    """What a task is made from."""

    config: "RunConfig"
    base: "Base"
    cache: "Cache"
    accelerator: "Accelerator"
    cleanup: ExitStack
    """What must be undone when the run is over, however it ends."""
    notices: list[str] = field(default_factory=list[str])
    """What the user should know; printed before the first step and kept in the manifest."""
    surveyed: "Report | None" = None
    """The pictures, where they have been read already."""

    @property
    def device(self) -> torch.device:
        """Where the arithmetic is done."""
        return self.accelerator.device

    @cached_property
    def report(self) -> "Report":
        """What the run's folders of pictures hold."""
        from vgm_peft.train.survey import survey

        return self.surveyed or survey(self.config)

    @contextmanager
    def progress(self, title: str, total: int) -> Generator[Callable[[int, int], None]]:
        """Show a bar while something is prepared; gives a function to be told how many of how many are done."""
        from tqdm import tqdm

        with tqdm(total=total, desc=title, leave=False, disable=not self.accelerator.is_main_process) as bar:

            def tell(done: int, total: int) -> None:
                bar.update(done - bar.n)

            yield tell

    def notice(self, text: str) -> None:
        """Note something that the user should know."""
        self.notices.append(text)

    def options(self, kind: type[Options]) -> Options:
        """The task's own options, bound to its dataclass."""
        return build(kind, self.config.task.options, "task.")

    def rest(self, live_text: bool) -> None:
        """Move what a step does not need (the VAE; the text encoders unless `live_text`) off an accelerator for the run."""
        if self.device.type != "cpu":
            for name, module in self.base.pipe.components.items():
                if isinstance(module, nn.Module) and (name == "vae" or name.startswith("text_encoder") and not live_text):
                    module.to("cpu")
                    self.cleanup.callback(module.to, self.device)

    @contextmanager
    def awake(self) -> Generator[None]:
        """Have every part of the base on the device for a while."""
        modules = [m for m in self.base.pipe.components.values() if isinstance(m, nn.Module)]
        places = [(m, next(m.parameters()).device) for m in modules]
        for module in modules:
            module.to(self.device)
        try:
            yield
        finally:
            for module, place in places:
                module.to(place)


@dataclass(frozen=True)
class Preview:
    """What a task suggests to draw: a pipeline that has what is being trained in it, and its calls."""

    pipe: "DiffusionPipeline"
    prompts: Sequence[str]
    before: Callable[[int], None] = lambda number: None
    """What is to be done before the picture of a number is drawn, counted from 0."""


class Task(ABC, Generic[Batch]):
    """What a run optimises. Made by `prepare`, which does all that is done once (reading pictures, caching latents)."""

    name: ClassVar[str]
    Options: ClassVar[type]
    """A frozen dataclass: what stands in `[task]` besides `name`."""
    drops_controls: ClassVar[bool] = False
    """Its pictures can be without what steers them: `data.control_dropout` means something."""
    trains_delta: ClassVar[Literal["always", "asked", "never"]] = "always"
    """Whether a delta is what it trains: `asked` is where `[delta]` is given."""
    continues: ClassVar[bool] = False
    """It can go on from a saved network: `task.start` means something."""
    used_by: ClassVar[str] = "--delta {}"
    """How `vgm-generate` is told what was trained, the path in place of {}."""
    steered: ClassVar[bool] = False
    """Whether it learns from control pictures, so that an annotator says anything to it."""

    @classmethod
    def sources(cls, config: "RunConfig") -> "tuple[Source, ...]":
        """The folders of pictures and what is asked of them; read before a base is loaded. Raises `ConfigError`."""
        from vgm_peft.data import Source

        data = config.data
        return tuple(
            Source(
                folder=Path(concept.images),
                caption=concept.prompt or None,
                trigger=concept.token or data.trigger,
                masks=data.masks,
                annotator=data.annotator,
                repeats=concept.repeats,
            )
            for concept in config.concepts
        )

    @classmethod
    @abstractmethod
    def prepare(cls, setup: Setup) -> Self:
        """Read and check the data, attach what is to be trained to the base, cache what never changes."""

    @abstractmethod
    def groups(self) -> Sequence[Group]:
        """Everything that is trained; all float32, names unique, in an order that is always the same."""

    @abstractmethod
    def batch(self, turn: Turn) -> Batch:
        """The examples of a turn, on the device."""

    @abstractmethod
    def loss(self, batch: Batch, turn: Turn) -> Tensor:
        """The mean loss of a batch: a float32 scalar whose gradient reaches every parameter."""

    def evaluating(self) -> AbstractContextManager[None]:
        """A context in which what is trained leaves nothing out by chance."""
        return nullcontext()

    @abstractmethod
    def save(self, folder: Path) -> Path:
        """Write what was trained into the run's folder, and return the path of the file or folder to hand on."""

    @abstractmethod
    def preview(self) -> AbstractContextManager[Preview]:
        """Say what to draw while training; within the context what is trained is in evaluation mode."""

    def unlearned(self) -> AbstractContextManager[None]:
        """A context in which the base draws as it did before the run, as far as prompts without new words go."""
        return nullcontext()

    def exam(self) -> "Exam":
        """Say what to draw for its scores. A task that does not say so cannot be scored, which is known before it is made."""
        raise ConfigError(f"{self.name} runs have no scores")

    @abstractmethod
    def facts(self) -> Mapping[str, object]:
        """What the manifest should hold besides what every run's does; `data` names the data by content."""
