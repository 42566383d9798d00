"""Teaching the Toybox text model to tell what captions say, before the U-Net starts.

So the U-Net meets separable conditions from its first step. Then the text model stays as it is.
"""

import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as nf
from transformers import CLIPTextModel, CLIPTokenizer

from vgm_peft.toybox.nets import place, read_text
from vgm_peft.toybox.state import Clock, say
from vgm_peft.toybox.text import TextSettings, tokenize


class AttributeReader(nn.Module):
    """Reads attributes from text features: one attention query per attribute over the tokens, and the end state."""

    def __init__(self, width: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(sizes), width) * 0.1)
        self.from_tokens = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        self.from_end = nn.ModuleList(nn.Linear(width, size) for size in sizes)

    def forward(self, features: Tensor, end: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Two guesses per attribute, from the tokens (B, T, D) and from the end state (B, D)."""
        weights = (features @ self.queries.T / math.sqrt(features.shape[-1])).softmax(1)
        pooled = torch.einsum("btq,btd->qbd", weights, features)
        heads = zip(self.from_tokens, self.from_end, strict=True)
        return [(token(pooled[i]), last(end)) for i, (token, last) in enumerate(heads)]


def reading_loss(guesses: Sequence[tuple[Tensor, Tensor]], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of all guesses against labels (B, attributes), and the share the token heads got right, each."""
    columns = list(labels.unbind(1))
    parts = [nf.cross_entropy(guess, column) for pair, column in zip(guesses, columns, strict=True) for guess in pair]
    right = [(pair[0].argmax(1) == column).float().mean() for pair, column in zip(guesses, columns, strict=True)]
    return torch.stack(parts).sum(), torch.stack(right)


def train_text(
    tokenizer: CLIPTokenizer,
    model: CLIPTextModel,
    draw: Callable[[random.Random], tuple[str, tuple[int, ...]]],
    sizes: Sequence[int],
    settings: TextSettings,
    budget: float,
    *,
    seed: int = 0,
) -> list[float]:
    """Train the model for `budget` seconds to tell the labels of captions; returns the share right of each label.

    Args:
        tokenizer: makes the model's tokens.
        model: trained in place.
        draw: gives a caption and its labels.
        sizes: how many values each label has.
        settings: batch, rate, noise.
        budget: seconds.
        seed: of captions and noise.
    """
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    rng, clock, step = random.Random(seed), Clock(budget), 0
    reader = place(AttributeReader(settings.width, sizes), str(device))
    weights = [*model.parameters(), *reader.parameters()]
    optimiser = torch.optim.AdamW(weights, settings.rate, betas=(0.9, 0.99), weight_decay=0.01)
    correct = torch.zeros(len(sizes), device=device)
    while (progress := clock.progress()) < 1:
        for group in optimiser.param_groups:
            group["lr"] = settings.rate * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * progress))
        drawn = [draw(rng) for _ in range(settings.batch)]
        labels = torch.tensor([labels for _, labels in drawn]).to(device)
        features, end = read_text(model, tokenize(tokenizer, [caption for caption, _ in drawn]).to(device))
        features = features + settings.noise * torch.randn_like(features)
        end = end + settings.noise * torch.randn_like(end)
        value, right = reading_loss(reader(features, end), labels)
        correct.lerp_(right, max(0.05, 1 / (step + 1)))
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        step += 1
        if step % 50 == 0:
            told = " ".join(f"{share:.3f}" for share in correct.tolist())
            say(f"text step {step} {clock.elapsed():.0f} s loss {value.item():.3f} right {told}")
    return correct.tolist()
