"""The Toybox text side: a `CLIPTokenizer` built from a word list and a small `CLIPTextModel` that knows the world.

The text model is trained to tell a caption's attributes before the U-Net starts, so the U-Net meets separable
conditions from its first step; then it stays as it is.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as nf
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from vgm_peft.toybox.state import Clock, say

TOKENS = 32
START, END = "<|startoftext|>", "<|endoftext|>"
RARE_WORDS = ("sks", "ohwx", "zwx", "xjy", "qvb", "wfk", "jtz", "vbn", "kqr", "pzh", "gwx", "nqy")
COMMON_WORDS = tuple(
    """
    a an the and or of in on at with without to from by for near under over behind beside between into onto its this that
    is are one two three it as no not very new old photo picture image drawing painting render rendering view close up
    toy toys object thing subject style small big large tiny little huge tall short round left right centre center middle
    side front back top bottom red orange yellow green blue purple pink white black grey gray brown teal cyan magenta
    violet turquoise gold golden silver beige navy olive maroon lime colour color coloured colored bright dark light pale
    matte glossy shiny striped checkered checked spotted dotted patterned plain smooth dots rings patches halves zigzag
    spiral pattern stripes checks robot duck car house mushroom rocket mug tree snowman fish studio grass sand night sky
    wood wooden floor stars beach lawn field desert table room day toon cartoon sketch pencil blueprint pixel art line
    plastic metal clay standing sitting flying floating placed shown seen scene background corner edge hat roof wheel
    door window cup ball box cat dog bear bird boat train plane flower star moon sun cloud water snow fire hill road
    street city garden forest mountain sea river bridge tower castle person man woman child
    """.split()
)
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How the text model is built and trained."""

    width: int = 128
    layers: int = 3
    heads: int = 4
    batch: int = 96
    rate: float = 2e-3
    noise: float = 0.3
    """Deviation of the noise on the features that the attribute heads read, so that classes lie well apart."""


def byte_letters() -> list[str]:
    """The 256 printable stand-ins for bytes of byte-level BPE, in GPT-2's and CLIP's order."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) for byte in kept] + [chr(256 + place) for place in range(len(moved))]


def split_word(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Apply byte-pair merges to one word: the lowest rank first, as CLIP does."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while len(pieces) > 1:
        rank, place = min((ranks.get(pair, 1 << 30), i) for i, pair in enumerate(zip(pieces, pieces[1:], strict=False)))
        if rank == 1 << 30:
            break
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    return pieces


def make_tokenizer(words: Iterable[str]) -> CLIPTokenizer:
    """Build a tokenizer in which each of `words` is one token and any other text is bytes and known beginnings."""
    ranks: dict[tuple[str, str], int] = {}
    for word in dict.fromkeys(w.lower() for w in words):
        while len(pieces := split_word(word, ranks)) > 1:
            ranks[(pieces[0], pieces[1])] = len(ranks)
    letters = byte_letters()
    entries = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in ranks), START, END]
    vocabulary = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=list(ranks),
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=TOKENS,
    )


def make_text_model(tokenizer: CLIPTokenizer, settings: TextSettings) -> CLIPTextModel:
    """Build the untrained text model for this tokenizer."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=settings.width * 4,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=TOKENS,
        projection_dim=settings.width,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.convert_tokens_to_ids(START),
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END),
    )
    return CLIPTextModel(config)


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Token numbers (B, T) of captions, cut or padded to the model's length."""
    return tokenizer(list(captions), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids


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


def train_text(
    tokenizer: CLIPTokenizer,
    model: CLIPTextModel,
    draw: Callable[[random.Random], tuple[str, tuple[int, ...]]],
    sizes: Sequence[int],
    settings: TextSettings,
    budget: float,
    *,
    seed: int = 0,
) -> dict[int, float]:
    """Train the model to tell the labels of drawn captions; returns the last accuracy of each attribute's token head.

    Args:
        tokenizer: makes the model's tokens.
        model: trained in place.
        draw: gives a caption and its labels (`IGNORED` where the caption does not say).
        sizes: how many values each label has.
        settings: batch, rate, noise.
        budget: seconds.
        seed: of captions and noise.
    """
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    rng, clock, step = random.Random(seed), Clock(budget), 0
    reader = AttributeReader(settings.width, sizes).to(device)
    weights = [*model.parameters(), *reader.parameters()]
    optimiser = torch.optim.AdamW(weights, settings.rate, betas=(0.9, 0.99), weight_decay=0.01)
    correct: dict[int, float] = {}
    while (progress := clock.progress()) < 1:
        for group in optimiser.param_groups:
            group["lr"] = settings.rate * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * progress))
        drawn = [draw(rng) for _ in range(settings.batch)]
        labels = torch.tensor([labels for _, labels in drawn]).to(device)
        output = model(tokenize(tokenizer, [caption for caption, _ in drawn]).to(device))
        features = output.last_hidden_state + settings.noise * torch.randn_like(output.last_hidden_state)
        end = output.pooler_output + settings.noise * torch.randn_like(output.pooler_output)
        value = torch.zeros((), device=device)
        for index, guesses in enumerate(reader(features, end)):
            known = labels[:, index] != IGNORED
            if known.any():
                value = value + sum(nf.cross_entropy(guess[known], labels[known, index]) for guess in guesses)
                hits = (guesses[0][known].argmax(1) == labels[known, index]).float().mean().item()
                correct[index] = 0.95 * correct.get(index, hits) + 0.05 * hits
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        step += 1
        if step % 50 == 0:
            told = " ".join(f"{share:.3f}" for share in correct.values())
            say(f"text step {step} {clock.elapsed():.0f} s loss {value.item():.3f} right {told}")
    return correct
