"""LoKr: a Kronecker product one or both of whose factors are of low rank, dW = s * w1 (x) w2.

Yeh et al. 2023 (LyCORIS, arXiv 2309.14859, equations 4 and 5). For a weight of O = o1*o2 outputs and I = i1*i2 inputs w1 is
the small factor, w2 the large one, which has the kernel of a convolution; `dW[a*o2 + b, c*i2 + d] = s * w1[a, c] * w2[b, d]`.

| here | shape | LyCORIS and its readers |
|---|---|---|
| `w1` | (o1, i1) | `lokr_w1` |
| `w1a`, `w1b` (`decompose_both`) | (o1, R), (R, i1) | `lokr_w1_a`, `lokr_w1_b` |
| `w2` (`full_matrix`) | (o2, i2[, *kernel]) | `lokr_w2` |
| `w2a`, `w2b` | (o2, R), (R, i2[, *kernel]) | `lokr_w2_a`, `lokr_w2_b`, kernel flattened |
| `w2a`, `core`, `w2b` (`tucker`) | (o2, R), (R, R, *kernel), (R, i2) | `lokr_w2_a` transposed, `lokr_t2`, `lokr_w2_b` |

The scale s is alpha / rank, or 1 where both factors are full, as all readers have it. `pack` writes it into w1 (and alpha =
rank), since they differ over it, and folds `core` into `lokr_w2_b`, since some fail on `lokr_t2`. Files with two full factors
are read as kind `krona`, which is the same algebra; all others, and all with a `dora_scale` (see `decomposed`), as this one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import Self, cast

import torch
from torch import Tensor, nn

from vgm_peft.delta import Call, seeded
from vgm_peft.deltas.decomposed import SCALE, Axis, Decomposable, check_axis, read_scale
from vgm_peft.deltas.divisors import divisor, split
from vgm_peft.deltas.dropout import check_shares
from vgm_peft.deltas.kronecker import Kronecker, kron
from vgm_peft.deltas.thin import check_product, check_scale, sketch
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.site import Site

NAMES = frozenset(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")) | {"alpha", SCALE}


@dataclass(frozen=True, kw_only=True)
class LokrOptions:
    """Settings of one LoKr. The defaults are those of LyCORIS' small LoKr, at its usual alpha = rank."""

    rank: int = 4
    """R of the factors that are not full."""
    alpha: float | None = None
    """The change is scaled by alpha / rank; None is alpha = rank. Without effect where both factors are full."""
    factor: int = -1
    """Size of w1: a divisor of the layer's sides near to it (4 .. 16 for large LoKr), or -1 for sides as equal as can be."""
    decompose_both: bool = False
    """Give w1 the rank too, where that saves anything."""
    full_matrix: bool = False
    """Keep w2 full. So it is anyhow where the rank is at least half its larger side."""
    tucker: bool = False
    """Factor w2 of a convolution in three, the kernel in the smallest (R, R, *kernel)."""
    o1: int | None = None
    """Rows of w1, a divisor of the outputs. With o1 and i1 given, `factor` is ignored and the other settings are literal."""
    i1: int | None = None
    """Columns of w1, a divisor of the inputs (channels)."""
    decompose: Axis | None = None
    """Give every output or every input a magnitude of its own, as DoRA does (LyCORIS' `dora_wd`)."""
    absolute: bool = False
    """`magnitude` is the norm itself, as other tools' files have it, and not what is added to the norm of the base."""
    rank_dropout: float = 0.0
    """Share of the rows of dW hidden while training, for all pictures alike; the rest is scaled up by 1 / (1 - p)."""
    module_dropout: float = 0.0
    """Share of the forwards of training in which the layer goes without the patch."""

    def __post_init__(self) -> None:
        check_scale(self.rank, self.alpha)
        check_shares(self)
        check_axis("decompose", self.decompose)
        if self.factor < 1 and self.factor != -1:
            raise ConfigError(f"factor = {self.factor}", expected="1 or more, or -1")
        if (self.o1 is None) != (self.i1 is None):
            raise ConfigError(f"o1 = {self.o1}, i1 = {self.i1}", expected="both or neither")

    @property
    def scale(self) -> float:
        """s, what the product is multiplied by."""
        if self.alpha is None or self.full_matrix and not self.decompose_both:
            return 1.0
        return self.alpha / self.rank


class Lokr(Decomposable):
    """dW = s * w1 (x) w2 on a linear or conv layer; starts at zero because w2, or w2b, does."""

    kind = "lokr"
    Options = LokrOptions
    ops = frozenset({"linear", "conv"})
    rate = 10.0
    examples = (
        LokrOptions(rank=1, alpha=2.0),
        LokrOptions(rank=1, factor=2, tucker=True),
        LokrOptions(rank=1, alpha=0.5, decompose_both=True, o1=2, i1=2),
        LokrOptions(factor=2, full_matrix=True),
        LokrOptions(rank=1, factor=2, decompose="input"),
        LokrOptions(factor=2, full_matrix=True, decompose="output"),
    )
    joins = True
    options: LokrOptions
    # Of these, those that the options call for:
    w1: Tensor
    w1a: Tensor
    w1b: Tensor
    w2: Tensor
    w2a: Tensor
    w2b: Tensor
    core: Tensor

    def __init__(self, site: Site, options: LokrOptions, generator: torch.Generator | None = None) -> None:
        """Draw what is not zero from U(-b, b), b = 1/sqrt(columns) (Kaiming with a = sqrt 5), as LyCORIS.

        Raises `DeltaError` when o1 or i1 does not divide the layer.
        """
        options = _resolved(site, options)
        super().__init__(site, options, generator)
        o1, i1, rank, kernel = cast(int, options.o1), cast(int, options.i1), options.rank, site.shape[2:]
        o2, i2 = site.rows // o1, site.shape[1] // i1
        shapes = {"w1a": (o1, rank), "w1b": (rank, i1)} if options.decompose_both else {"w1": (o1, i1)}
        if options.full_matrix:
            shapes |= {"w2": (o2, i2, *kernel)}
        elif options.tucker:
            shapes |= {"w2a": (o2, rank), "core": (rank, rank, *kernel), "w2b": (rank, i2)}
        else:
            shapes |= {"w2a": (o2, rank), "w2b": (rank, i2, *kernel)}
        generator = seeded(generator)
        for name, shape in shapes.items():
            parameter = nn.Parameter(torch.zeros(shape))
            if name not in ("w2", "w2b"):
                nn.init.kaiming_uniform_(parameter, a=sqrt(5), generator=generator)
            self.register_parameter(name, parameter)
        self.add_magnitude()

    def _left(self) -> Tensor:
        """Return s * w1 in full: it is small."""
        return self.options.scale * (self.w1a @ self.w1b if self.options.decompose_both else self.w1)

    def _chain(self) -> tuple[Tensor, ...]:
        """Return w2, or its two factors in the order in which they act, the first with the kernel."""
        if self.options.full_matrix:
            return (self.w2,)
        first = torch.einsum("mn...,ni->mi...", self.core, self.w2b) if self.options.tucker else self.w2b
        return first, self.w2a

    def inner(self) -> Tensor:
        """Return s * w1 (x) w2 in the shape of the weight."""
        first, *rest = self._chain()
        right = (rest[0] @ first.flatten(1)).view(-1, *first.shape[1:]) if rest else first
        return kron(self._left(), right)

    def contribution(self, call: Call) -> Tensor:
        """Return dW x as small products on a reshaped activation; dense if decomposed, and for convolutions in groups."""
        if self.options.decompose is not None:
            return super().contribution(call)
        product = Kronecker(self._left(), self._chain()).to(call.x.dtype)
        if self.site.op == "linear":
            return product.on_tokens(call.x)
        if cast(nn.Conv2d, call.layer).groups > 1:
            return super().contribution(call)
        return product.on_pictures(call.x, call.layer)

    def add_to(self, output: Tensor, call: Call, strength: float) -> Tensor:
        """Return `output + strength * contribution`, on linear layers summed inside the last product."""
        if self.site.op == "linear" and not self.hides_rows and self.options.decompose is None:
            return Kronecker(self._left(), self._chain()).to(output.dtype).add_to_tokens(output, call.x, strength)
        return super().add_to(output, call, strength)

    def pack(self, base: Tensor) -> dict[str, Tensor]:
        """Return the factors under `lokr_` names, `alpha` = rank, the scale in w1 (or w1_a), and `dora_scale` if decomposed."""
        options, tensors = self.options, dict[str, Tensor]()
        if options.decompose_both:
            tensors["lokr_w1_a"] = options.scale * self.w1a.detach()
            tensors["lokr_w1_b"] = self.w1b.detach()
        else:
            tensors["lokr_w1"] = self._left().detach()
        first, *rest = self._chain()
        if rest:
            tensors |= {"lokr_w2_a": rest[0].detach(), "lokr_w2_b": first.detach().flatten(1)}
        else:
            tensors["lokr_w2"] = first.detach()
        return {**tensors, "alpha": torch.tensor(float(options.rank)), **self.pack_magnitude(base)}

    @classmethod
    def unpack(cls, site: Site, tensors: Mapping[str, Tensor]) -> Self | None:
        """Read every LoKr with a factor of low rank or a `dora_scale`; a missing or zero alpha is alpha = rank."""
        halves = [_half(tensors, "lokr_w1"), _half(tensors, "lokr_w2")]
        if not tensors.keys() <= NAMES or None in halves or ("lokr_t2" in tensors and halves[1] == 1):
            return None
        if halves == [1, 1] and SCALE not in tensors:
            return None
        try:
            return cls._read(site, {name.removeprefix("lokr_"): tensor for name, tensor in tensors.items()})
        except (RuntimeError, IndexError, ValueError):
            found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items() if name != "alpha")
            raise DeltaError(
                f"{site}: {found} do not multiply to its weight", fix="use the delta with the base it was trained on"
            ) from None

    @classmethod
    def _read(cls, site: Site, given: dict[str, Tensor]) -> Self:
        """Make the patch of a file's factors, their names without `lokr_`. Raises errors of torch where they do not fit."""
        if "w1" not in given:
            check_product(site, len(given["w1_a"]), given["w1_b"].shape[-1])
        left = given["w1"] if "w1" in given else given["w1_a"] @ given["w1_b"]
        rank = next((len(given[name]) for name in ("w2_b", "w1_b") if name in given), 1)
        # Two low ranks that differ: w1 in full means the same.
        both = "w1_a" in given and len(given["w1_b"]) == rank
        alpha = float(given["alpha"]) if "alpha" in given else 0.0
        tucker = "t2" in given
        axis, g = read_scale(site, given[SCALE]) if SCALE in given else (None, None)
        last = given["w2_a"].t() if tucker else given.get("w2_a")
        options = LokrOptions(
            rank=rank,
            alpha=alpha or None,
            decompose_both=both,
            full_matrix=last is None,
            tucker=tucker,
            o1=left.shape[0],
            i1=left.shape[1],
            decompose=axis,
            absolute=axis is not None,
        )
        values = {"w1a": given["w1_a"], "w1b": given["w1_b"]} if both else {"w1": left}
        values |= {"w2": given["w2"]} if last is None else {"w2a": last, "w2b": given["w2_b"]}
        values |= {"core": given["t2"]} if tucker else {}
        for name, parameter in sketch(cls, site, options).named_parameters():
            if name != "magnitude" and (len(values[name]), values[name].numel()) != (len(parameter), parameter.numel()):
                raise ValueError(name)
        patch = cls(site, options)
        patch.take_magnitude(g)
        with torch.no_grad():
            for name, value in values.items():
                parameter = patch.get_parameter(name)
                parameter.copy_(value.reshape(parameter.shape))
        return patch


def _resolved(site: Site, options: LokrOptions) -> LokrOptions:
    """Return options that say the shapes and which factors are full, for a fresh patch as LyCORIS chooses them."""
    kernel = site.shape[2:]
    tucker = options.tucker and not options.full_matrix and any(k != 1 for k in kernel)
    if options.o1 is not None:
        o1 = divisor(site, "o1", options.o1, 1, (site.rows, "outputs"))
        i1 = divisor(site, "i1", options.i1, 1, (site.shape[1], "inputs"))
        return replace(options, o1=o1, i1=i1, tucker=tucker)
    (o1, o2), (i1, i2) = split(site.rows, options.factor), split(site.shape[1], options.factor)
    full = options.full_matrix or 2 * options.rank >= max(o2, i2)
    both = options.decompose_both and not options.full_matrix and 2 * options.rank < max(o1, i1)
    return replace(options, o1=o1, i1=i1, full_matrix=full, decompose_both=both, tucker=tucker and not full)


def _half(tensors: Mapping[str, Tensor], name: str) -> int | None:
    """Return of how many factors the tensors spell one half of the product, 1 or 2; None where they do not."""
    pair = {f"{name}_a", f"{name}_b"} & tensors.keys()
    return {(True, 0): 1, (False, 2): 2}.get((name in tensors, len(pair)))
