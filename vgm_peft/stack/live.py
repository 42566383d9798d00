"""Deltas of a stack whose strength is not the same in all steps, or that act on a part of what is drawn: they act live.

A text encoder knows no steps. It reads the prompts before the first, so there a delta acts as it does at the beginning: not at
all if it starts later.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from vgm_peft.attachment import Attachment
from vgm_peft.delta import Delta
from vgm_peft.drawing import moment
from vgm_peft.errors import ConfigError, nearest
from vgm_peft.family import Base
from vgm_peft.stack.handle import ready
from vgm_peft.stack.uses import DeltaUse


class Live:
    """One delta of a stack that is attached and not fused, at the strength that its use asks for now."""

    def __init__(self, base: Base, use: DeltaUse, delta: Delta) -> None:
        """Attach it; `follow` says how strongly it acts."""
        self.use, self.delta = use, delta
        self.attachment = Attachment(base.parts, ready(delta, base), 0.0)
        """Whoever draws several rows in one forward may set its `rows`."""
        self._denoiser = base.family.denoiser

    def follow(self, use: DeltaUse) -> None:
        """Act as a use says, from now on, on all rows."""
        self.use = use
        self.attachment.rows = None
        self.attachment.strengths = factors(use, self.delta)
        self.rest()

    def step(self, begin: float, end: float) -> None:
        """Take the strength of a step of the denoiser, from one share of the steps to another."""
        self.attachment.strength = self.use.strength * self.use.factor(begin, end)

    def rest(self) -> None:
        """Take the strength at which prompts are read."""
        self.attachment.strength = self.use.strength * self.use.first

    @property
    def steady(self) -> bool:
        """Whether it has the same strength in all steps."""
        return (self.use.start, self.use.end) == (0.0, 1.0) and not self.use.schedule


class Pace:
    """Tells live deltas of every step of a base's denoiser, before anything else in its forward."""

    def __init__(self, base: Base, live: Sequence[Live]) -> None:
        """Hook in."""
        self._base, self._live = base, live
        self._hooks: list[RemovableHandle] = []
        self.hook()

    def hook(self) -> None:
        """Be the first that hears of a call of the denoiser."""
        self.remove()
        denoiser = self._base.denoiser
        self._hooks.append(denoiser.register_forward_pre_hook(self._tell, prepend=True, with_kwargs=True))
        self._hooks.append(denoiser.register_forward_hook(self._rest, always_call=True))

    def _tell(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now = signature(denoiser.forward).bind_partial(*args, **kwargs).arguments["timestep"]
        for live in self._live:
            live.step(*moment(self._base, now))

    def _rest(self, *_: object) -> None:
        for live in self._live:
            live.rest()

    def remove(self) -> None:
        """Leave the denoiser; calling it again does nothing."""
        while self._hooks:
            self._hooks.pop().remove()


def strengths(use: DeltaUse, delta: Delta) -> dict[str, float]:
    """Return the strength at every site of a delta that acts alike in all steps, by its name."""
    by_site = factors(use, delta)
    return {site: use.strength * by_site.get(site, 1.0) for site in delta.patches}


def factors(use: DeltaUse, delta: Delta) -> dict[str, float]:
    """Return the factors that `use.blocks` gives to sites of a delta, by their names; at all others it is 1.

    Raises `ConfigError` for a pattern that matches none of the sites.
    """
    places = {name: f"{patch.site.part}.{patch.site.module}" for name, patch in delta.patches.items()}
    for pattern in use.blocks:
        if not any(fnmatchcase(place, pattern) for place in places.values()):
            ends = [place.split(".") for place in places.values()]
            known = sorted({".".join([*end[:depth], "*"]) for end in ends for depth in (1, 2, 3)})
            raise ConfigError(
                f'blocks of {use.file}: "{pattern}" matches none of its {len(places)} sites',
                fix=nearest(pattern, known) if known else "",
            )
    found: dict[str, float] = {}
    for name, place in places.items():
        first = next((factor for pattern, factor in use.blocks.items() if fnmatchcase(place, pattern)), 1.0)
        if first != 1.0:
            found[name] = first
    return found
