"""What makes an IP-Adapter's tokens of what an image encoder saw: a projection, or a Perceiver resampler.

Module names are those of the authors' files (tencent-ailab/IP-Adapter), so a state dict is a file's content as it is.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

TOKENS = 4
"""Of the projection; readers of its files take them for granted."""
QUERIES, DEPTH, HEAD, WIDEST = 16, 4, 64, 1280
"""Of the resampler: tokens, blocks, channels of a head, and how wide it is at most."""


class ImageProjection(nn.Module):
    """Four tokens of one embedding: Linear, then LayerNorm."""

    def __init__(self, embeds: int, context: int) -> None:
        """From an embedding of so many values to tokens as wide as those of the text."""
        super().__init__()
        self.context = context
        self.proj = nn.Linear(embeds, TOKENS * context)
        self.norm = nn.LayerNorm(context)

    def forward(self, embeds: Tensor) -> Tensor:
        """Return (B, 4, D) of (B, E)."""
        return self.norm(self.proj(embeds.to(self.proj.weight.dtype)).unflatten(-1, (TOKENS, -1)))


class Resampler(nn.Module):
    """Learned queries that read all hidden states of an encoder, four blocks deep (the Perceiver of IP-Adapter Plus)."""

    def __init__(self, states: int, context: int, queries: int = QUERIES, width: int = 0, heads: int = 0) -> None:
        """From hidden states to tokens as wide as those of the text; `width` and `heads` are the authors' when left out."""
        super().__init__()
        width = width or min(context, WIDEST)
        heads = heads or -(-width // HEAD)
        self.context = context
        self.latents = nn.Parameter(torch.randn(1, queries, width) / width**0.5)
        self.proj_in = nn.Linear(states, width)
        self.proj_out = nn.Linear(width, context)
        self.norm_out = nn.LayerNorm(context)
        self.layers = nn.ModuleList(nn.ModuleList((_Reading(width, heads), _mlp(width))) for _ in range(DEPTH))

    def forward(self, states: Tensor) -> Tensor:
        """Return (B, queries, D) of (B, T, W)."""
        read = self.proj_in(states.to(self.proj_in.weight.dtype))
        tokens = self.latents.expand(len(read), -1, -1)
        for reading, mlp in self.layers:  # pyright: ignore[reportGeneralTypeIssues]
            tokens = reading(read, tokens) + tokens
            tokens = mlp(tokens) + tokens
        return self.norm_out(self.proj_out(tokens))


class _Reading(nn.Module):
    """Attention of the queries to what is read and to one another."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * HEAD, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * HEAD, bias=False)
        self.to_out = nn.Linear(heads * HEAD, width, bias=False)

    def forward(self, read: Tensor, tokens: Tensor) -> Tensor:
        tokens = self.norm2(tokens)
        keys, values = self.to_kv(torch.cat([self.norm1(read), tokens], dim=1)).chunk(2, dim=-1)
        return self.to_out(attend(self.to_q(tokens), keys, values, HEAD))


def _mlp(width: int) -> nn.Sequential:
    wide = 4 * width
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, wide, bias=False), nn.GELU(), nn.Linear(wide, width, bias=False))


def attend(query: Tensor, keys: Tensor, values: Tensor, head: int, scale: float | None = None) -> Tensor:
    """Attention in heads of so many channels: query (B, L, D), keys and values (B, T, D), to (B, L, D)."""
    q, k, v = (rows.unflatten(-1, (-1, head)).transpose(1, 2) for rows in (query, keys, values))
    return scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
