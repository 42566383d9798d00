"""What peft's own kinds can have of a delta: the changes of one part as one adapter of one kind, the inverse of `adapter`.

An adapter is one kind with one set of settings for all its layers, but for those that go by patterns of names. So the
changes of a part are an adapter or they are not; where they are not, there is LoRA (`peft_folder`).

| peft | is had by | beyond patterns the same for all layers |
|---|---|---|
| LoHa | LoHa, scales and ranks by name | Tucker form of kernels, or not |
| LoKr | LoKr and KronA, scales and ranks by name | where sides are split; whether small halves are factored |
| OFT, BOFT | those that rotate inputs, of layers without a kernel | size of blocks, terms of the series; BOFT: one factor |
| HRA | HRA | rank |
| IA3 | (IA)^3; where outputs are scaled, of layers without a bias, which peft scales too | |
| VeRA | VeRA of linear layers | rank and frozen matrices |
| FourierFT | FourierFT of linear layers, numbers of frequencies by name | scale and seed |
| C3A | C3A of linear layers, blocks by name | |
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from vgm_peft.delta import Patch
from vgm_peft.formats.books import Book
from vgm_peft.formats.names import ALPHA
from vgm_peft.formats.vocabulary import Suffixes, pack
from vgm_peft.site import Site

V = TypeVar("V")
Layers = Mapping[str, "Layer"]
"""Path -> layer."""
SERIES_SINCE = "0.18.0"
"""The version of peft from which on its series is ours: without the word of it peft warns of the older one."""


@dataclass(frozen=True)
class Layer:
    """One changed layer and its spelling."""

    site: Site
    tensors: Suffixes
    has_bias: bool


@dataclass(frozen=True)
class Adapter:
    """One part's changes as peft has them."""

    kind: str
    """peft's word for it."""
    tensors: Mapping[str, Suffixes]
    """Path -> suffix -> tensor."""
    settings: Mapping[str, object]
    """What a configuration says beyond the kind and the layers."""
    shared: Suffixes = field(default_factory=dict[str, Tensor])
    """Tensors of the whole adapter."""


def adapter_of(patches: Mapping[str, Patch], book: Book) -> Adapter | None:
    """Return the adapter that patches by path are, exactly; None where they are none of peft's kinds but perhaps LoRA."""
    layers: dict[str, Layer] = {}
    for path, patch in patches.items():
        tensors = spelled(patch)
        if tensors is None or patch.site.tensor != "weight":
            return None
        layers[path] = Layer(patch.site, tensors, "bias" in book.sites.get((patch.site.part, patch.site.module), {}))
    makers = {next((make for mark, make in _KINDS.items() if mark in layer.tensors), None) for layer in layers.values()}
    make = makers.pop() if len(makers) == 1 else None
    return None if make is None else make(layers)


def spelled(patch: Patch) -> Suffixes | None:
    """Return a patch's tensors under peft's suffixes, or under LyCORIS', where they depend on no base; None where they do."""
    if patch.timed:
        return None
    own = patch.adapt()
    if own is None and (patch.base_free or patch.packs_alone):
        own = pack(patch, None)
    return own


def by_name(values: Mapping[str, V]) -> tuple[V, dict[str, V]]:
    """Return the commonest value, and by name those that are others."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {name: value for name, value in sorted(values.items()) if value != usual}


def _alike(values: Mapping[str, V]) -> V | None:
    """Return the value that all layers have, or None."""
    usual, others = by_name(values)
    return None if others else usual


def _ranked(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, object]:
    (rank, other_ranks), (alpha, other_alphas) = by_name(ranks), by_name(alphas)
    return {"r": rank, "alpha": alpha, "rank_pattern": other_ranks, "alpha_pattern": other_alphas}


def _loha(layers: Layers) -> Adapter | None:
    kernels = {path for path, layer in layers.items() if layer.site.columns != layer.site.shape[1]}
    tucker = {path for path, layer in layers.items() if "hada_t1" in layer.tensors}
    names = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", ALPHA}
    if tucker not in (set[str](), kernels) or any(layer.tensors.keys() - names for layer in layers.values()):
        return None
    ranks = {path: len(layer.tensors["hada_w1_b"]) for path, layer in layers.items()}
    settings = _ranked(ranks, {path: float(layer.tensors[ALPHA]) for path, layer in layers.items()})
    return Adapter("LOHA", _without(layers, ALPHA), {**settings, "use_effective_conv2d": bool(tucker)})


def _lokr(layers: Layers) -> Adapter | None:
    """Find settings by which peft would give every layer the factors that it has."""
    names = {f"lokr_{half}{ending}" for half in ("w1", "w2") for ending in ("", "_a", "_b")} | {ALPHA}
    if any(layer.tensors.keys() - names for layer in layers.values()):
        return None
    sizes = {path: _Split.of(layer) for path, layer in layers.items()}
    both = any("lokr_w1_a" in layer.tensors for layer in layers.values())
    if any(split is None or split.form(both) != split.found for split in sizes.values()):
        return None
    splits = {path: split for path, split in sizes.items() if split is not None}
    for near in (-1, *sorted({n for split in splits.values() for n in split.left})):
        if all(split.comes_of(near) for split in splits.values()):
            break
    else:
        return None
    # Where both factors are full no tensor tells a rank; peft's scale is that of its settings all the same.
    full = {path: split.found == (True, True) for path, split in splits.items()}
    ranks = {path: split.rank for path, split in splits.items()}
    alphas = {path: float(ranks[path] if full[path] else layer.tensors[ALPHA]) for path, layer in layers.items()}
    settings = {**_ranked(ranks, alphas), "decompose_both": both, "decompose_factor": near, "use_effective_conv2d": False}
    return Adapter("LOKR", _without(layers, ALPHA), settings)


@dataclass(frozen=True)
class _Split:
    """How a Kronecker product is split: sizes of the small and of the large factor, its rank, and which are there in full."""

    left: tuple[int, int]
    right: tuple[int, int]
    rank: int
    found: tuple[bool, bool]

    @classmethod
    def of(cls, layer: Layer) -> "_Split | None":
        tensors, site = layer.tensors, layer.site
        found = "lokr_w1" in tensors, "lokr_w2" in tensors
        if found[0]:
            left = tensors["lokr_w1"].shape
        else:
            left = (len(tensors["lokr_w1_a"]), tensors["lokr_w1_b"].shape[1])
        right = (site.rows // left[0], site.shape[1] // left[1])
        ranks = {len(tensors[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in tensors} or {max(right)}
        return None if len(ranks) > 1 else cls((left[0], left[1]), right, ranks.pop(), found)

    def form(self, both: bool) -> tuple[bool, bool]:
        """Return which factors peft would have in full."""
        return not (both and self.rank < max(self.left) / 2), self.rank >= max(self.right) / 2

    def comes_of(self, near: int) -> bool:
        """Say whether peft splits both sides so when it is told to split them near to a number, or evenly (-1)."""
        return all((m, n) == _near(m * n, near) for m, n in zip(self.left, self.right, strict=True))


def _near(side: int, factor: int) -> tuple[int, int]:
    """Return the two factors of a side as peft does: the one asked for, or the largest up to it and the root, first."""
    if factor > 0 and side % factor == 0:
        return factor, side // factor
    limit = side if factor < 0 else factor
    small = max(n for n in range(1, int(side**0.5) + 1) if side % n == 0 and n <= limit)
    return small, side // small


def _oft(layers: Layers) -> Adapter | None:
    terms = _alike({path: int(layer.tensors["oft_terms"]) for path, layer in layers.items()})
    block = _alike({path: layer.site.columns // len(layer.tensors["oft_R.weight"]) for path, layer in layers.items()})
    if terms is None or block is None:
        return None
    series = {"use_cayley_neumann": terms > 0, **({"num_cayley_neumann_terms": terms} if terms else {})}
    settings = {"r": 0, "oft_block_size": block, **series, "peft_version": SERIES_SINCE}
    return Adapter("OFT", _without(layers, "oft_terms"), settings)


def _boft(layers: Layers) -> Adapter | None:
    """One factor is all that peft has without an extension for CUDA, which it builds on the machine or does without."""
    size = _alike({path: tuple(layer.tensors["boft_R"].shape[::3]) for path, layer in layers.items()})
    if size is None or size[0] != 1:
        return None
    tensors = _without(layers)
    for path, layer in layers.items():
        tensors[path]["boft_s"] = layer.tensors["boft_s"].view((-1, 1) if layer.site.op == "linear" else (1, -1))
    return Adapter("BOFT", tensors, {"boft_block_size": size[1], "boft_block_num": 0, "boft_n_butterfly_factor": 1})


def _hra(layers: Layers) -> Adapter | None:
    rank = _alike({path: layer.tensors["hra_u"].shape[1] for path, layer in layers.items()})
    return None if rank is None else Adapter("HRA", _without(layers), {"r": rank, "apply_GS": False})


def _ia3(layers: Layers) -> Adapter | None:
    fed = {path for path, layer in layers.items() if bool(layer.tensors["on_input"])}
    rest = layers.keys() - fed
    mistaken = any(path.endswith(name) for path in rest for name in fed)  # peft compares the ends of names, dots or not
    if mistaken or any(layers[path].has_bias for path in rest):
        return None
    tensors: dict[str, Suffixes] = {}
    for path, layer in layers.items():
        factor = 1 + layer.tensors["weight"].flatten()
        shape = (1, -1) if path in fed or layer.site.op == "conv" else (-1, 1)
        tensors[path] = {"ia3_l": factor.view(*shape, *[1] * (len(layer.site.shape) - 2))}
    return Adapter("IA3", tensors, {"feedforward_modules": sorted(fed)})


def _vera(layers: Layers) -> Adapter | None:
    shared: Suffixes = {}
    for half, axis in (("vera_A", 1), ("vera_B", 0)):
        found = (layer.tensors[half] for layer in layers.values())
        all_of = {(tensor.data_ptr(), tensor.shape): tensor for tensor in found}.values()  # mostly the same few
        widest = max(all_of, key=lambda tensor: tensor.shape[axis])
        own = (widest.narrow(axis, 0, tensor.shape[axis]) for tensor in all_of)
        if any(tensor.shape[1 - axis] != widest.shape[1 - axis] for tensor in all_of):
            return None
        if not all(torch.equal(part, tensor) for part, tensor in zip(own, all_of, strict=True)):
            return None
        shared[half] = widest
    settings = {"r": len(shared["vera_A"]), "save_projection": True, "projection_prng_key": 0}
    return Adapter("VERA", _without(layers, *shared), settings, shared)


def _fourierft(layers: Layers) -> Adapter | None:
    scale = _alike({path: float(layer.tensors["fourierft_scaling"]) for path, layer in layers.items()})
    seed = _alike({path: int(layer.tensors["fourierft_seed"]) for path, layer in layers.items()})
    if scale is None or seed is None:
        return None
    count, others = by_name({path: len(layer.tensors["fourierft_spectrum"]) for path, layer in layers.items()})
    settings = {"n_frequency": count, "n_frequency_pattern": others, "scaling": scale, "random_loc_seed": seed}
    return Adapter("FOURIERFT", _without(layers, "fourierft_scaling", "fourierft_seed"), settings)


def _c3a(layers: Layers) -> Adapter | None:
    block, others = by_name({path: layer.tensors["c3a_kernel"].shape[2] for path, layer in layers.items()})
    return Adapter("C3A", _without(layers), {"block_size": block, "block_size_pattern": others})


def _without(layers: Layers, *names: str) -> dict[str, Suffixes]:
    """Return the tensors by path, without those that settings say."""
    return {path: {n: t for n, t in layer.tensors.items() if n not in names} for path, layer in layers.items()}


_KINDS: Mapping[str, Callable[[Layers], Adapter | None]] = {
    "hada_w1_a": _loha,
    "lokr_w1": _lokr,
    "lokr_w1_a": _lokr,
    "oft_R.weight": _oft,
    "boft_R": _boft,
    "hra_u": _hra,
    "on_input": _ia3,
    "vera_A": _vera,
    "fourierft_spectrum": _fourierft,
    "c3a_kernel": _c3a,
}
"""The suffix by which a layer is known -> what makes an adapter of such layers."""
