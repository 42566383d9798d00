"""The Toybox VAE: a diffusers `AutoencoderKL`, 64x64 pixels to 16x16x4, trained to draw any colour.

Latents are made unit normal per channel by folding their mean and deviation into the two 1x1 convolutions around
them, so the pipeline's scaling factor is 1. Once the encoder is settled it can be frozen and only the decoder trained
on: latents made before stay valid.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as nf

from vgm_peft.toybox.nets import decode, encode, make_vae, one_by_one
from vgm_peft.toybox.optim import MuonAdam, muon_for
from vgm_peft.toybox.pixels import crop, jitter_colours, psnr, random_shapes, to_float
from vgm_peft.toybox.state import (
    Clock,
    load_state,
    module_tensors,
    optimiser_tensors,
    restore_module,
    restore_optimiser,
    save_state,
    say,
)


@dataclass(frozen=True, kw_only=True)
class VaeSettings:
    """How the VAE is built and trained; sizes in pixels."""

    widths: tuple[int, ...] = (16, 32, 64)
    layers: int = 1
    """Blocks a level; the decoder has one more."""
    batch: int = 16
    crop: int = 32
    whole_from: float = 0.8
    """Share of the budget after which whole pictures replace crops."""
    matrix_rate: float = 0.02
    """Of Muon, for the convolutions; `rate` is Adam's, for the rest."""
    rate: float = 2e-3
    kl: float = 3e-4
    coarse: float = 0.25
    """Share of the steps that also decode the halved latent to the halved picture, which keeps latents smooth."""
    shapes: float = 0.3
    """Share of each batch that is random shapes, not renders."""
    save_every: float = 60.0

    def sharpening(self) -> "VaeSettings":
        """These settings for a VAE that is already good: next to no pull to the normal, no halved latents, gentler."""
        return replace(self, kl=self.kl / 10, coarse=0.0, matrix_rate=self.matrix_rate / 2, rate=self.rate / 2)


def reconstruction_loss(drawn: Tensor, wanted: Tensor) -> Tensor:
    """L1 + 2 MSE + half the L1 of the two picture gradients + the L1 of the colours of 8x8 patches."""
    error = drawn - wanted
    broad = nf.avg_pool2d(error, 8).abs().mean()
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * (across + down) + broad


def loss(vae: AutoencoderKL, pictures: Tensor, settings: VaeSettings, coarse: bool) -> Tensor:
    """The training loss of the whole VAE on pictures (B, 3, P, Q)."""
    posterior = encode(vae, pictures)
    latent = posterior.sample()
    total = reconstruction_loss(decode(vae, latent), pictures)
    kl = 0.5 * (posterior.mean.square() + posterior.logvar.exp() - 1 - posterior.logvar).mean()
    if coarse:
        small = decode(vae, nf.avg_pool2d(latent, 2))
        total = total + 0.5 * reconstruction_loss(small, nf.avg_pool2d(pictures, 2))
    return total + settings.kl * kl


def batch_of(renders: Tensor, settings: VaeSettings, size: int, generator: torch.Generator, count: int) -> Tensor:
    """A training batch: recoloured render cut-outs and random shapes."""
    drawn = round(settings.shapes * count)
    chosen = torch.randint(len(renders), (count - drawn,), generator=generator)
    cuts = to_float(crop(renders[chosen], size, generator))
    return torch.cat([jitter_colours(cuts, generator), random_shapes(drawn, size, generator)])


def decoder_loss(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """The training loss of the decoder alone, on latents of the frozen encoder."""
    with torch.no_grad():
        latent = encode(vae, pictures).sample()
    return reconstruction_loss(decode(vae, latent), pictures)


@dataclass
class VaeRun:
    """A VAE in training: the model, its optimiser, clock, chance, and where its state is kept."""

    vae: AutoencoderKL
    settings: VaeSettings
    optimiser: MuonAdam
    clock: Clock
    generator: torch.Generator
    state: Path
    step: int = 0

    @classmethod
    def start(cls, vae: AutoencoderKL, settings: VaeSettings, state: Path, budget: float, decoder_only: bool) -> "VaeRun":
        """Begin, or go on from `state` where that file exists."""
        first, _ = one_by_one(vae)
        vae.encoder.requires_grad_(not decoder_only)
        first.requires_grad_(not decoder_only)
        optimiser = muon_for(vae, settings.matrix_rate, settings.rate, ("conv_in", "conv_out", "quant_conv"))
        run = cls(vae, settings, optimiser, Clock(budget), torch.Generator(), state)
        if state.exists():
            tensors, facts = load_state(state)
            restore_module("vae", vae, tensors)
            restore_optimiser(optimiser, tensors)
            run.generator.set_state(tensors["chance"])
            torch.set_rng_state(tensors["noise"])
            run.clock.spent, run.step = float(facts["seconds"]), int(facts["step"])
        return run

    def save(self) -> None:
        """Write everything needed to go on."""
        chance = {"chance": self.generator.get_state(), "noise": torch.get_rng_state()}
        tensors = {**module_tensors("vae", self.vae), **optimiser_tensors(self.optimiser), **chance}
        save_state(self.state, tensors, {"seconds": self.clock.elapsed(), "step": self.step})

    def advance(self, pictures: Tensor, decoder_only: bool, progress: float) -> Tensor:
        """Make one optimiser step; returns the loss."""
        whole = progress > self.settings.whole_from
        size, count = (64, max(4, self.settings.batch // 2)) if whole else (self.settings.crop, self.settings.batch)
        device = next(self.vae.parameters()).device
        batch = batch_of(pictures, self.settings, size, self.generator, count)
        batch = batch.to(device, memory_format=torch.channels_last)
        share = self.settings.coarse
        coarse = share > 0 and self.step % round(1 / share) == 0
        value = decoder_loss(self.vae, batch) if decoder_only else loss(self.vae, batch, self.settings, coarse)
        self.optimiser.factor = min(1, (self.step + 1) / 100) * (0.51 + 0.49 * math.cos(math.pi * progress))
        self.optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        return value.detach()


def deepened(vae: AutoencoderKL, widths: tuple[int, ...], layers: int) -> AutoencoderKL:
    """A VAE of `layers` blocks a level that draws what `vae` (of fewer) draws: the added blocks begin as the identity."""
    deeper = make_vae(widths, layers)
    known = vae.state_dict()
    for name, block in deeper.named_modules():
        if name.split(".")[-1] == "conv2" and f"{name}.weight" not in known:
            nn.init.zeros_(cast(nn.Conv2d, block).weight)
            nn.init.zeros_(cast(Tensor, block.bias))
    deeper.load_state_dict({**deeper.state_dict(), **known})
    return deeper


def train_vae(
    vae: AutoencoderKL,
    pictures: Tensor,
    settings: VaeSettings,
    state: Path,
    budget: float,
    *,
    decoder_only: bool = False,
) -> int:
    """Train on renders (N, P, Q, 3) for `budget` seconds in all, going on from `state`; returns the number of steps."""
    run = VaeRun.start(vae, settings, state, budget, decoder_only)
    saved, losses = run.clock.elapsed(), list[Tensor]()
    while (progress := run.clock.progress()) < 1:
        losses.append(run.advance(pictures, decoder_only, progress))
        if run.step % 200 == 0:
            mean = torch.stack(losses).mean().item()
            losses.clear()
            say(f"vae step {run.step} {run.clock.elapsed():.0f} s loss {mean:.4f} rates x{run.optimiser.factor:.3f}")
        if run.clock.elapsed() - saved > settings.save_every:
            saved = run.clock.elapsed()
            run.save()
    run.save()
    return run.step


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Make the latents of these pictures (B, 3, P, Q) zero mean and unit deviation per channel, the drawing unchanged.

    Returns:
        the mean and the deviation that were folded in, each (C,).
    """
    means = torch.cat([encode(vae, part).mean for part in pictures.split(64)])
    centre, spread = means.mean((0, 2, 3)), means.std((0, 2, 3))
    before, after = one_by_one(vae)
    shrink = torch.cat([1 / spread, torch.ones_like(spread)])
    move = torch.cat([-centre / spread, -2 * spread.log()])
    first = cast(Tensor, before.bias)
    first.copy_(first * shrink + move)
    before.weight.mul_(shrink[:, None, None, None])
    second = cast(Tensor, after.bias)
    second.add_(after.weight[:, :, 0, 0] @ centre)
    after.weight.mul_(spread[None, :, None, None])
    return centre, spread


@torch.no_grad()
def measure(vae: AutoencoderKL, renders: Tensor, seed: int = 12345) -> tuple[float, float]:
    """PSNR in dB on uint8 renders (B, P, Q, 3), as they are and with every colour jittered."""
    generator = torch.Generator().manual_seed(seed)
    device = next(vae.parameters()).device
    plain = to_float(renders)
    results: list[float] = []
    for pictures in (plain, jitter_colours(plain, generator, share=1.0)):
        drawn = [decode(vae, encode(vae, p.to(device)).mean).cpu() for p in pictures.split(64)]
        results.append(psnr(torch.cat(drawn).clamp(-1, 1), pictures))
    return results[0], results[1]
