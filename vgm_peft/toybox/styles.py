"""The four held-out styles as post-processes of a render, and the edges they draw with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from vgm_peft.errors import ConfigError, nearest


def edges(depth: Tensor, normal: Tensor, mask: Tensor) -> Tensor:
    """Outlines and creases (B, P, Q) bool: where instance, depth or normal jumps between neighbours."""
    found = torch.zeros_like(mask, dtype=torch.bool)
    for axis in (1, 2):
        n = depth.shape[axis]
        a, b = (slice(0, n - 1), slice(1, n))
        first = (slice(None), a) if axis == 1 else (slice(None), slice(None), a)
        second = (slice(None), b) if axis == 1 else (slice(None), slice(None), b)
        toy = (mask[first] > 0) | (mask[second] > 0)
        jump = (depth[first] - depth[second]).abs() > 0.12
        crease = (normal[first] * normal[second]).sum(-1) < 0.6
        change = (mask[first] != mask[second]) | (toy & (jump | crease))
        found[first] |= change
    return found


def _luma(image: Tensor) -> Tensor:
    r, g, b = image.unbind(-1)
    return 0.3 * r + 0.59 * g + 0.11 * b


def _toon(image: Tensor, edge: Tensor, toy: Tensor) -> Tensor:
    """Few flat shades, vivid, with black outlines."""
    value = image.amax(-1, keepdim=True).clamp_min(1e-3)
    flat = ((value * 3.2).round() / 3.2).clamp(0.12, 1)
    vivid = (image / value) ** 1.35 * flat
    return torch.where(edge[..., None], 0.04, vivid)


def _sketch(image: Tensor, edge: Tensor, toy: Tensor) -> Tensor:
    """Pencil on paper: dark outlines, hatching where it is dark."""
    p, q = edge.shape
    luma = _luma(image)
    rows, columns = torch.arange(p)[:, None], torch.arange(q)[None]
    tone = torch.full((p, q), 0.95)
    hatch = (rows + columns) % 4 == 0
    cross = (rows - columns) % 4 == 0
    tone = torch.where(hatch & (luma < 0.62), 0.62, tone)
    tone = torch.where(cross & (luma < 0.36), 0.5, tone)
    tone = torch.where(toy & (tone > 0.9), 0.99, tone)
    tone = torch.where(edge, 0.16, tone)
    return torch.stack((tone, tone * 0.985, tone * 0.95), -1)


def _blueprint(image: Tensor, edge: Tensor, toy: Tensor) -> Tensor:
    """White lines on blue squared paper."""
    p, q = edge.shape
    grid = (torch.arange(p)[:, None] % 8 == 3) | (torch.arange(q)[None] % 8 == 3)
    base = 0.1 + 0.1 * grid + 0.16 * toy * _luma(image)
    base = torch.where(edge, 0.92, base)
    return torch.stack((base * 0.75, base * 0.9 + 0.08, (base + 0.36).clamp(0, 1)), -1)


def _pixel(image: Tensor, edge: Tensor, toy: Tensor) -> Tensor:
    """Big square pixels of few colours, the toy with a dark rim like a game's sprite."""
    p, q = edge.shape
    cell = max(p // 32, 1)
    small = F.avg_pool2d(image.permute(2, 0, 1)[None], cell)
    cover = F.avg_pool2d(toy[None, None].float(), cell) > 0.5
    rim = cover & (F.max_pool2d(1.0 - cover.float(), 3, 1, 1) > 0.5)
    small = torch.where(rim, 0.1, ((small * 1.08 - 0.04) * 3).round() / 3)
    return F.interpolate(small, size=(p, q), mode="nearest")[0].permute(1, 2, 0)


_TABLE: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "toon": _toon,
    "sketch": _sketch,
    "blueprint": _blueprint,
    "pixel": _pixel,
}


def apply(style: str, image: Tensor, depth: Tensor, normal: Tensor, mask: Tensor) -> Tensor:
    """One picture (P, Q, 3) uint8 in `style`."""
    if style not in _TABLE:
        raise ConfigError(f'unknown Toybox style "{style}"', expected=", ".join(_TABLE), fix=nearest(style, tuple(_TABLE)))
    edge = edges(depth[None], normal[None], mask[None])[0]
    drawn = _TABLE[style](image.float() / 255, edge, mask > 0)
    return (drawn.clamp(0, 1) * 255 + 0.5).to(torch.uint8)
