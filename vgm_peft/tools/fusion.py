"""Several concepts made into one delta by what their layers answer: the gradient fusion of Mix-of-Show, in closed form.

Gu et al. 2023 (arXiv 2305.18292, section 3.2, equation 4): for every layer the W is sought that answers what concept i's own
layer answers to the inputs X_i that it gets under the prompts of i,

    min_W  sum_i |(W_0 + w_i dW_i) X_i - W X_i|^2 + r |W - W_0|^2

They descend with L-BFGS and keep all inputs. But it is a least-squares problem, which needs only G_i = X_i X_i^T, their Gram
matrices:

    W - W_0 = (sum_i w_i dW_i G_i) (sum_i G_i + r I)^-1

Where concepts are told by different directions of the inputs both are kept, though as a sum each would speak into the other's.
r keeps to the base where no input leads, and decides how it goes with other prompts and noise: on the toy base two LoRAs missed
50 % of what they answer to prompts not fused by at 1e-3 and 1e-4, 53 % at 1e-2 and at 1e-5, 65 % at 1e-7; their sum 104 %. Of a
rank the nearest is the one nearest in the answers: with L L^T for what is in brackets on the right, the first singular parts of
(W - W_0) L, times L^-1.

Inputs are those of whole drawings of the base with one delta on it, its words and the empty prompt of classifier-free guidance
included. Gram matrices stand in float64 for as many layers at once as fit `ROOM`; for the next ones
the same is drawn again.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vgm_peft.delta import Delta, Patch
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.family import Base
from vgm_peft.formats import check_family
from vgm_peft.formats.factors import Thin, dtype_of, full, pair
from vgm_peft.site import Site, locate
from vgm_peft.stack import DeltaUse, Stack, generate
from vgm_peft.tools.merge import Options as Plain
from vgm_peft.tools.merge import merge

ROOM = 4 << 30
"""Bytes of matrices at a time."""


@dataclass(frozen=True)
class Concept:
    """One delta, its weight, and the prompts it is drawn by."""

    delta: Delta
    weight: float
    prompts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to fuse."""

    rank: int | None = None
    """Of the result; dense without."""
    steps: int = 8
    """Denoising steps of every drawing."""
    seed: int = 0
    """Of the noise that drawings begin with."""
    ridge: float = 1e-3
    """r, as a share of the mean eigenvalue of the sum of all G."""

    def __post_init__(self) -> None:
        if not 0 < self.ridge < 1e6:
            raise ConfigError(f"--ridge {self.ridge}", expected="above 0, as in 0.001")
        for name, value in (("rank", self.rank), ("steps", self.steps)):
            if value is not None and value < 1:
                raise ConfigError(f"--{name} {value}", expected="1 or more")


@dataclass(frozen=True)
class Missed:
    """Of one layer, how far the fused change and the plain sum are from what the concepts answer, as shares of that."""

    fused: float
    added: float


@torch.no_grad()
def fuse(concepts: Sequence[Concept], base: Base, options: Options | None = None) -> tuple[Delta, dict[str, Missed]]:
    """Fuse concepts on their base, and say of every layer what is missed.

    Norms, biases and tables, which are no matrices, are added, and words go along, as by `merge`. Raises `DeltaError` for
    what `merge` refuses, and for changes that do not fit the base.
    """
    options = options or Options()
    for concept in concepts:
        check_family("the delta", concept.delta, base)
        if not concept.prompts or not all(prompt.strip() for prompt in concept.prompts):
            raise ConfigError("a delta without a prompt", expected="one that calls its subject, for every delta")
    timed = [patch for concept in concepts for patch in concept.delta if patch.timed]
    if timed:
        raise DeltaError(f"{timed[0].site}: {timed[0].kind} changes with the timestep, so it is no one change")
    rest = merge([(_rest(concept.delta), concept.weight) for concept in concepts], Plain())
    sites = {patch.site.name: patch.site for concept in concepts for patch in concept.delta if _is_matrix(patch.site)}
    fused: dict[str, Patch] = {}
    missed: dict[str, Missed] = {}
    for group in _groups(list(sites.values())):
        for problem in _heard(group, concepts, base, options):
            name = problem.site.name
            dtype = dtype_of(*(c.delta.patches[name] for c in concepts if name in c.delta.patches))
            fused[name], missed[name] = problem.solved(options, dtype)
    order = {name: None for concept in concepts for name in concept.delta.patches}
    patches = {name: fused[name] if name in fused else rest.patches[name] for name in order}
    return Delta(base.family.name, patches, rest.words), missed


def _is_matrix(site: Site) -> bool:
    return site.op in ("linear", "conv")


def _rest(delta: Delta) -> Delta:
    """Return what of a delta changes no matrix: norms, biases, tables, and its words."""
    kept = {name: patch for name, patch in delta.patches.items() if not _is_matrix(patch.site)}
    return Delta(delta.family, kept, delta.words)


def _groups(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """Cut into groups whose matrices fit into the room, one layer at least."""
    group: list[Site] = []
    size = 0
    for site in sites:
        own = 8 * site.columns * (2 * site.columns + 2 * site.rows)
        if group and size + own > ROOM:
            yield group
            group, size = [], 0
        group.append(site)
        size += own
    if group:
        yield group


class _Problem:
    """The least squares of one layer."""

    def __init__(self, site: Site, layer: nn.Module) -> None:
        self.site, self.layer = site, layer
        weight = cast(Tensor, layer.weight)
        self.own = torch.zeros(site.columns, site.columns, dtype=torch.float64, device=weight.device)
        """G of the concept that is being drawn."""
        self.gram = torch.zeros_like(self.own)
        self.wanted = self.own.new_zeros(site.rows, site.columns)
        """The sum of w dW G."""
        self.added = torch.zeros_like(self.wanted)
        """The sum of w dW."""
        self.size = 0.0
        """The sum of |w dW X|^2."""

    def hear(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Add what the layer is fed (a forward pre-hook)."""
        columns = _columns(self.layer, inputs[0], self.site).double()
        self.own.addmm_(columns.T, columns)

    def close(self, concept: Concept) -> None:
        """Take note of what a concept answered, and be ready for the next."""
        self.gram += self.own
        patch = concept.delta.patches.get(self.site.name)
        if patch is not None:
            base = cast(Tensor, self.layer.weight).detach().cpu()  # which nothing is fused into now
            change = concept.weight * patch.change(base).detach().to(self.own).flatten(1)
            self.wanted += change @ self.own
            self.added += change
            self.size += float(((change @ self.own) * change).sum())
        self.own.zero_()

    def solved(self, options: Options, dtype: torch.dtype) -> tuple[Patch, Missed]:
        """Return the change that answers best."""
        rank, ridge = options.rank, options.ridge * float(self.gram.diagonal().mean())
        lower = torch.linalg.cholesky(self.gram + (ridge or 1.0) * torch.eye(len(self.gram)).to(self.gram))
        change = torch.cholesky_solve(self.wanted.T, lower).T
        if rank is None or rank >= min(change.shape):
            missed = Missed(self._share(change), self._share(self.added))
            return full(self.site, change.cpu(), dtype), missed
        left, values, right = torch.linalg.svd(change @ lower, full_matrices=False)
        root = values[:rank].sqrt()
        down = torch.linalg.solve_triangular(lower, root[:, None] * right[:rank], upper=False, left=False)
        thin = Thin(left[:, :rank] * root, down)
        missed = Missed(self._share(thin.dense()), self._share(self.added))
        return pair(self.site, Thin(thin.up.cpu(), thin.down.cpu()), dtype), missed

    def _share(self, change: Tensor) -> float:
        """Return the root of sum |change X - w dW X|^2 as a share of that of sum |w dW X|^2."""
        square = float(((change @ self.gram) * change).sum() - 2 * (change * self.wanted).sum()) + self.size
        return (max(square, 0.0) / self.size) ** 0.5 if self.size else 0.0


def _columns(layer: nn.Module, x: Tensor, site: Site) -> Tensor:
    """Return what a layer multiplies its weight with, (N, columns): tokens, or the patches of pictures."""
    if site.op == "linear":
        return x.reshape(-1, site.columns)
    if not isinstance(layer, nn.Conv2d) or layer.groups != 1 or isinstance(layer.padding, str):
        raise DeltaError(f"{site}: its inputs are no columns of a matrix", fix="merge this delta by another method")
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return patches.transpose(1, 2).reshape(-1, site.columns)


def _heard(group: Sequence[Site], concepts: Sequence[Concept], base: Base, options: Options) -> list[_Problem]:
    """Draw every concept by its prompts, and return what its layers were fed."""
    problems = [_Problem(site, locate(base.parts, site)) for site in group]
    with ExitStack() as hooks:
        for problem in problems:
            hooks.callback(problem.layer.register_forward_pre_hook(problem.hear).remove)
        for concept in concepts:
            uses = (DeltaUse(file="concept", strength=concept.weight),)
            for prompt in concept.prompts:
                stack = Stack(prompt=prompt, steps=options.steps, seed=options.seed, deltas=uses)
                generate(base, stack, given={"concept": concept.delta})
            for problem in problems:
                problem.close(concept)
    return problems
