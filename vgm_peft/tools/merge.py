"""Several deltas of one family made into one: the weighted sum of their changes, or what remains after they are thinned out.

| method | of every module | Σ is |
|---|---|---|
| `concat` | Σ w dW, exactly: low-rank pairs side by side, at the sum of their ranks; all else densely | exact |
| `svd` | the same, then the nearest change of a rank | nearest |
| `ties` | Yadav et al. 2023 (arXiv 2306.01708): keep the largest values, elect a sign, mean of those that agree | lossy |
| `dare` | Yu et al. 2023 (arXiv 2311.03099): drop values at random, enlarge the others by 1 / (1 - p), sum | lossy |

TIES and DARE look at single values of dW, so they work on the dense change of one module at a time; the papers trim over a
whole model, here every module keeps the same share. A rank makes their result low-rank again. A change that only one delta
makes keeps its kind under `concat` wherever its weight can go into a tensor.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from vgm_peft.delta import Delta, Patch, Word
from vgm_peft.errors import ConfigError, DeltaError, nearest
from vgm_peft.formats.factors import dtype_of, full, kept, pair, spectrum_of, spelled, thin_of, total
from vgm_peft.site import Site
from vgm_peft.tools.checkpoint import Checkpoint, change_of
from vgm_peft.tools.resize import Target, carried

SCALED = ("lora_up.weight", "lokr_w1", "lokr_w1_a", "hada_w1_a", "diff", "diff_b", "w_norm", "b_norm")
"""Tensors that dW is proportional to."""
BOUND = ("dora_scale", "oft_blocks", "rescale", "on_input", "a1.weight")
"""Tensors that make dW something else than a product of the others."""


@dataclass(frozen=True)
class Options:
    """How to merge."""

    method: str = "concat"
    rank: int | None = None
    """Of the result's low-rank layers; needed by `svd`, dense without it for `ties` and `dare`."""
    density: float = 0.2
    """Share of the values that `ties` keeps, and `dare` too."""
    seed: int = 0
    """Of what `dare` drops."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"--method {self.method}", fix=nearest(self.method, [*METHODS, "fusion"]))
        if METHODS[self.method].needs_rank and self.rank is None:
            raise ConfigError(f"--method {self.method} makes changes of a rank", expected="--rank R")
        if not METHODS[self.method].takes_rank and self.rank is not None:
            raise ConfigError(f"--method {self.method} keeps every rank", fix="use --method svd for --rank")
        if not 0 < self.density <= 1:
            raise ConfigError(f"--density {self.density}", expected="above 0 and at most 1")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"--rank {self.rank}", expected="1 or more")


Part = tuple[Patch, float, int]
"""A change, its weight, and the number of the delta it is from."""


@dataclass(frozen=True)
class Job:
    """One merge: its settings, and the base that some changes depend on."""

    options: Options
    checkpoint: Checkpoint | None

    def changes(self, parts: Sequence[Part]) -> list[Tensor]:
        """The dense changes, float64, by their weights."""
        return [change_of(patch, self.checkpoint).double() * weight for patch, weight, _ in parts]


@dataclass(frozen=True)
class Method:
    """How the changes of one site become one."""

    merge: Callable[[Site, Sequence[Part], Job], Patch]
    needs_rank: bool = False
    takes_rank: bool = True


@torch.no_grad()
def merge(uses: Sequence[tuple[Delta, float]], options: Options, checkpoint: Checkpoint | None = None) -> Delta:
    """Merge deltas at their weights. Raises `DeltaError` for deltas of several families, shapes that differ, words that clash,

    and for changes that depend on a base that is not at hand or on the timestep.
    """
    families = sorted({delta.family for delta, _ in uses})
    if len(families) != 1:
        raise DeltaError(f"deltas of {' and '.join(families)}", expected="deltas of one family")
    parts: dict[str, list[Part]] = {}
    for number, (delta, weight) in enumerate(uses):
        for name, patch in delta.patches.items():
            parts.setdefault(name, []).append((patch, weight, number))
    job, method = Job(options, checkpoint), METHODS[options.method]
    patches = {name: method.merge(_site(name, group), group, job) for name, group in parts.items()}
    words: dict[str, Word] = {}
    for delta, _ in uses:
        for token, word in delta.words.items():
            if token in words and not _same(words[token], word):
                raise DeltaError(f"two deltas have a word {token!r} of their own", fix="train or rename one of them anew")
            words[token] = word
    return Delta(families[0], patches, words, carried(uses[0][0].metadata) if len(uses) == 1 else {})


def _site(name: str, group: Sequence[Part]) -> Site:
    shapes = {patch.site.shape for patch, _, _ in group}
    if len(shapes) != 1:
        raise DeltaError(f"{name}: changes of the shapes {sorted(shapes)}", expected="deltas of the same base")
    return group[0][0].site


def _same(one: Word, other: Word) -> bool:
    return one.rows.keys() == other.rows.keys() and all(torch.equal(one.rows[part], other.rows[part]) for part in one.rows)


def _concat(site: Site, parts: Sequence[Part], job: Job) -> Patch:
    dtype = dtype_of(*(patch for patch, _, _ in parts))
    spellings = [spelled(patch) for patch, _, _ in parts]
    thins = [thin_of(tensors) for tensors in spellings]
    pairs = [thin * weight for thin, (_, weight, _) in zip(thins, parts, strict=True) if thin is not None]
    if len(pairs) == len(parts):
        return pair(site, total(pairs), dtype)
    only = spellings[0]
    if len(parts) == 1 and only is not None and not any(name in only for name in BOUND):
        # kept in its own kind, the weight gone into one factor
        scaled = {name: tensor * parts[0][1] if name in SCALED else tensor for name, tensor in only.items()}
        if any(name in SCALED for name in only):
            return kept(site, scaled, dtype)
    return full(site, torch.stack(job.changes(parts)).sum(0), dtype)


def _svd(site: Site, parts: Sequence[Part], job: Job) -> Patch:
    thins = [thin_of(spelled(patch)) for patch, _, _ in parts]
    pairs = [thin * weight for thin, (_, weight, _) in zip(thins, parts, strict=True) if thin is not None]
    if len(pairs) < len(parts):
        return _made(site, torch.stack(job.changes(parts)).sum(0), parts, job)
    spectrum = total(pairs).spectrum()
    rank = Target(rank=job.options.rank).of(spectrum)
    return pair(site, spectrum.first(rank), dtype_of(*(patch for patch, _, _ in parts)))


def _ties(site: Site, parts: Sequence[Part], job: Job) -> Patch:
    trimmed = torch.stack([_largest(change, job.options.density) for change in job.changes(parts)])
    elected = torch.sign(trimmed.sum(0))
    agree = (torch.sign(trimmed) == elected) & (trimmed != 0)
    return _made(site, (trimmed * agree).sum(0) / agree.sum(0).clamp_min(1), parts, job)


def _largest(change: Tensor, density: float) -> Tensor:
    """The largest values of a change, all others zero."""
    count = max(1, round(density * change.numel()))
    least = change.abs().flatten().kthvalue(change.numel() - count + 1).values
    return change * (change.abs() >= least)


def _dare(site: Site, parts: Sequence[Part], job: Job) -> Patch:
    density, whole = job.options.density, torch.zeros(site.shape, dtype=torch.float64)
    for (_, _, number), change in zip(parts, job.changes(parts), strict=True):
        # a stream of its own for every delta and site: the result does not depend on the order of modules
        generator = torch.Generator().manual_seed(zlib.crc32(f"{job.options.seed}/{number}/{site.name}".encode()))
        whole += change * (torch.rand(site.shape, generator=generator) < density) / density
    return _made(site, whole, parts, job)


def _made(site: Site, change: Tensor, parts: Sequence[Part], job: Job) -> Patch:
    """The patch of a dense change: of the rank that is asked for where it is a matrix, else as it is."""
    dtype, rank = dtype_of(*(patch for patch, _, _ in parts)), job.options.rank
    if rank is None or site.op not in ("linear", "conv"):
        return full(site, change, dtype)
    spectrum = spectrum_of(change.flatten(1))
    return pair(site, spectrum.first(Target(rank=rank).of(spectrum)), dtype)


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "concat": Method(_concat, takes_rank=False),
        "svd": Method(_svd, needs_rank=True),
        "ties": Method(_ties),
        "dare": Method(_dare),
    }
)
