"""DyLoRA: a LoRA whose first ranks do most, so that it may be cut to any lower rank after training.

Valipour et al. 2022 (arXiv 2210.07558). Every training forward draws a number n of ranks, a multiple of `unit`,
and uses the first n alone, of which only the last `unit` learn; dW_n = s sqrt(R / n) up[:, :n] down[:n], kohya's scale (LyCORIS
trains with alpha / (number of blocks) instead). All R are used when it is sampled, with s. The draw is from torch's
global generator on the CPU, as dropout's is: seed that per step to repeat a run.

Parameters, files and the meaning of the other options are those of a LoRA (see `lowrank`), also for other tools.
"""

from dataclasses import dataclass, replace
from math import gcd, sqrt
from typing import Self

import torch

from vgm_peft.deltas.lowrank import LowRank, LowRankOptions, Pair, Spelled
from vgm_peft.errors import ConfigError, DeltaError


@dataclass(frozen=True, kw_only=True)
class DyloraOptions(LowRankOptions):
    """Settings of one DyLoRA: those of a LoRA, and how finely it can be cut."""

    unit: int = 1
    """Ranks that learn together, a divisor of the rank: 1 as in the paper, 4 as in LyCORIS, more for fewer steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit < 1 or self.rank % self.unit:
            allowed = ", ".join(str(n) for n in range(1, self.rank + 1) if self.rank % n == 0)
            raise ConfigError(f"unit = {self.unit} does not divide the rank {self.rank}", expected=f"one of {allowed}")


class Dylora(LowRank):
    """dW = s * up @ down, trained to be cut; starts at zero because `up` does."""

    kind = "dylora"
    Options = DyloraOptions
    examples = (DyloraOptions(rank=4, alpha=2.0), DyloraOptions(rank=4, unit=2))
    options: DyloraOptions

    def live_pair(self) -> Pair:
        """Return the whole pair; in training the first ranks, of which the last unit learns."""
        if not self.training:
            return self.pair()
        rank, unit = self.options.rank, self.options.unit
        held = unit * int(torch.randint(rank // unit, ()))
        n = held + unit
        down = torch.cat([self.down[:held].detach(), self.down[held:n]])
        up = torch.cat([self.up[:, :held].detach(), self.up[:, held:n]], 1)
        return Pair(down, up, self.options.scale * sqrt(rank / n))

    def truncated(self, rank: int) -> Self:
        """Return a patch of the first `rank` ranks at the scale that they were trained with. Raises `DeltaError` beyond R."""
        whole = self.options
        if not 1 <= rank <= whole.rank:
            raise DeltaError(f"{self.site}: cut to rank {rank}", expected=f"1 .. {whole.rank}")
        alpha = whole.scale * sqrt(whole.rank / rank) * rank
        options = replace(whole, rank=rank, alpha=alpha, rslora=False, unit=gcd(whole.unit, rank))
        patch = type(self)(self.site, options).to(self.up.device, self.up.dtype)
        return patch.take(Spelled(self.down[:rank], self.up[:, :rank], options))
