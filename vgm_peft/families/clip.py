"""CLIP tokenizers and text encoders without any download: OpenAI's own vocabulary, and one of toy size built in code.

Byte-level byte-pair encoding, Sennrich et al. 2015, arXiv 1508.07909. The vocabulary that every Stable Diffusion base
reads with follows from its list of merges, which travels in the package (`assets/clip`, under its own licence).
"""

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTokenizer

MERGES = Path(__file__).resolve().parent.parent / "assets" / "clip" / "merges.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_L: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
"""OpenAI's ViT-L/14 text model: Stable Diffusion 1.x, and the first of SDXL's two."""
CLIP_H: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 512,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
"""OpenCLIP's ViT-H/14 without its last layer: Stable Diffusion 2.x."""
CLIP_G: Mapping[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
}
"""OpenCLIP's ViT-bigG/14: the second of SDXL's two."""
_COMMON = ("photo", "picture", "drawing", "robot", "duck", "mushroom", "rocket", "house", "grass", "style", "small", "large")


def tiny_tokenizer(length: int = 77) -> "CLIPTokenizer":
    """Build a CLIPTokenizer of some 600 tokens that covers every byte, so that any text tokenises; a few words are whole."""
    merges: dict[tuple[str, str], None] = {}
    for word in _COMMON:
        left = word[0]
        for right in (*word[1:-1], f"{word[-1]}</w>"):
            merges[left, right] = None
            left += right
    return _tokenizer(list(merges), length)


def clip_tokenizer(pad: str | None = None) -> "CLIPTokenizer":
    """Build the tokenizer of OpenAI's CLIP, 49,408 tokens; `pad` where a base pads with another than the end token."""
    merges = [tuple(line.split()) for line in gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()]
    return _tokenizer(cast("list[tuple[str, str]]", merges), 77, pad)


def _tokenizer(merges: list[tuple[str, str]], length: int, pad: str | None = None) -> "CLIPTokenizer":
    """Number the letters, the letters that end a word, and what the merges make of them; then the two marks."""
    from transformers import CLIPTokenizer

    letters = _byte_letters()
    pieces = dict.fromkeys([*letters, *(f"{c}</w>" for c in letters), *map("".join, merges), START, END])
    build = cast(Any, CLIPTokenizer)
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return build(vocab=vocab, merges=merges, model_max_length=length, pad_token=pad or END)


def tiny_text_config(tokenizer: "CLIPTokenizer", width: int, layers: int = 2) -> "CLIPTextConfig":
    """Return the configuration of a CLIP text model of two heads that fits a tokenizer."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=cast(int, tokenizer.bos_token_id),
        eos_token_id=cast(int, tokenizer.eos_token_id),
        pad_token_id=cast(int, tokenizer.pad_token_id),
    )


def _byte_letters() -> list[str]:
    """The 256 printable characters that stand for the 256 bytes in GPT-2's byte-level alphabet, in the order of their ids:

    first the bytes that stand for themselves, then the others.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, plain), *map(chr, range(256, 512 - len(plain)))]
