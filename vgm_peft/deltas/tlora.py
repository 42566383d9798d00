"""T-LoRA: a LoRA of fewer ranks at high noise, where a single picture is soon learned by heart, and all at low noise.

Soboleva et al. 2025 (arXiv 2507.05964, AAAI 2026). Of R ranks the first r(t) act at timestep t, in training *and* in sampling:
r(t) = floor(((T - t) / T)^power (R - min_rank)) + min_rank. Since dW follows the timestep it cannot be merged, and
no other tool's file says it. Layers of a part that is told no timestep (text encoders) keep all their ranks.

`orthogonal` is the paper's Ortho-LoRA: dW = P diag(w) Q - P0 diag(w0) Q0, all three trained, where P0, w0, Q0 begin as the last
singular parts of a random matrix, so that ranks do not repeat one another. Singular vectors of a random matrix are uniformly
random orthonormal ones, and drawn as such. What is trained is the difference to the start, so that dW is zero to begin with.

| here | shape | is |
|---|---|---|
| `down`, `up` | (R, I[, *kernel]), (O, R) | the pair of `lowrank`; `orthogonal`: Q - Q0, P - P0 |
| `sigma` | (R,) | `orthogonal` only: w - w0 |
| `start_down`, `start_up`, `start_sigma` | as above | `orthogonal` only: Q0, P0, w0, stored and not trained |
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vgm_peft.delta import seeded
from vgm_peft.deltas.lowrank import LowRank, LowRankOptions, Pair
from vgm_peft.deltas.thin import weigh_ranks
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.site import Site


@dataclass(frozen=True, kw_only=True)
class TloraOptions(LowRankOptions):
    """Settings of one T-LoRA. The paper trains SDXL with rank 64, min_rank 32; FLUX with 32 and 1."""

    min_rank: int | None = None
    """Ranks that act even at the highest noise; None is half of them."""
    power: float = 1.0
    """Above 1 the ranks come in later, below 1 sooner."""
    steps: float = 1000.0
    """T, the timestep of pure noise as the denoiser is told it: 1000, or 1 where it is told a fraction."""
    orthogonal: bool = False
    """Begin with orthonormal factors (Ortho-LoRA) in place of a LoRA's: a singular decomposition per layer to begin with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_rank is not None and not 0 <= self.min_rank <= self.rank:
            raise ConfigError(f"min_rank = {self.min_rank}", expected=f"0 .. {self.rank}, the rank")
        for name in ("power", "steps"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} = {getattr(self, name)}", expected="above 0")


class Tlora(LowRank):
    """dW(t) = s * up diag(first r(t)) down; starts at zero because `up` does."""

    kind = "tlora"
    Options = TloraOptions
    examples = (TloraOptions(rank=4, alpha=2.0, min_rank=1), TloraOptions(rank=4, power=2.0, orthogonal=True))
    timed = True
    options: TloraOptions

    def __init__(self, site: Site, options: TloraOptions, generator: torch.Generator | None = None) -> None:
        """Draw `down` as a LoRA does, or all of the start from orthonormal matrices."""
        super().__init__(site, options, generator)
        self.mask: Tensor | None = None
        """Which ranks act now, (pictures or 1, R); None before the first timestep: all."""
        self._last: Tensor | None = None
        if not options.orthogonal:
            return
        self.check(site, options)
        source, rank = seeded(generator), options.rank
        left, right = (torch.linalg.qr(torch.randn(side, rank, generator=source)).Q for side in (site.rows, site.columns))
        values = torch.linalg.svdvals(torch.randn(site.rows, site.columns, generator=source) / rank)[-rank:]
        self.start_down = nn.Parameter(right.t().reshape(self.down.shape).contiguous(), requires_grad=False)
        self.start_up = nn.Parameter(left, requires_grad=False)
        self.start_sigma = nn.Parameter(values, requires_grad=False)
        self.sigma = nn.Parameter(torch.zeros(rank))
        nn.init.zeros_(self.down)

    def at(self, timestep: Tensor) -> None:
        """Let the first r(t) ranks act, for every picture by its own timestep."""
        if self._last is None or self._last.device != timestep.device:
            self._last = torch.tensor(self._last_steps(), device=timestep.device)
        self.mask = (timestep.reshape(-1, 1) <= self._last).to(self.up.dtype)

    def _last_steps(self) -> list[float]:
        """Return for each rank the highest timestep at which it acts: what r(t) says, the other way round."""
        options, always = self.options, self._always
        span = options.rank - always
        shares = [(i - always + 1) / span if i >= always else 0.0 for i in range(options.rank)]
        steps = [round(options.steps * (1 - share ** (1 / options.power)), 6) for share in shares]
        return [float("inf") if share == 0.0 else step for share, step in zip(shares, steps, strict=True)]

    @property
    def _always(self) -> int:
        """Ranks that act at every timestep."""
        return self.options.rank // 2 if self.options.min_rank is None else self.options.min_rank

    def pair(self) -> Pair:
        """Return all ranks' factors; `orthogonal`: [w Q; w Q - w0 Q0] and [P - P0, P0]."""
        if not self.options.orthogonal:
            return super().pair()
        shape = (-1, *[1] * (self.down.dim() - 1))
        now = self.start_down + self.down
        grown = self.sigma.view(shape) * now
        kept = self.start_sigma.view(shape)
        down = torch.cat([kept * now + grown, grown + kept * self.down])
        return Pair(down, torch.cat([self.up, self.start_up], 1), self.options.scale)

    def weigh(self, hidden: Tensor, pictures: int) -> Tensor:
        """Switch off the ranks that do not act at each picture's timestep."""
        if self.mask is None:
            return hidden
        mask = self.mask.to(hidden.device, hidden.dtype)
        return weigh_ranks(hidden, mask.repeat(1, 2) if self.options.orthogonal else mask)

    def change(self, base: Tensor) -> Tensor:
        """Return dW at the timestep last told. Raises `DeltaError` when pictures were told different ones."""
        down, up, scale = self.pair()
        if self.mask is None:
            return super().change(base)
        if bool((self.mask != self.mask[:1]).any()):
            raise DeltaError(f"{self.site}: one change for pictures at different timesteps", expected="one timestep for all")
        mask = self.mask[0].to(up.device, up.dtype).repeat(2 if self.options.orthogonal else 1)
        return Pair(down, up * mask, scale).product().view(self.site.shape)
