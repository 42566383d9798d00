"""The Toybox U-Net: SD1.5's blocks at small widths, trained on latents with v-prediction and a zero terminal SNR.

Everything the sampler starts from must be decided from the text alone at the last step, so noisy steps are drawn more
often than clean ones, and the latents of the toys weigh more than those of the background.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as nf
from transformers import CLIPTextModel

from vgm_peft.toybox.nets import make_unet, place, predict, read_text
from vgm_peft.toybox.optim import MuonAdam, muon_for
from vgm_peft.toybox.state import (
    Clock,
    load_state,
    module_tensors,
    optimiser_tensors,
    restore_module,
    restore_optimiser,
    save_state,
)


@dataclass(frozen=True, kw_only=True)
class UnetSettings:
    """How the U-Net is built and trained."""

    widths: tuple[int, ...] = (32, 64, 128, 128)
    heads: tuple[int, ...] = (2, 2, 4, 4)
    text_width: int = 128
    batch: int = 32
    coarse_batch: int = 64
    matrix_rate: float = 0.014
    """Of Muon, for matrices and convolutions; `rate` is Adam's, for the rest."""
    rate: float = 2e-3
    warm_steps: int = 100
    decay: float = 0.98
    """Of the running mean of the weights that is sampled from; Muon moves weights too far for a long one."""
    dropout: float = 0.1
    """Share of captions replaced by the empty one, for guidance."""
    toy_weight: float = 3.0
    """A latent wholly on a toy weighs 1 + this much."""
    noisy: float = 0.8
    """Timesteps are T * u ** noisy with u uniform: below 1 favours noisy ones."""
    snr_cap: float = 6.0
    coarse_until: float = 0.15
    """Share of the budget spent on latents halved in size, which cost a quarter."""
    save_seconds: float = 240.0
    favour: Mapping[str, float] = field(default_factory=dict[str, float])
    """How many times as often as the others pictures with a toy of these classes are drawn."""


@dataclass(frozen=True)
class Latents:
    """What the U-Net learns from: posterior `mean` and `deviation` (N, 4, H, W) in half precision, the share of each
    latent that is toy (N, H, W) in 0..255, the tokens (N, captions, T) of several captions a picture, and how often to
    `draw` each (N,), relative to the others."""

    mean: Tensor
    deviation: Tensor
    toy: Tensor
    tokens: Tensor
    draw: Tensor


@dataclass(frozen=True)
class Batch:
    """One step's input; `latent` (B, 4, H, W), `weight` (B, 1, H, W), `text` (B, T, D), `step` (B,)."""

    latent: Tensor
    weight: Tensor
    text: Tensor
    step: Tensor


def new_unet(settings: UnetSettings) -> UNet2DConditionModel:
    """Build the untrained U-Net of these settings."""
    return make_unet(settings.widths, settings.heads, settings.text_width)


def draw_batch(
    data: Latents, text: CLIPTextModel, empty: Tensor, settings: UnetSettings, generator: torch.Generator, coarse: bool
) -> Batch:
    """Draw pictures, one caption each (sometimes the empty one), and stratified timesteps."""
    device = next(text.parameters()).device
    count = settings.coarse_batch if coarse else settings.batch
    rows = torch.multinomial(data.draw, count, replacement=True, generator=generator)
    mean, spread = data.mean[rows].float(), data.deviation[rows].float()
    latent = mean + spread * torch.randn(mean.shape, generator=generator)
    weight = 1 + settings.toy_weight * data.toy[rows].float()[:, None] / 255
    if coarse:
        latent, weight = nf.avg_pool2d(latent, 2), nf.avg_pool2d(weight, 2)
    which = torch.randint(data.tokens.shape[1], (count,), generator=generator)
    tokens = data.tokens[rows, which].long()
    dropped = torch.rand(count, generator=generator) < settings.dropout
    tokens = torch.where(dropped[:, None], empty, tokens)
    uniform = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    step = (1000 * uniform**settings.noisy).long().clamp(0, 999)
    with torch.no_grad():
        features, _ = read_text(text, tokens.to(device))
    return Batch(latent.to(device), weight.to(device), features, step.to(device))


def loss(unet: UNet2DConditionModel, batch: Batch, noise: Tensor, alphas: Tensor, cap: float) -> Tensor:
    """Weighted v-prediction error: v = sqrt(a) noise - sqrt(1 - a) latent, weight min(snr + 1, cap) / (snr + 1)."""
    alpha = alphas[batch.step].reshape(-1, 1, 1, 1)
    noisy = alpha.sqrt() * batch.latent + (1 - alpha).sqrt() * noise
    wanted = alpha.sqrt() * noise - (1 - alpha).sqrt() * batch.latent
    guess = predict(unet, noisy, batch.step, batch.text).float()
    snr_plus_one = 1 / (1 - alpha).clamp_min(1e-6)
    balance = snr_plus_one.clamp_max(cap) / snr_plus_one
    return (balance * batch.weight * (guess - wanted).square()).mean() / batch.weight.mean()


class Averaged:
    """Running mean of a model's weights, short at first so that early snapshots are of use."""

    def __init__(self, model: UNet2DConditionModel, settings: UnetSettings) -> None:
        self.model = place(new_unet(settings), str(next(model.parameters()).device)).requires_grad_(False).eval()
        self.model.load_state_dict(model.state_dict())
        self._decay = settings.decay

    @torch.no_grad()
    def follow(self, model: UNet2DConditionModel, step: int) -> None:
        """Move towards the model's weights after its step number `step`."""
        share = 1 - min(self._decay, (1 + step) / (20 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), share)  # pyright: ignore


@dataclass
class UnetRun:
    """A U-Net in training: the model, its running mean, optimiser, clock and chance."""

    settings: UnetSettings
    unet: UNet2DConditionModel
    averaged: Averaged
    optimiser: MuonAdam
    clock: Clock
    generator: torch.Generator
    step: int = 0
    pictures: int = 0

    @classmethod
    def start(cls, settings: UnetSettings, budget: float, device: str, state: Path, seed: int = 0) -> "UnetRun":
        """Begin, or go on exactly from `state` where that file exists."""
        torch.manual_seed(seed)
        unet = place(new_unet(settings), device)
        optimiser = muon_for(unet, settings.matrix_rate, settings.rate, ("conv_in", "conv_out"))
        run = cls(settings, unet, Averaged(unet, settings), optimiser, Clock(budget), torch.Generator())
        run.generator.manual_seed(seed)
        if state.exists():
            tensors, facts = load_state(state)
            restore_module("unet", unet, tensors)
            restore_module("averaged", run.averaged.model, tensors)
            restore_optimiser(optimiser, tensors)
            run.generator.set_state(tensors["chance"])
            run.clock.spent = float(facts["seconds"])
            run.step, run.pictures = int(facts["step"]), int(facts["pictures"])
        return run

    def save(self, state: Path) -> None:
        """Write everything needed to go on."""
        tensors = {
            **module_tensors("unet", self.unet),
            **module_tensors("averaged", self.averaged.model),
            **optimiser_tensors(self.optimiser),
            "chance": self.generator.get_state(),
        }
        save_state(state, tensors, {"seconds": self.clock.elapsed(), "step": self.step, "pictures": self.pictures})

    def factor(self, progress: float) -> float:
        """Of the learning rates: a short warm-up by steps, then a half cosine by wall clock."""
        warm = min(1.0, (self.step + 1) / self.settings.warm_steps)
        return warm * 0.5 * (1 + math.cos(math.pi * progress))

    def advance(self, data: Latents, text: CLIPTextModel, empty: Tensor, alphas: Tensor, progress: float) -> Tensor:
        """Make one optimiser step; returns the loss."""
        coarse = progress < self.settings.coarse_until
        batch = draw_batch(data, text, empty, self.settings, self.generator, coarse)
        self.optimiser.factor = self.factor(progress)
        noise = torch.randn(batch.latent.shape, generator=self.generator).to(batch.latent.device)
        fast = batch.latent.device.type == "cuda"
        with torch.autocast(batch.latent.device.type, torch.bfloat16, enabled=fast):
            value = loss(self.unet, batch, noise, alphas, self.settings.snr_cap)
        self.optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimiser.step()
        self.step, self.pictures = self.step + 1, self.pictures + len(batch.latent)
        self.averaged.follow(self.unet, self.step)
        return value.detach()
