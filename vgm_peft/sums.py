"""Changes of norms and biases, added to them for all layers of a part at once.

Such a change is one vector added to another. On two hundred layers the calls cost more than all the additions, so before a
part runs its forward, one operation makes the sums, and they stand in the parameters' places until it is over. That is for
layers on which nothing but such vectors of one delta acts, over a base that is not trained itself. Wherever else a layer runs
(called by itself, again by activation checkpointing in the backward pass, with gradients recorded that the sums do not have)
its own hooks do the same.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from vgm_peft.delta import Patch


class Vector(Patch):
    """A patch whose dW may be a vector that it has as it is."""

    vector: str = ""
    """The name of the parameter (O,) that dW is; empty where dW is no vector, or where there is more to it."""

    def summand(self) -> Tensor:
        """Return that parameter."""
        return cast(Tensor, self._parameters[self.vector])


class Term(NamedTuple):
    """One sum to make: the layer's tensor, the vector, and its strength."""

    name: str
    tensor: Tensor
    vector: Tensor
    strength: float


def add(terms: Sequence[Term]) -> list[Tensor]:
    """Return the sums, each a new tensor; the gradients are those of the vectors alone."""
    if not terms:
        return []
    apply = cast(Callable[..., Sequence[Tensor]], _Sums.apply)
    return list(apply([t.tensor for t in terms], [t.strength for t in terms], *(t.vector for t in terms)))


# Not public, but the only way to one launch for all; what torch.optim is made of.
_foreach_add = cast(Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]], getattr(torch, "_foreach_add"))  # noqa: B009
_foreach_mul = cast(Callable[[Sequence[Tensor], Sequence[float]], Sequence[Tensor]], getattr(torch, "_foreach_mul"))  # noqa: B009


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensors: list[Tensor], strengths: list[float], *vectors: Tensor) -> tuple[Tensor, ...]:
        ctx.strengths = strengths
        ctx.set_materialize_grads(False)
        scaled = vectors if all(strength == 1.0 for strength in strengths) else _foreach_mul(vectors, strengths)
        return tuple(_foreach_add(tensors, scaled))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(strength == 1.0 for strength in ctx.strengths):
            return None, None, *gradients
        return None, None, *(None if g is None else s * g for g, s in zip(gradients, ctx.strengths, strict=True))
