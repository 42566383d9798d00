"""LoRA: a change of low rank, dW = s * up @ down.

Hu et al. 2021 (arXiv 2106.09685, equation 3) for linear layers; LoCon (LyCORIS) for convolutions. The parameters and what
other tools call them stand in `lowrank`, as does the reading of LoCon's Tucker form. Variants that are options here:

| option | is |
|---|---|
| `rslora` | rank-stabilised scale alpha / sqrt(rank), Kalajdzievski 2023 (arXiv 2312.03732) |
| `plus` | LoRA+: `up` learns that many times faster, Hayou et al. 2024 (arXiv 2402.12354): 16 |
| `freeze_down` | LoRA-FA: `down` stays as drawn, Zhang et al. 2023 (arXiv 2308.03303); kohya draws it with `init = "xavier"` |
| `init` | how `down` is drawn: as peft and kohya do, as diffusers' scripts and cloneofsimo's do, as kohya's LoRA-FA does |

The weight part of ED-LoRA (Mix-of-Show, arXiv 2305.18292) is `rank = 4` and nothing else: its "alpha" of 1 multiplies
`up @ down` as it is, which is our alpha = rank; the 0.7 it is sampled with is a strength. Its words are trained beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from vgm_peft.delta import seeded
from vgm_peft.deltas.lowrank import LowRank, LowRankOptions, read_pair
from vgm_peft.errors import ConfigError
from vgm_peft.site import Site

Init = Literal["kaiming", "gaussian", "xavier"]


@dataclass(frozen=True, kw_only=True)
class LoraOptions(LowRankOptions):
    """Settings of one LoRA. The defaults are those of peft."""

    plus: float = 1.0
    """LoRA+: the learning rate of `up` over that of `down`; the paper advises 16, with a lower rate for both."""
    freeze_down: bool = False
    """LoRA-FA: train `up` alone, which halves the values trained and needs none of the layer's inputs in memory."""
    init: Init = "kaiming"
    """How `down` is drawn: uniform within 1/sqrt(columns), normal of deviation 1/R, or of sqrt(2 / (columns + R))."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.plus > 0:
            raise ConfigError(f"plus = {self.plus}", expected="above 0", fix="1 for one learning rate, 16 for LoRA+")
        if self.init not in get_args(Init):
            raise ConfigError(f'init = "{self.init}"', expected="one of " + ", ".join(get_args(Init)))


class Lora(LowRank):
    """dW = s * up @ down on a linear or conv layer; starts at zero because `up` does."""

    kind = "lora"
    Options = LoraOptions
    examples = (
        LoraOptions(rank=3, alpha=2.0),
        LoraOptions(rank=4, rslora=True),
        LoraOptions(rank=4, freeze_down=True, init="xavier"),
    )
    options: LoraOptions

    def __init__(self, site: Site, options: LoraOptions, generator: torch.Generator | None = None) -> None:
        """Draw `down` as `init` says."""
        super().__init__(site, options, generator)
        if options.init != "kaiming":
            deviation = 1 / options.rank if options.init == "gaussian" else sqrt(2 / (site.columns + options.rank))
            nn.init.normal_(self.down, std=deviation, generator=seeded(generator))
        self.down.requires_grad_(not options.freeze_down)

    @classmethod
    def unpack(cls, site: Site, tensors: Mapping[str, Tensor]) -> Self | None:
        """Read `lora_down.weight`, `lora_up.weight` and, where they are there, `lora_mid.weight` and `alpha`."""
        spelled = read_pair(site, tensors)
        if spelled is None:
            return None
        with torch.device("meta"):  # no initial values, which would take longer to draw than the file's to read
            patch = cls(site, LoraOptions(rank=spelled.options.rank, alpha=spelled.options.alpha))
        return patch.take(spelled)

    def extra_groups(self) -> Mapping[str, float]:
        """LoRA+: `up` learns `plus` times faster."""
        return {"up": self.options.plus} if self.options.plus != 1.0 else {}
