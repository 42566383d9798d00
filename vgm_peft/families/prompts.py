"""Prompts to CLIP token states, with the same numbers as the stock pipelines' own `encode_prompt`.

Gradients flow to whatever asks for them: patches on the text encoder, or the rows of a `WordAttachment`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase


def last_state(tokenizer: "PreTrainedTokenizerBase", encoder: nn.Module, prompts: Sequence[str]) -> Tensor:
    """Return the final, normalised token states (B, T, D): what Stable Diffusion 1 and 2 listen to."""
    tokens = tokenise(tokenizer, prompts)
    masked = getattr(encoder.config, "use_attention_mask", False)
    return _run(encoder, tokens["input_ids"], tokens["attention_mask"] if masked else None)[0]


def penultimate_state(
    tokenizer: "PreTrainedTokenizerBase", encoder: nn.Module, prompts: Sequence[str]
) -> tuple[Tensor, Tensor | None]:
    """Return the last but one layer's token states (B, T, D), not normalised, and the projected summary (B, E).

    The summary is None for a text model without projection. This is what Stable Diffusion XL listens to.
    """
    answer = _run(encoder, tokenise(tokenizer, prompts)["input_ids"], output_hidden_states=True)
    return answer.hidden_states[-2], getattr(answer, "text_embeds", None)


def tokenise(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str]) -> "BatchEncoding":
    """Return ids and mask (B, T), padded and cut to the tokenizer's own length; multi-vector words are spelled out first."""
    words = _added(tokenizer) - set(tokenizer.all_special_tokens)
    texts = [expand(tokenizer, prompt) for prompt in prompts] if words else list(prompts)
    length = tokenizer.model_max_length
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")


def expand(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> str:
    """Spell out trained words of several vectors: `<toy>` becomes `<toy> <toy>_1 <toy>_2`, as diffusers does."""
    added = _added(tokenizer)
    for token in (t for t in dict.fromkeys(tokenizer.tokenize(prompt)) if t in added):
        spelled = [token]
        while f"{token}_{len(spelled)}" in added:
            spelled.append(f"{token}_{len(spelled)}")
        prompt = prompt.replace(token, " ".join(spelled))
    return prompt


def _added(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    return set(cast(dict[str, int], tokenizer.added_tokens_encoder))


def _run(encoder: nn.Module, ids: Tensor, mask: Tensor | None = None, **flags: bool) -> Any:
    device = next(encoder.parameters()).device
    return encoder(ids.to(device), attention_mask=None if mask is None else mask.to(device), **flags)
