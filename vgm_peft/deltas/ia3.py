"""(IA)^3: scaling a layer's outputs or inputs by one learned value each, dW = diag(v) W or W diag(v).

Liu et al. 2022 (arXiv 2205.05638, section 3.3): keys and values are scaled at the output, the feed-forward at the input of its
second layer. As in LyCORIS v is what is added to 1, so that 0 changes nothing (peft keeps 1 + v).

Letters: `O` outputs, `I` inputs. Parameters and what other tools call them:

| here | shape | LyCORIS | peft |
|---|---|---|---|
| `v` | (O,), with `on_input` (I,) | `weight`, conv (1, O, 1, 1) or (1, I, 1, 1); `on_input` | `ia3_l` - 1 |

The groups of a grouped convolution share their I/groups values. The weight alone is scaled, never the bias; peft scales the
bias too where it scales outputs, and so do some of LyCORIS' paths.
The values train at 10 to 100 times LoRA's learning rate: 5e-3 .. 1e-2. As released the sites are `to_k` and `to_v`, and
`ff.net.2` with `on_input`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from vgm_peft.delta import Call, Patch
from vgm_peft.deltas.channels import add_scaled_rows, along_rows
from vgm_peft.deltas.dropout import check_shares
from vgm_peft.errors import DeltaError
from vgm_peft.site import Site


@dataclass(frozen=True, kw_only=True)
class Ia3Options:
    """Which side is scaled, and how often it is left alone."""

    on_input: bool = False
    """Scale what goes into the layer (right for the second layer of a feed-forward) instead of what comes out of it."""
    module_dropout: float = 0.0
    """Share of the forwards of training in which the layer goes without the patch."""

    def __post_init__(self) -> None:
        check_shares(self)


class Ia3(Patch):
    """dW = diag(v) W or W diag(v) on a linear or conv layer; starts at zero because v does."""

    kind = "ia3"
    Options = Ia3Options
    ops = frozenset({"linear", "conv"})
    where = ("keys+mlp",)
    rate = 50.0
    examples = (Ia3Options(on_input=True), Ia3Options())
    base_free = False
    packs_alone = True
    options: Ia3Options

    def __init__(self, site: Site, options: Ia3Options, generator: torch.Generator | None = None) -> None:
        """Begin at v = 0."""
        super().__init__(site, options, generator)
        self.acts = "input" if options.on_input else "output"
        self.v = nn.Parameter(torch.zeros(site.shape[1] if options.on_input else site.rows))

    def change(self, base: Tensor) -> Tensor:
        """Return the weight times v along its inputs or its outputs."""
        axis = along_rows(self.v, base[0]) if self.options.on_input else along_rows(self.v, base)
        return axis * base.to(self.v.dtype)

    def feed(self, x: Tensor, base: Tensor) -> Tensor:
        """Return v * x over the channels."""
        return self._over_channels(x) * x

    def _over_channels(self, x: Tensor) -> Tensor:
        """Return v in the shape that broadcasts over the layer's input, once per group of a convolution."""
        v = self.v.to(x.dtype)
        return v if self.site.op == "linear" else v.repeat(x.shape[1] // len(v)).view(-1, *[1] * (x.dim() - 2))

    def add_feed(self, fed: Tensor, x: Tensor, base: Tensor, strength: float) -> Tensor:
        """Return `fed` + strength * v * x."""
        return torch.addcmul(fed, x, strength * self._over_channels(x))

    def contribution(self, call: Call) -> Tensor:
        """Return v * (W x), or W (v * x)."""
        if self.options.on_input:
            return super().contribution(call)
        return self.add_to(torch.zeros((), dtype=call.x.dtype, device=call.x.device), call, 1.0)

    def add_to(self, output: Tensor, call: Call, strength: float) -> Tensor:
        """Return `output` + strength * v * (W x)."""
        if self.options.on_input:
            return super().add_to(output, call, strength)
        return add_scaled_rows(output, call, self.site, self.v, strength)

    def pack(self, base: Tensor) -> dict[str, Tensor]:
        """Return `weight` and `on_input`."""
        v = self.v.detach()
        if self.site.op == "conv":
            v = v.view(1, -1, *[1] * (len(self.site.shape) - 2))
        return {"weight": v, "on_input": torch.tensor(int(self.options.on_input))}

    @classmethod
    def unpack(cls, site: Site, tensors: Mapping[str, Tensor]) -> Self | None:
        """Read `weight` and `on_input`."""
        if set(tensors) != {"weight", "on_input"}:
            return None
        v, on_input = tensors["weight"], bool(tensors["on_input"].any())
        size = site.shape[1] if on_input else site.rows
        if site.op not in cls.ops or v.numel() != size or v.squeeze().dim() > 1:
            side = "inputs" if on_input else "outputs"
            raise DeltaError(
                f"{site}: weight {'x'.join(map(str, v.shape))} of an (IA)^3 on its {side}",
                expected=f"{size} values",
                fix="use the delta with the base it was trained on",
            )
        patch = cls(site, Ia3Options(on_input=on_input))
        with torch.no_grad():
            patch.v.copy_(v.reshape(-1))
        return patch
