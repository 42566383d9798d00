"""VeRA: two trained vectors around frozen random matrices that all layers share, dW = diag(b) B diag(d) A.

Kopiczko et al. 2023 (arXiv 2310.11454, equation 2). A and B are made from a seed and are in no file; of a stream of random
values each layer takes as many rows as it has inputs or outputs, so what one layer gets does not depend on the others.

Letters: `R` rank, `O` outputs, `I` inputs (of a convolution, all values of its kernel that one output sees).

| here | shape | peft |
|---|---|---|
| `b`, `d` | (O,), (R,) | `vera_lambda_b`, `vera_lambda_d` |
| (A), (B) | (R, I), (O, R), frozen | `vera_A`, `vera_B`: other values, drawn for the largest layer and scaled by its size |

Both are uniform with variance 2 / fan-in, as in the paper (Kaiming); of A the fan-in is the layer's own. Other tools get it
multiplied out, as a LoRA of rank R.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import prod, sqrt

import torch
from torch import Tensor, nn

from vgm_peft.delta import Call, Patch, along_outputs
from vgm_peft.deltas.dropout import check_shares, hide_inputs
from vgm_peft.deltas.thin import narrow, widen
from vgm_peft.errors import ConfigError
from vgm_peft.site import Site


@dataclass(frozen=True, kw_only=True)
class VeraOptions:
    """Settings of one VeRA. The defaults are those of peft."""

    rank: int = 256
    """R: costs time, but hardly any values; may exceed the layer's own sides."""
    d_initial: float = 0.1
    """What d is at first."""
    seed: int = 0
    """What the frozen matrices are made from."""
    dropout: float = 0.0
    """Share of the layer's inputs hidden from A while training."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank = {self.rank}", expected="1 or more")
        if self.d_initial == 0.0:
            raise ConfigError("d_initial = 0.0", expected="another number", fix="with b and d both 0 nothing is ever learned")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed = {self.seed}", expected="0 .. 2**63 - 1")
        check_shares(self)


class Vera(Patch):
    """dW = diag(b) B diag(d) A on a linear or conv layer; starts at zero because b does."""

    kind = "vera"
    Options = VeraOptions
    ops = frozenset({"linear", "conv"})
    rate = 20.0
    examples = (VeraOptions(rank=5, d_initial=0.5), VeraOptions(rank=8, seed=3))
    joins = True
    options: VeraOptions

    def __init__(self, site: Site, options: VeraOptions, generator: torch.Generator | None = None) -> None:
        """Begin at b = 0 and d = `d_initial`; nothing is drawn from `generator`."""
        super().__init__(site, options, generator)
        self.b = nn.Parameter(torch.zeros(site.rows))
        self.d = nn.Parameter(torch.full((options.rank,), options.d_initial))

    def frozen(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return A (R, inputs of one group, *kernel) and B (O, R)."""
        return _matrices(self.site.shape, self.options.rank, self.options.seed, dtype, device)

    def change(self, base: Tensor) -> Tensor:
        """Return diag(b) B diag(d) A in the shape of the weight."""
        down, up = self.frozen(self.b.dtype, self.b.device)
        return ((self.b[:, None] * up) @ (self.d[:, None] * down.flatten(1))).view(self.site.shape)

    def add_change(self, weight: Tensor, base: Tensor, strength: float) -> Tensor:
        """Return `weight` + strength * (b d^T * B) A: so nothing of the size of a matrix is kept for the gradient."""
        down, up = self.frozen(weight.dtype, weight.device)
        scaled = torch.outer(self.b, self.d).to(weight.dtype) * up
        return torch.addmm(weight.flatten(1), scaled, down.flatten(1), alpha=strength).view(weight.shape)

    def contribution(self, call: Call) -> Tensor:
        """Return b * B(d * A(x))."""
        return along_outputs(self.b.to(call.x.dtype), call.x, call.layer) * self._wide(call)

    def add_to(self, output: Tensor, call: Call, strength: float) -> Tensor:
        """Return `output` + strength * b * B(d * A(x)); scaling activations spares the gradients of two matrices."""
        b = along_outputs(strength * self.b.to(output.dtype), call.x, call.layer)
        return torch.addcmul(output, self._wide(call).to(output.dtype), b)

    def _wide(self, call: Call) -> Tensor:
        x = hide_inputs(self, call.x)
        down, up = self.frozen(x.dtype, x.device)
        hidden = narrow(x, down, call.layer)
        d = self.d.to(hidden.dtype)
        if self.site.op == "conv":  # each group has all ranks
            d = d.repeat(hidden.shape[1] // len(d)).view(-1, *[1] * (hidden.dim() - 2))
        return widen(d * hidden, up, call.layer)

    def pack(self, base: Tensor) -> dict[str, Tensor]:
        """Return the LoRA it multiplies out to: `lora_down.weight`, `lora_up.weight` and `alpha` = rank."""
        down, up = self.frozen(self.b.dtype, self.b.device)
        d = self.d.detach().view(-1, *[1] * (down.dim() - 1))
        return {
            "lora_down.weight": d * down,
            "lora_up.weight": (self.b.detach()[:, None] * up).reshape(*up.shape, *[1] * (down.dim() - 2)),
            "alpha": torch.tensor(float(self.options.rank)),
        }

    def adapt(self) -> dict[str, Tensor] | None:
        """Return the vectors of a linear layer, and as `vera_A` and `vera_B` its rows of what all layers of a rank share."""
        if self.site.op != "linear":
            return None
        rank, seed, dtype = self.options.rank, self.options.seed, self.b.dtype
        tensors = {
            "vera_lambda_b": self.b * sqrt(6 / rank),
            "vera_lambda_d": self.d * sqrt(6 / self.site.columns),
            "vera_A": _stream(2 * seed, self.site.columns, rank).to(self.b.device, dtype).t(),
            "vera_B": _stream(2 * seed + 1, self.site.rows, rank).to(self.b.device, dtype),
        }
        return {name: tensor.detach() for name, tensor in tensors.items()}


@lru_cache(maxsize=64)
def _matrices(shape: tuple[int, ...], rank: int, seed: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return A and B for a weight of `shape`, kept once for all layers that have it."""
    with torch.inference_mode(False), torch.no_grad():
        columns = prod(shape[1:])
        down = sqrt(6 / columns) * _stream(2 * seed, columns, rank).to(device, dtype).t()
        up = sqrt(6 / rank) * _stream(2 * seed + 1, shape[0], rank).to(device, dtype)
        return down.reshape(rank, *shape[1:]), up


@lru_cache(maxsize=16)
def _stream(seed: int, rows: int, rank: int) -> Tensor:
    """Return the first `rows` of an endless table of U(-1, 1)."""
    with torch.inference_mode(False), torch.no_grad():
        table = torch.empty(rows, rank, dtype=torch.float32, device="cpu")
        return table.uniform_(-1.0, 1.0, generator=torch.Generator().manual_seed(seed))
