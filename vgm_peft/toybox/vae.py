"""The Toybox VAE: a diffusers `AutoencoderKL`, 64x64 pixels to 16x16x4, trained to draw any colour.

Latents are made unit normal per channel by folding their mean and deviation into the two 1x1 convolutions around
them, so the pipeline's scaling factor is 1. Once the encoder is settled it can be frozen and only the decoder trained
on: latents made before stay valid.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as nf

from vgm_peft.toybox.optim import muon_for
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


def make_vae(widths: tuple[int, ...] = (16, 32, 64)) -> AutoencoderKL:
    """Build the untrained VAE."""
    levels = len(widths)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
    )


def reconstruction_loss(drawn: Tensor, wanted: Tensor) -> Tensor:
    """L1 + 2 MSE + half the L1 of the two picture gradients + the L1 of the colours of 8x8 patches."""
    error = drawn - wanted
    broad = nf.avg_pool2d(error, 8).abs().mean()
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * (across + down) + broad


def loss(vae: AutoencoderKL, pictures: Tensor, settings: VaeSettings, coarse: bool) -> Tensor:
    """The training loss of the whole VAE on pictures (B, 3, P, Q)."""
    moments = vae.encode(pictures).latent_dist
    mean, logvar = moments.mean, moments.logvar
    latent = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
    total = reconstruction_loss(vae.decode(latent).sample, pictures)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    if coarse:
        small = vae.decode(nf.avg_pool2d(latent, 2)).sample
        total = total + 0.5 * reconstruction_loss(small, nf.avg_pool2d(pictures, 2))
    return total + settings.kl * kl


def batch_of(renders: Tensor | None, settings: VaeSettings, size: int, generator: torch.Generator, count: int) -> Tensor:
    """A training batch: recoloured render cut-outs and random shapes; only shapes while there are no renders."""
    drawn = count if renders is None else round(settings.shapes * count)
    shapes = random_shapes(drawn, size, generator)
    if renders is None:
        return shapes
    chosen = torch.randint(len(renders), (count - drawn,), generator=generator)
    cuts = to_float(crop(renders[chosen], size, generator))
    return torch.cat([jitter_colours(cuts, generator), shapes])


def train_vae(
    vae: AutoencoderKL,
    renders: Callable[[], Tensor | None],
    settings: VaeSettings,
    state: Path,
    budget: float,
    *,
    decoder_only: bool = False,
    seed: int = 0,
) -> None:
    """Train for `budget` seconds in all, going on from `state` where it exists; `renders` is asked before each save."""
    device = next(vae.parameters()).device
    vae.encoder.requires_grad_(not decoder_only)
    vae.quant_conv.requires_grad_(not decoder_only)
    weights = [p for p in vae.parameters() if p.requires_grad]
    optimiser = muon_for(vae, settings.matrix_rate, settings.rate, ("conv_in", "conv_out", "quant_conv"))
    clock, step = Clock(budget), 0
    if state.exists():
        tensors, facts = load_state(state)
        restore_module("vae", vae, tensors)
        restore_optimiser(optimiser, tensors)
        clock.spent, step = float(facts["seconds"]), int(facts["step"])
    generator = torch.Generator().manual_seed(seed + step)
    torch.manual_seed(seed + step)
    pictures, saved, running = renders(), clock.elapsed(), 0.0
    while (progress := clock.progress()) < 1:
        whole = progress > settings.whole_from
        size, count = (64, max(4, settings.batch // 2)) if whole else (settings.crop, settings.batch)
        optimiser.factor = min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        batch = batch_of(pictures, settings, size, generator, count).to(device, memory_format=torch.channels_last)
        if decoder_only:
            with torch.no_grad():
                moments = vae.encode(batch).latent_dist
                latent = moments.mean + moments.std * torch.randn_like(moments.mean)
            value = reconstruction_loss(vae.decode(latent).sample, batch)
        else:
            value = loss(vae, batch, settings, step % round(1 / settings.coarse) == 0)
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        running, step = running + value.item(), step + 1
        if step % 200 == 0:
            say(f"vae step {step} {clock.elapsed():.0f} s loss {running / 200:.4f} rate x{optimiser.factor:.3f} size {size}")
            running = 0.0
        if clock.elapsed() - saved > settings.save_every:
            saved = clock.elapsed()
            facts = {"seconds": saved, "step": step}
            save_state(state, {**module_tensors("vae", vae), **optimiser_tensors(optimiser)}, facts)
            pictures = renders()
    save_state(
        state,
        {**module_tensors("vae", vae), **optimiser_tensors(optimiser)},
        {"seconds": clock.elapsed(), "step": step},
    )


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Make the latents of these pictures (B, 3, P, Q) zero mean and unit deviation per channel, the drawing unchanged.

    Returns:
        the mean and the deviation that were folded in, each (C,).
    """
    means = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(64)])
    centre, spread = means.mean((0, 2, 3)), means.std((0, 2, 3))
    count = len(centre)
    before, after = vae.quant_conv, vae.post_quant_conv
    before.bias[:count] -= centre
    before.bias[:count] /= spread
    before.weight[:count] /= spread[:, None, None, None]
    before.bias[count:] -= 2 * spread.log()
    after.bias += (after.weight[:, :, 0, 0] * centre).sum(1)
    after.weight *= spread[None, :, None, None]
    return centre, spread


@torch.no_grad()
def measure(vae: AutoencoderKL, renders: Tensor, seed: int = 12345) -> tuple[float, float]:
    """PSNR in dB on uint8 renders (B, P, Q, 3), as they are and with every colour jittered."""
    generator = torch.Generator().manual_seed(seed)
    device = next(vae.parameters()).device
    plain = to_float(renders)
    results: list[float] = []
    for pictures in (plain, jitter_colours(plain, generator, share=1.0)):
        drawn = [vae.decode(vae.encode(p.to(device)).latent_dist.mean).sample.cpu() for p in pictures.split(64)]
        results.append(psnr(torch.cat(drawn).clamp(-1, 1), pictures))
    return results[0], results[1]
