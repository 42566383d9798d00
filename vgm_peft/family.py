"""The `Family` noun: a kind of base model, and `Base`, one loaded member of it.

A family answers the questions on which Stable Diffusion 1.5 and SDXL (and later FLUX or DiT) differ: how prompts and
pictures become tensors, how the network is called, which scheduler process it was trained on, which layers make sense
to train, and how other tools spell its modules. Networks, VAEs, text encoders, schedulers and pipelines are those of
diffusers and transformers. A new family is one file under `families/` and one line in its table.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from vgm_peft.process import Process
from vgm_peft.site import Site, find_sites

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Condition:
    """What the denoiser is told about the picture: `hidden` (B, T, D) token states, and for some families `pooled` (B, E)."""

    hidden: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def pick(self, index: Sequence[int] | Tensor) -> "Condition":
        """Return the chosen rows."""
        rows = torch.as_tensor(index, device=self.hidden.device)
        return Condition(self.hidden[rows], None if self.pooled is None else self.pooled[rows])

    def rows(self) -> "list[Condition]":
        """Return the rows, each by itself."""
        return [self.pick([i]) for i in range(len(self))]

    def to(self, device: "torch.device | str | None" = None, dtype: torch.dtype | None = None) -> "Condition":
        """Return a copy on another device or of another dtype."""
        pooled = None if self.pooled is None else self.pooled.to(device=device, dtype=dtype)
        return Condition(self.hidden.to(device=device, dtype=dtype), pooled)

    @staticmethod
    def cat(conditions: "Sequence[Condition]") -> "Condition":
        """Join along the batch; all must have the same length in tokens."""
        pooled = [c.pooled for c in conditions if c.pooled is not None]
        return Condition(torch.cat([c.hidden for c in conditions]), torch.cat(pooled) if pooled else None)


@dataclass(frozen=True)
class Posterior:
    """The VAE's answer for pictures: mean and standard deviation (B, C, H, W), already in the denoiser's units."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return latents for standard normal `noise` of the same shape."""
        return self.mean + self.std * noise


@dataclass(frozen=True)
class Query:
    """One question to a denoiser: noisy latents (B, C, H, W), timesteps (B,), condition (B rows), and what families like
    SDXL are told of sizes: `sizes` (B, 6) int, original height and width, crop top and left, target height and width, pixels.
    """

    noisy: Tensor
    t: Tensor
    condition: Condition
    sizes: Tensor | None = None


Place = tuple[str, str]
"""Part and module."""


@dataclass(frozen=True)
class Share:
    """A module that another tool keeps as some rows of a larger tensor, or of one whose rows are in another order."""

    place: Place
    rows: tuple[range, ...] = ()
    """Which rows of the tool's tensor, in the module's own order; none: all, as they are."""


@dataclass(frozen=True)
class KeyTable:
    """How other tools spell this family's modules.

    `kohya` maps a place to the full prefix written before `.lora_down.weight` and its like; `aliases` maps every further
    spelling that may be read to the same place, and `fused` those that mean several modules at once, or one rearranged.
    """

    kohya: Mapping[Place, str]
    aliases: Mapping[str, Place]
    fused: Mapping[str, tuple[Share, ...]] = field(default_factory=dict[str, tuple[Share, ...]])


class Naming(ABC):
    """A kind of base model as far as files of deltas go: its modules and how tools spell them."""

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    """Parts that hold sites, the denoiser first, text encoders in prompt order."""
    prefixes: ClassVar[Mapping[str, tuple[str, ...]]]
    """Part -> everything that tools write before its modules, with `_` for `.`; kohya's first, which is what is written."""

    @property
    def denoiser(self) -> str:
        """Name of the part that predicts."""
        return self.parts[0]

    @abstractmethod
    def published(self) -> Mapping[str, nn.Module]:
        """Build the parts at their published full size on the meta device (no memory), for counting and naming."""

    def editions(self) -> "Mapping[str, Callable[[], Mapping[str, nn.Module]]]":
        """Return the published sizes of the family by name, each a function as `published`, which is the first."""
        return {self.name: self.published}

    @abstractmethod
    def key_table(self, sites: Sequence[Site]) -> KeyTable:
        """Return the spellings of the modules in `sites` (all sites of one base)."""

    def stamps(self, sites: Sequence[Site], prediction: str | None = None) -> Mapping[str, str]:
        """What other tools expect a file to say of its base, read from the shapes of the delta's `sites` and, where known, the
        base's prediction: `ss_base_model_version`, `ss_v2`, `modelspec.architecture` (without the `/lora` at its end),
        `modelspec.prediction_type`.
        """
        return {}


class Family(Naming):
    """A kind of base model. Stateless: everything loaded lives in a `Base`."""

    presets: ClassVar[Mapping[str, tuple[str, ...]]]
    """Names for choices of sites -> glob patterns; must hold `attention`, `attention+mlp`, `conv`, `all`, `text`."""
    pipelines: ClassVar[tuple[str, ...]]
    """Names of the diffusers pipeline classes whose folders hold such a base, the text-to-image class first."""
    loading: ClassVar[Mapping[str, object]] = {}
    """What the text-to-image class is told when it loads: the components that a base does without, set to None."""
    guidance: ClassVar[float] = 5.0
    """Classifier-free guidance at which its bases draw unless they or the user say otherwise."""

    @abstractmethod
    def recognises(self, pipe: "DiffusionPipeline") -> bool:
        """Say whether a diffusers pipeline (of any task) is of this family."""

    @abstractmethod
    def tiny(self, seed: int = 0) -> "DiffusionPipeline":
        """Build a text-to-image pipeline of the real classes at toy size with seeded random weights (under 1M values)."""

    def configure(self, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], folder: Path) -> bool:
        """Say whether a single-file checkpoint is of this family, known by its tensors' names and shapes.

        If so, write into `folder` the configurations that diffusers needs to convert it. Families that have no such
        files say no.
        """
        return False

    @abstractmethod
    def encode_prompt(self, base: "Base", prompts: Sequence[str], syntax: bool = False) -> Condition:
        """Encode prompts, one row each, all of the same number of tokens. Gradients flow where parameters ask.

        With `syntax` emphasis such as `(word:1.2)` is understood, and a long prompt goes on in further windows.
        """

    def prompting(self, base: "Base", prompt: str, negative: str = "") -> dict[str, Tensor]:
        """Return how a call of a stock pipeline is told a prompt with its syntax, and what the picture should not show.

        Without `negative` it is what the pipeline itself takes then: the empty text or, where its configuration says so, zeros.
        """
        zeros = not negative and base.pipe.config.get("force_zeros_for_empty_prompt", False)
        both = self.encode_prompt(base, [prompt] if zeros else [prompt, negative], syntax=True)
        told = {"prompt_embeds": both.hidden, "pooled_prompt_embeds": both.pooled}
        sides = ("", "negative_")[: len(both)]
        return {f"{side}{name}": v[i : i + 1] for i, side in enumerate(sides) for name, v in told.items() if v is not None}

    @abstractmethod
    def encode_image(self, base: "Base", pixels: Tensor) -> Posterior:
        """Encode pictures (B, 3, P, Q) in -1 .. 1 to the VAE's posterior, scaled and shifted to the denoiser's units."""

    @abstractmethod
    def decode(self, base: "Base", latents: Tensor) -> Tensor:
        """Decode latents (B, C, H, W) to pictures (B, 3, P, Q) in -1 .. 1."""

    def extra(self, base: "Base", query: Query) -> dict[str, Tensor] | None:
        """Return what the denoiser is told besides time and tokens (`added_cond_kwargs`), or None."""
        return None

    @abstractmethod
    def predict(self, base: "Base", query: Query) -> Tensor:
        """Call the denoiser and return its raw prediction (B, C, H, W)."""


@dataclass
class Base:
    """One loaded base model: a stock diffusers pipeline and what we know of it."""

    pipe: "DiffusionPipeline"
    family: Family
    source: str
    """What the user called it: `toybox`, a folder, a file, a hub id."""
    digest: str = ""
    """SHA-256 over the weights, naming exactly these values in manifests and caches; empty when not asked for."""
    own_guidance: float | None = None
    """Classifier-free guidance that its folder asks for, if it says."""
    process: Process = field(init=False)
    drawer: "DiffusionPipeline" = field(init=False, repr=False)
    """The pipeline that draws now: `pipe`, or another made of its components (see `drawing.drawn_by`)."""

    def __post_init__(self) -> None:
        self.drawer = self.pipe
        self.process = Process.of(self.pipe.scheduler.config)

    @cached_property
    def parts(self) -> dict[str, nn.Module]:
        """The modules that hold sites, by part name."""
        return {name: getattr(self.pipe, name) for name in self.family.parts if getattr(self.pipe, name, None) is not None}

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every site, denoiser first."""
        return tuple(site for name, root in self.parts.items() for site in find_sites(name, root))

    @property
    def denoiser(self) -> nn.Module:
        """The network that predicts."""
        return self.parts[self.family.denoiser]

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    @property
    def latent_factor(self) -> int:
        """Pixels per latent, along one side."""
        return int(getattr(self.pipe, "vae_scale_factor", 8))

    @property
    def resolution(self) -> int:
        """The side of the square, in pixels, that the base was made for."""
        config: Any = self.denoiser.config
        size = config.sample_size
        return int(size if isinstance(size, int) else max(size)) * self.latent_factor

    def guidance(self, asked: float | None = None) -> float:
        """Classifier-free guidance to draw with: what is asked for, else what its folder says, else its family's."""
        return next((value for value in (asked, self.own_guidance) if value is not None), self.family.guidance)

    def freeze(self) -> "Base":
        """Switch every part to evaluation mode without gradients, and return self."""
        for component in self.pipe.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        return self


SMALL = 50_000_000
"""Values of a network below which sharing one operation among threads costs more than it saves."""


@contextmanager
def fitting_threads(network: nn.Module) -> Generator[None]:
    """Compute on one thread while the network is small, as the embedded base is; larger ones get what torch has.

    Its steps are hundreds of tiny operations: measured on two cores, 0.59 s a step on two threads that sleep while they
    wait, 0.36 s on one. (Threads that spin instead take 0.25 s, and many times that when another process wants a core.)
    """
    before = torch.get_num_threads()
    if sum(p.numel() for p in network.parameters()) < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
