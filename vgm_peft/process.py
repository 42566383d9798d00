"""The `Process`: how a base model corrupts a clean latent, what its network predicts, and how a step is weighted.

One object serves epsilon and v-prediction (DDPM, Ho et al. 2020, arXiv 2006.11239 eq. 4; v: Salimans & Ho 2022,
arXiv 2202.00512 eq. 11); rectified flow joins with the transformer families. Letters: `x0` clean latent, `n` noise,
`a` alpha-bar, all (B, C, H, W); `t` (B,) integer timesteps, 0 .. N-1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vgm_peft.errors import BaseModelError

Prediction = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class Process:
    """Discrete variance-preserving diffusion: `x_t = sqrt(a) x0 + sqrt(1-a) n`."""

    prediction: Prediction
    alphas: Tensor
    """Cumulative alpha-bar by timestep, (N,) float64, decreasing; the last is 0 under zero-terminal SNR."""

    @classmethod
    def of(cls, config: Mapping[str, Any], zero_terminal_snr: bool | None = None) -> "Process":
        """Read the process from a diffusers scheduler's config; `zero_terminal_snr` overrides what the config says."""
        kind = config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction"):
            raise BaseModelError(f'the base\'s scheduler predicts "{kind}"', expected="epsilon or v_prediction")
        betas = _betas(config)
        alphas = torch.cumprod(1.0 - betas, 0)
        if zero_terminal_snr is None:
            zero_terminal_snr = bool(config.get("rescale_betas_zero_snr", False))
        if zero_terminal_snr:
            if kind == "epsilon":
                raise BaseModelError(
                    "zero-terminal SNR with epsilon-prediction", fix="it needs a v-prediction base, or switch it off"
                )
            alphas = rescale_zero_terminal_snr(alphas)
        return cls(kind, alphas)

    @property
    def steps(self) -> int:
        """N, the number of training timesteps."""
        return len(self.alphas)

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t."""
        a, b = self._rates(x0, t)
        return a * x0 + b * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the network should predict at `t`."""
        if self.prediction == "epsilon":
            return noise
        a, b = self._rates(x0, t)
        return a * noise - b * x0

    def clean(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """Return the estimate of x0 that a prediction implies."""
        a, b = self._rates(noisy, t)
        if self.prediction == "epsilon":
            return (noisy - b * prediction) / a
        return a * noisy - b * prediction

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio a/(1-a), (B,) float64."""
        a = self.alphas.to(t.device)[t]
        return a / (1.0 - a)

    def weight(self, t: Tensor, min_snr: float | None = None) -> Tensor:
        """Loss weight (B,) float32: 1, or min-SNR-gamma (Hang et al. 2023, arXiv 2303.09556 eq. 8).

        In the units of the predicted quantity: min(snr, g)/snr for epsilon, min(snr, g)/(snr + 1) for v.
        """
        if min_snr is None:
            return torch.ones(t.shape, device=t.device)
        snr = self.snr(t)
        capped = snr.clamp(max=min_snr)
        below = snr if self.prediction == "epsilon" else snr + 1.0
        return (capped / below).to(torch.float32)

    def _rates(self, like: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        a = self.alphas.to(t.device)[t].view(-1, *[1] * (like.dim() - 1))
        return a.sqrt().to(like.dtype), (1.0 - a).sqrt().to(like.dtype)


def rescale_zero_terminal_snr(alphas: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha-bar) so that the last step holds no signal (Lin et al. 2023, arXiv 2305.08891 alg. 1)."""
    root = alphas.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    return ((root - last) * (first / (first - last))) ** 2


def _betas(config: Mapping[str, Any]) -> Tensor:
    trained = config.get("trained_betas")
    if trained is not None:
        return torch.tensor(list(trained), dtype=torch.float64)
    steps, start, end = int(config["num_train_timesteps"]), float(config["beta_start"]), float(config["beta_end"])
    schedule = config.get("beta_schedule", "linear")
    if schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    if schedule == "squaredcos_cap_v2":
        grid = torch.arange(steps + 1, dtype=torch.float64) / steps
        bar = torch.cos((grid + 0.008) / 1.008 * torch.pi / 2) ** 2
        return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    raise BaseModelError(
        f'the base\'s scheduler has beta_schedule "{schedule}"', expected="linear, scaled_linear or squaredcos_cap_v2"
    )
