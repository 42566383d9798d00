"""Pictures the Toybox VAE learns from: crops of renders in any colours, and random patterned shapes.

The world has eight named colours. A user's subject has any colour and any pattern, and no delta can mend a picture that
the VAE cannot decode, so the VAE sees renders with permuted, mixed and bent colours and shapes that no renderer drew.
Pictures are float tensors of shape (B, 3, P, Q) in -1..1.
"""

import torch
from torch import Tensor
from torch.nn import functional as nf


def to_float(pictures: Tensor) -> Tensor:
    """Turn uint8 pictures (B, P, Q, 3) into float pictures (B, 3, P, Q) in -1..1."""
    return pictures.permute(0, 3, 1, 2).float().div(127.5).sub(1.0).contiguous()


def to_bytes(pictures: Tensor) -> Tensor:
    """Turn float pictures (B, 3, P, Q) in -1..1 into uint8 pictures (B, P, Q, 3)."""
    return pictures.clamp(-1, 1).add(1.0).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def crop(pictures: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Cut one random square of `size` pixels out of each picture (B, P, Q, 3)."""
    high, wide = pictures.shape[1] - size + 1, pictures.shape[2] - size + 1
    tops = torch.randint(high, (len(pictures),), generator=generator).tolist()
    lefts = torch.randint(wide, (len(pictures),), generator=generator).tolist()
    cuts = [p[t : t + size, x : x + size] for p, t, x in zip(pictures, tops, lefts, strict=True)]
    return torch.stack(cuts)


def jitter_colours(pictures: Tensor, generator: torch.Generator, share: float = 0.65) -> Tensor:
    """Recolour a `share` of the pictures: permute and mix channels, bend gamma, shift brightness; clamp to -1..1."""
    count, device = len(pictures), pictures.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator).to(device)

    order = uniform(3).argsort(1)
    mixing = torch.eye(3, device=device)[order] + 0.5 * (uniform(3, 3) - 0.5)
    mixing = mixing / mixing.sum(2, keepdim=True).clamp_min(0.4)
    unit = (pictures + 1) / 2
    flip = (uniform(3, 1, 1) < 0.15).float()
    unit = flip * (1 - unit) + (1 - flip) * unit
    mixed = torch.einsum("bij,bjpq->bipq", mixing, unit).clamp(0, 1)
    bent = mixed.clamp_min(1e-4) ** torch.exp(0.8 * (uniform(3, 1, 1) - 0.5))
    moved = bent * (0.7 + 0.5 * uniform(1, 1, 1)) + 0.2 * (uniform(1, 1, 1) - 0.5)
    chosen = (uniform(1, 1, 1) < share).float()
    return (chosen * moved.clamp(0, 1) + (1 - chosen) * unit) * 2 - 1


def random_shapes(count: int, size: int, generator: torch.Generator, shapes: int = 6) -> Tensor:
    """Draw `count` pictures of soft-edged, shaded, striped or checkered ellipses, boxes, rings and half-planes."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    blend = (0.5 + 0.5 * (x * (uniform(1, 1) - 0.5) + y * (uniform(1, 1) - 0.5)))[:, None]
    picture = uniform(3, 1, 1) * blend + uniform(3, 1, 1) * (1 - blend)
    for _ in range(shapes):
        angle = 6.2832 * uniform(1, 1)
        dx, dy = x - (2.4 * uniform(1, 1) - 1.2), y - (2.4 * uniform(1, 1) - 1.2)
        u = (dx * angle.cos() + dy * angle.sin()) / (0.12 + 0.7 * uniform(1, 1))
        v = (dy * angle.cos() - dx * angle.sin()) / (0.12 + 0.7 * uniform(1, 1))
        kind = torch.randint(4, (count, 1, 1), generator=generator)
        round_, box = (u * u + v * v).sqrt() - 1, torch.maximum(u.abs(), v.abs()) - 1
        field = torch.where(kind == 0, round_, torch.where(kind == 1, box, torch.where(kind == 2, u, round_.abs() - 0.2)))
        soft = torch.where(uniform(1, 1) < 0.75, torch.tensor(0.05), torch.tensor(0.5)) * 32 / size
        mask = (torch.sigmoid(-field / soft * 2) * (0.4 + 0.6 * (uniform(1, 1) < 0.75).float()))[:, None]
        pitch = 2 + 10 * uniform(1, 1)
        waves = torch.sigmoid(8 * torch.sin(u * pitch))
        checks = torch.sigmoid(8 * torch.sin(u * pitch) * torch.sin(v * pitch))
        pattern = torch.where(kind % 2 == 0, waves, checks) * (uniform(1, 1) < 0.4).float()
        shade = (0.75 + 0.25 * (0.7 * u - 0.7 * v).clamp(-1, 1))[:, None]
        colour = uniform(3, 1, 1) * (1 - pattern[:, None]) + uniform(3, 1, 1) * pattern[:, None]
        picture = picture * (1 - mask) + colour * shade * mask
    return picture.clamp(0, 1) * 2 - 1


def psnr(first: Tensor, second: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of pictures in -1..1, averaged over the pictures."""
    error = nf.mse_loss((first + 1) / 2, (second + 1) / 2, reduction="none").mean((1, 2, 3))
    return float((-10 * error.clamp_min(1e-10).log10()).mean())
