"""Putting a side network beside a base and taking it away again, without a trace.

The denoiser's class, weights and processors never change: hooks add what the network says, in any stock pipeline of the
base, whatever else is on it. What of the network does not depend on the noise is computed once for a picture. In
classifier-free guidance both halves of a call hear it unless the side says otherwise; at strength 0, outside of its share
of the steps, and before it is told a picture, the denoiser behaves as if it were not there, bit for bit.
"""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vgm_peft.drawing import Span, guided, moment
from vgm_peft.errors import ConfigError, DataError
from vgm_peft.family import Base
from vgm_peft.side import Features, Heard, Side

WHOLE: Span = (0.0, 1.0)
"""All of the steps; of a part of them, a step counts that lies wholly within, as in diffusers."""


class Beside:
    """A side network on a base's denoiser. A context manager; `remove` (idempotent) takes it away."""

    def __init__(
        self, base: Base, side: Side, network: nn.Module, strength: float = 1.0, *, span: Span = WHOLE, guess: bool = False
    ) -> None:
        """Put it there; it is silent until it is told a picture. It hears the live deltas that were attached before it.

        Raises `ConfigError` for a span or a mode it cannot have.
        """
        if not 0.0 <= span[0] < span[1] <= 1.0:
            raise ConfigError(f"steps {span[0]:g} .. {span[1]:g} of a {side.name}", expected="a part of 0 .. 1, as in 0-0.5")
        if guess and not side.guesses:
            raise ConfigError(f"guess mode of a {side.name}", expected="a side network that has it, such as controlnet")
        self.base, self.side, self.network = base, side, network
        self.strength, self.span, self.guess = strength, span, guess
        self.mask: Tensor | None = None
        """Where in the picture it is heard, (1, 1, P, Q) in 0 .. 1."""
        self.layers: Mapping[str, float] | None = None
        """Which layers hear it how much, by patterns of their names, where the side asks (`side.Side.layers`)."""
        self._features: Features | None = None
        self._silent: Features | None = None
        self._hooks: list[RemovableHandle] = list(side.join(base, network, self))

    def tell(self, pictures: Tensor, quiet: Tensor | None = None) -> None:
        """Show it the pictures (B, 3, P, Q), in 0 .. 1, of the calls that follow: one for all of their rows, or one for each.

        Of those that are `quiet`, (B,) of bool, it says what the half without the prompt hears.
        """
        features = self.side.read(self.base, self.network, pictures)
        if quiet is not None and quiet.any():
            silent = self.side.silence(self.base, self.network, features)
            rows = [quiet.to(f.device).view(-1, *[1] * (f.dim() - 1)) for f in features]
            features = tuple(torch.where(q, s, f) for q, s, f in zip(rows, silent, features, strict=True))
        self._features, self._silent = features, None

    def hush(self) -> None:
        """Have it forget its pictures."""
        self._features = self._silent = None

    def heard(self, rows: int, t: "Tensor | float | int | None" = None) -> Heard | None:
        """Return what a call of the denoiser hears; see `side.Speaker`. Raises `DataError` when rows and pictures disagree."""
        features = self._features
        if features is None or self.strength == 0.0 or not self._is_time(t):
            return None
        halves, half = guided(self.base), False
        if self.guess and halves:
            told, half = _spread(features, rows // 2), True
        elif halves and rows != len(features[0]):
            if self._silent is None:
                self._silent = self.side.silence(self.base, self.network, features)
            both = (_spread(self._silent, rows // 2), _spread(features, rows // 2))
            told = tuple(torch.cat(pair) for pair in zip(*both, strict=True))
        else:
            told = _spread(features, rows)
        return Heard(told, self.strength, half, self.mask, self.layers)

    def _is_time(self, t: "Tensor | float | int | None") -> bool:
        """Whether a step lies wholly within the span."""
        if self.span == WHOLE or t is None:
            return True
        begin, end = moment(self.base, t)
        return self.span[0] <= begin and end <= self.span[1]

    def remove(self) -> None:
        """Take it away; calling it again does nothing."""
        self.hush()
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def _spread(features: Features, rows: int) -> Features:
    """Give every row of a call its picture's features: those of one picture to all, those of several in turn."""
    count = len(features[0])
    if rows % count:
        raise DataError(f"{count} pictures for side networks in a call of {rows} rows", expected="one for all, or one for each")
    return tuple(f if count == rows else f.repeat_interleave(rows // count, 0) for f in features)
