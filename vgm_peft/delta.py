"""The two central nouns: a `Patch` is one trained change at one `Site`; a `Delta` is the named set of patches in one file.

`Patch.change(base)`, the dense dW, *is* the definition of a method. The cheap forward (`contribution`), foreign packing
and merging are optimisations of it, each tested against it. Strength is always `W + s*dW`; patches on one site add; a
patch whose dW depends on W sees the base W, so order never matters.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vgm_peft.errors import DeltaError
from vgm_peft.site import Op, Site, locate
from vgm_peft.word import Word

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True, slots=True)
class Call:
    """One forward of a layer, as a patch on it sees it."""

    x: Tensor
    """The layer's own input."""
    layer: nn.Module
    base: Tensor
    """The untouched tensor at the patch's site (`layer`'s own may have other deltas fused into it)."""
    plain: Tensor | None = None
    """What the untouched layer makes of `x`, bias included; None where this forward did not compute it."""

    def product(self, site: Site) -> Tensor:
        """Return the untouched weight applied to `x`, without the bias: free where the layer has just computed it."""
        if self.plain is None:
            return apply_dense(self.base.to(self.x.dtype), self.x, self.layer, site)
        bias = cast("Tensor | None", getattr(self.layer, "bias", None))
        return self.plain if bias is None else self.plain - along_outputs(bias.to(self.plain.dtype), self.x, self.layer)


Acts = Literal["output", "input", "weight"]


class Patch(nn.Module, ABC):
    """One trained change at one site. A method is a subclass in a file of its own under `deltas/`.

    A subclass sets `kind` (its name in files and recipes), `Options` (a frozen dataclass with defaults from the literature),
    `ops` (what it can change), and writes `__init__` (parameters for a site and options, at their initial values drawn from
    `generator`) and `change`; `contribution` or `add_to` when there is a way cheaper than the dense one (or `acts = "input"`
    and `feed`, or `acts = "weight"`); `pack` and `unpack` when other tools have a name for it. Site, options and parameters
    say everything, so a file of the three restores the patch exactly. Parameters are float32 unless moved, named as in the
    file; those not trained have `requires_grad` off. It is born in evaluation mode (no dropout); `Delta.train` switches it.
    """

    kind: ClassVar[str]
    Options: ClassVar[type]
    ops: ClassVar[frozenset[Op]]
    examples: ClassVar[tuple[Any, ...]]
    """Options that fit every layer of the tiny bases (sides of 4 and more): what the contract battery tries."""
    where: ClassVar[tuple[str, ...]] = ("attention",)
    """The layers that the literature trains by this method: presets or patterns, as in a recipe."""
    rate: ClassVar[float] = 1.0
    """The learning rate that the literature gives this method, as a multiple of that of LoRA."""
    base_free: bool = True
    """dW does not depend on W (LoRA: yes; DoRA: no)."""
    packs_alone: bool = False
    """What `pack` returns does not depend on W though dW does: the spelling is a multiple or rotation of it (IA3, OFT)."""
    timed: ClassVar[bool] = False
    """dW depends on the denoiser's timestep, which `at` is told: then it acts live only."""
    gradient_is_exact: bool = True
    """Gradients are those of dW in all it depends on (DoRA: no, its norm counts as a constant by definition)."""
    acts: Acts = "output"
    """How a live patch acts where nothing hinders it: it adds to the layer's output (`add_to`), it changes the layer's
    input, so that one base product serves both (`feed`), or the dense dW joins the weight for the length of the forward:
    right for changes as large as the weight itself, and free for norms and biases. The sum is the same in all three."""
    joins: bool = False
    """Where the layer is so small that operations count and not arithmetic, dW joins the weight whatever `acts` says: for
    those whose `change` takes fewer operations than their own way. A bias joins wherever its gradient is free."""

    def __init__(self, site: Site, options: Any, generator: torch.Generator | None = None) -> None:
        """Make the patch at its initial values, drawn from `generator` (CPU) or seed 0. Raises `DeltaError` on a misfit."""
        super().__init__()
        self.site, self.options = site, options
        self._can_drop = any(getattr(options, f.name) for f in fields(options) if f.name.endswith("dropout"))
        self.eval()

    @property
    def drops(self) -> bool:
        """Whether a forward hides something at random, which `change` knows nothing of: in training, by any `*dropout`."""
        return self.training and self._can_drop

    @classmethod
    def check(cls, site: Site, options: Any) -> None:
        """Raise `DeltaError` for options not worth training at a site, though a file from elsewhere may hold such a patch."""

    def start(self, base: Tensor) -> None:  # noqa: B027 - most methods start without a look at the base
        """Take initial values from the untouched base tensor, before training and once; a patch never shown it works too."""

    @abstractmethod
    def change(self, base: Tensor) -> Tensor:
        """Return the dense dW at strength 1, of the base's shape, in the parameters' dtype.

        `base` is the untouched tensor (any float dtype; `base_free` kinds read its shape alone). Differentiable in parameters.
        """

    def contribution(self, call: Call) -> Tensor:
        """Return what the patch adds to the layer's output at strength 1, given the layer's input, in its dtype.

        The default multiplies by the dense dW, or the base by what is fed; subclasses do better, equal up to rounding.
        """
        x = call.x
        if self.acts == "input":
            fed = apply_dense(call.base.to(x.dtype), self.feed(x, call.base), call.layer, self.site)
            return self.add_rest(fed, call, 1.0)
        change = self.change(call.base)
        return apply_dense(change.to(x.dtype) if x.is_floating_point() else change, x, call.layer, self.site)

    def add_to(self, output: Tensor, call: Call, strength: float) -> Tensor:
        """Return `output + strength * contribution`, a new tensor; a subclass may fuse the sum into its last product."""
        return torch.add(output, self.contribution(call).to(output.dtype), alpha=strength)

    def feed(self, x: Tensor, base: Tensor) -> Tensor:
        """Return what to add to the layer's input `x`, so that W feed(x) = dW x: for patches that act on the input."""
        raise NotImplementedError(f"{self.kind} does not act on the input")

    def add_feed(self, fed: Tensor, x: Tensor, base: Tensor, strength: float) -> Tensor:
        """Return `fed` + strength * feed(x), a new tensor; a subclass may fuse the sum into its last product."""
        return torch.add(fed, self.feed(x, base).to(fed.dtype), alpha=strength)

    def add_rest(self, output: Tensor, call: Call, strength: float) -> Tensor:
        """Return `output` plus strength * what the patch could not say through `feed`, dW x - W feed(x); most say it all."""
        return output

    def live_change(self, base: Tensor) -> Tensor:
        """Return what joins the weight for one forward: dW, of which training may hide a part."""
        return self.change(base)

    def add_change(self, weight: Tensor, base: Tensor, strength: float) -> Tensor:
        """Return `weight` + strength * live_change(base), a new tensor; a subclass may fuse the sum into its last operation."""
        return torch.add(weight, self.live_change(base).to(weight.dtype), alpha=strength)

    def presence(self) -> float:
        """Return 1, or 0 in a forward that `module_dropout` leaves the patch out of: strength 0, so with gradients of zero."""
        share = getattr(self.options, "module_dropout", 0.0) if self.drops else 0.0
        return 0.0 if share and float(torch.rand((), device="cpu")) < share else 1.0

    def at(self, timestep: Tensor) -> None:  # noqa: B027 - most patches need not know
        """Take note of the denoiser's timesteps, a scalar or (B,), before each of its forwards, if `timed`."""

    def pack(self, base: Tensor) -> dict[str, Tensor]:
        """Return tensors under the suffixes that other tools read (LyCORIS' vocabulary), meaning exactly this dW.

        Suffixes stand after the module's name and a dot: `lora_down.weight`, `lokr_w1`, `alpha` ... `base` as for `change`.
        The default is the dense `diff`, of a norm's weight `w_norm`, of a bias `diff_b`; a compact spelling is better.
        """
        name = "diff_b" if self.site.tensor == "bias" else "w_norm" if self.site.op == "norm" else "diff"
        return {name: self.change(base).detach()}

    def adapt(self) -> dict[str, Tensor] | None:
        """Return tensors under suffixes that are peft's alone, as `unpack` reads them; None where there are none."""
        return None

    @classmethod
    def unpack(cls, site: Site, tensors: Mapping[str, Tensor]) -> "Self | None":
        """Make the patch that `tensors` (one module's, by suffix as in `pack`) spell; None when they are not this kind's.

        All must be understood, none left over. Raises `DeltaError` when they are this kind's but do not fit `site`.
        """
        return None

    def extra_groups(self) -> Mapping[str, float]:
        """Learning-rate factors by parameter-name suffix, where the method asks for them (LoRA+); empty for most."""
        return {}


def seeded(generator: torch.Generator | None) -> torch.Generator:
    """Return the generator, or one of seed 0: making a patch never draws from torch's global generator."""
    return torch.Generator().manual_seed(0) if generator is None else generator


def apply_dense(change: Tensor, x: Tensor, layer: nn.Module, site: Site) -> Tensor:
    """Return `change` applied to `x` the way `layer` applies the tensor at `site` (without bias)."""
    if site.op == "linear":
        return F.linear(x, change)
    if site.op == "conv":
        return convolve(layer, x, change)
    if site.op == "bias":
        return along_outputs(change, x, layer)
    if site.op == "embedding":
        return F.embedding(x, change)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, change, None, layer.eps)
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, list(layer.normalized_shape), change, None, layer.eps)
    raise DeltaError(f"{site}: cannot apply a change to a {type(layer).__name__}")


def along_outputs(vector: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
    """Return one value per output (O,) in the shape that broadcasts over the output of `layer` for input `x`."""
    channels = isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.GroupNorm))
    return vector.view(-1, *[1] * (x.dim() - 2)) if channels else vector


def convolve(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Convolve `x` with `weight` at the stride, padding, dilation and groups of `layer` (a Conv1d, 2d or 3d), without bias."""
    conv = cast(nn.Conv2d, layer)
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[weight.dim() - 2]
    if conv.padding_mode != "zeros":
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)  # pyright: ignore[reportPrivateUsage]
        return cast(Callable[..., Tensor], function)(x, weight, None, conv.stride, 0, conv.dilation, conv.groups)
    return cast(Callable[..., Tensor], function)(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)


@dataclass
class Delta:
    """The named set of patches (and words) in one file: concrete, never subclassed.

    `family` is the name of the kind of base model it fits; `metadata` what the file says of itself (text to text).
    """

    family: str
    patches: dict[str, Patch] = field(default_factory=dict[str, Patch])
    """Site name -> patch."""
    words: dict[str, Word] = field(default_factory=dict[str, Word])
    metadata: dict[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def fit(
        cls,
        family: str,
        method: type[Patch],
        sites: Sequence[Site],
        options: "DataclassInstance | None" = None,
        *,
        seed: int = 0,
    ) -> Self:
        """Make a fresh delta of one method on the given sites, reproducible by `seed`. Raises `DeltaError` on a misfit."""
        generator = torch.Generator().manual_seed(seed)
        settings = method.Options() if options is None else options
        for site in sites:
            if site.op not in method.ops:
                raise DeltaError(
                    f"{site}: {method.kind} cannot change it",
                    expected="a site that is " + " or ".join(sorted(method.ops)),
                )
            method.check(site, settings)
        return cls(family, {site.name: method(site, settings, generator) for site in sites}).train()

    def start(self, parts: Mapping[str, nn.Module]) -> Self:
        """Let the methods that ask for it take initial values from the untouched base (PiSSA); for a fresh delta. Return self.

        Raises `DeltaError` when a site does not fit, before any patch is changed.
        """
        tensors = [(patch, getattr(locate(parts, patch.site), patch.site.tensor)) for patch in self]
        for patch, tensor in tensors:
            patch.start(tensor.detach())
        return self

    def __iter__(self) -> Iterator[Patch]:
        return iter(self.patches.values())

    @property
    def kinds(self) -> tuple[str, ...]:
        """The methods in it, sorted."""
        return tuple(sorted({p.kind for p in self}))

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the base it touches (by patches or words), sorted."""
        return tuple(sorted({p.site.part for p in self} | {part for w in self.words.values() for part in w.rows}))

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every tensor of the file with its name, `site/param`, in file order; frozen ones have `requires_grad` off."""
        for name, patch in self.patches.items():
            for key, parameter in patch.named_parameters():
                yield f"{name}/{key}", parameter

    def count(self) -> int:
        """Number of trained values, words included."""
        rows = sum(t.numel() for w in self.words.values() for t in w.rows.values())
        return rows + sum(p.numel() for _, p in self.parameters() if p.requires_grad)

    def train(self, mode: bool = True) -> Self:
        """Switch dropout on (a fresh delta from `fit` has it on) or off (one read from a file has it off), and return self.

        Dropout draws from torch's global generator, as activation checkpointing needs: seed that per step to repeat a run.
        """
        for patch in self:
            patch.train(mode)
        return self

    def to(self, device: "torch.device | str | None" = None, dtype: torch.dtype | None = None) -> Self:
        """Move all patches in place and return self."""
        for patch in self:
            patch.to(device=device, dtype=dtype)
        return self
