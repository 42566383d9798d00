"""How errors count: by their size, by their timestep, by their place; and which timesteps come up.

Pure functions of `[loss]` and the base's process, each with its source. Weights are defined for the error of the noise; for a
base that predicts v, whose squared error is (snr + 1) / snr times that of the noise, they are divided by this, so that a
weight is the same objective on either kind (as Hang et al. 2023, arXiv 2303.09556 eq. 8, have it for min-SNR).
"""

import math

import torch
from torch import Tensor

from vgm_peft.process import Process
from vgm_peft.train.config_learning import LossConfig


def errors(prediction: Tensor, target: Tensor, t: Tensor, process: Process, config: LossConfig) -> Tensor:
    """Return the error of every value, of the shape of `prediction`, float32.

    `mse` is d^2; the pseudo-Huber losses with bound c are `huber` 2c (sqrt(d^2 + c^2) - c), which is d^2 for small d, and
    `smooth-l1`, the same divided by c, which is 2|d| for large d (Khrapov et al. 2024, arXiv 2403.16728).
    """
    d = prediction.float() - target.float()
    if config.kind == "mse":
        return d * d
    c = huber_bound(t, process, config).to(d).view(-1, *[1] * (d.dim() - 1))
    smooth = 2.0 * ((d * d + c * c).sqrt() - c)
    return smooth * c if config.kind == "huber" else smooth


def huber_bound(t: Tensor, process: Process, config: LossConfig) -> Tensor:
    """Return c for each timestep, (B,) float64, from about 1 at the picture to `huber_c` at the noise.

    `exponential` is huber_c^(t / N); `snr` is (1 - huber_c) / (1 + s)^2 + huber_c, s = sqrt(1 / snr) being the noise's share.
    """
    low = config.huber_c
    if config.huber_schedule == "constant":
        return torch.full(t.shape, low, dtype=torch.float64, device=t.device)
    if config.huber_schedule == "exponential":
        return torch.exp(math.log(low) * t.double() / process.steps)
    noise = process.snr(t).rsqrt()
    return (1.0 - low) / (1.0 + noise) ** 2 + low


def weights(t: Tensor, process: Process, config: LossConfig) -> Tensor | None:
    """Return what each timestep weighs, (B,) float32; `None` when all weigh 1.

    min-SNR-gamma: min(snr, gamma) / snr. Debiased: 1 / sqrt(snr) (Yu et al. 2023, arXiv 2310.08442). P2:
    1 / (1 + snr)^gamma (Choi et al. 2022, arXiv 2204.00227, k = 1).
    """
    if config.min_snr is not None:
        return process.weight(t, config.min_snr)
    if not config.debiased and not config.p2:
        return None
    snr = process.snr(t)
    if process.prediction == "epsilon":
        return (snr.rsqrt() if config.debiased else (1.0 + snr) ** -config.p2).float()
    of_v = snr.sqrt() if config.debiased else snr * (1.0 + snr) ** -config.p2  # times snr; at zero-terminal SNR this is 0
    return (of_v / (snr + 1.0)).float()


def averaged(error: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean error of each picture, (B,), over the places that count.

    `mask` (B, 1, H, W) in 0 .. 1 says how much each place counts; the mean is over its area, so a small subject learns as
    fast as one that fills its picture. A mask that is 0 everywhere gives 0.
    """
    if mask is None:
        return error.flatten(1).mean(1)
    counts = mask.to(error).expand_as(error).flatten(1)
    return (error.flatten(1) * counts).sum(1) / counts.sum(1).clamp(min=1e-6)


def timesteps(count: int, generator: torch.Generator, process: Process, config: LossConfig) -> Tensor:
    """Draw `count` timesteps, int64 in 0 .. N-1, each alone or (`stratified`) one from each `count`-th of the distribution."""
    steps, (first, last) = process.steps, config.timestep_range
    plain = config.timesteps == "uniform" and config.shift == 1.0 and (first, last) == (0.0, 1.0)
    if plain and not config.stratified:
        return torch.randint(0, steps, (count,), generator=generator)
    if config.stratified:
        place = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
        if plain:
            return (place * (steps / count)).long().clamp_(max=steps - 1)
        u = place / count
    else:
        u = torch.rand(count, generator=generator)
    u = first + (last - first) * _warped(u.double(), config)
    low, high = math.floor(first * steps), max(math.ceil(last * steps) - 1, 0)
    return (u * steps).long().clamp_(low, max(low, high))


def _warped(u: Tensor, config: LossConfig) -> Tensor:
    """Turn numbers spread evenly over 0 .. 1 into ones of the distribution asked for, by its quantiles; 1 is the noise."""
    if config.timesteps == "logit-normal":  # Esser et al. 2024, arXiv 2403.03206 sec. 3.1
        u = torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9)))
    elif config.timesteps == "cubic":  # Mou et al. 2023, arXiv 2302.08453 sec. 3.4: t = (1 - u^3) T
        u = 1.0 - u**3
    return config.shift * u / (1.0 + (config.shift - 1.0) * u)
