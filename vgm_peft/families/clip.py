"""CLIP tokenizers and text encoders at toy size: real classes, a vocabulary built in code, nothing downloaded."""

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
_COMMON = ("photo", "picture", "drawing", "robot", "duck", "mushroom", "rocket", "house", "grass", "style", "small", "large")


def tiny_tokenizer(length: int = 77) -> "CLIPTokenizer":
    """Build a CLIPTokenizer of some 600 tokens that covers every byte, so that any text tokenises; a few words are whole."""
    from transformers import CLIPTokenizer

    letters = _byte_letters()
    pieces = dict.fromkeys([*letters, *(f"{c}</w>" for c in letters)])
    merges: dict[tuple[str, str], None] = {}
    for word in _COMMON:
        left = word[0]
        for right in (*word[1:-1], f"{word[-1]}</w>"):
            merges[left, right] = None
            left += right
            pieces[left] = None
    vocab = {piece: i for i, piece in enumerate([*pieces, START, END])}
    build = cast(Any, CLIPTokenizer)
    return build(vocab=vocab, merges=list(merges), model_max_length=length)


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
    """The 256 printable characters that stand for the 256 bytes in GPT-2's byte-level alphabet, in byte order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spare = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(spare)) for b in range(256)]
