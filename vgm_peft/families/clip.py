"""CLIP tokenizers and text encoders: OpenAI's own vocabulary, and one of toy size built in code.

Byte-level byte-pair encoding, Sennrich et al. 2015, arXiv 1508.07909. Every Stable Diffusion base reads with OpenAI's
vocabulary; a single-file checkpoint does not hold it, so it comes from the hub, once, and from its cache ever after.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from vgm_peft.errors import BaseModelError

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTokenizer

VOCABULARY, TOKENS = "openai/clip-vit-large-patch14", 49408
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


def text_prefixes(part: str, kohya: tuple[str, ...], native: tuple[str, ...]) -> tuple[str, ...]:
    """Return what tools write before a text encoder's modules: kohya's names, diffusers', peft's, ComfyUI's and OMI's."""
    return (*kohya, part, f"{part}_base_model_model", *(f"text_encoders_{name}_transformer" for name in native), *native)


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
    """Fetch the tokenizer of OpenAI's CLIP, 49,408 tokens (1 MB, cached); `pad` where a base pads with another token.

    Raises `BaseModelError` when it is not in the cache and there is no network.
    """
    from transformers import CLIPTokenizer

    load = cast(Any, CLIPTokenizer).from_pretrained
    try:
        tokenizer = load(VOCABULARY, pad_token=pad or END)
    except (OSError, ValueError):
        tokenizer = None
    # transformers answers a name that it cannot find with a tokenizer of two words, and no error.
    if tokenizer is None or len(tokenizer) != TOKENS:
        raise BaseModelError(
            f"the vocabulary that a single-file checkpoint is read with ({VOCABULARY}) is not on this machine",
            fix="go online once, or put a folder of the checkpoint's name beside it with its configurations and tokenizer",
        )
    return tokenizer


def _tokenizer(merges: list[tuple[str, str]], length: int) -> "CLIPTokenizer":
    """Number the letters, the letters that end a word, and what the merges make of them; then the two marks."""
    from transformers import CLIPTokenizer

    letters = _byte_letters()
    pieces = dict.fromkeys([*letters, *(f"{c}</w>" for c in letters), *map("".join, merges), START, END])
    build = cast(Any, CLIPTokenizer)
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return build(vocab=vocab, merges=merges, model_max_length=length, pad_token=END)


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
