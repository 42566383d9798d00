"""Prompts to what a text encoder reads and makes of it, with the same numbers as the stock pipelines' own `encode_prompt`.

A caption of a picture is plain text, cut where the encoder's window ends. A prompt that someone wrote may hold the syntax
that the UIs have in common (`syntax`): emphasis, and more text than one window, which then goes on in further ones. A short
prompt without any gives the same bits either way.

Gradients flow to whatever asks for them: patches on the text encoder, or the rows of a `WordAttachment`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from vgm_peft.desk import desk_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Layer = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""What is taken of an encoder that reads ids and mask (B, T): token states (B, T, D) and, of some, a summary (B, E)."""
SYNTAX = re.compile(r"\\([()\[\]\\])|\\|[()\[\]]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[^\\()\[\]:]+|:")
STRONGER = 1.1
"""What one pair of round brackets multiplies by, and one of square brackets divides by."""
BACK = 20
"""A window that is full ends at a comma, if there is one among so many tokens at its end."""
FLAT = 1e-2
"""Mean of token states, as a share of their size, below which it is no more than rounding."""


@dataclass(frozen=True)
class Token:
    """One token of a prompt, and how much it counts."""

    id: int
    weight: float
    glued: bool = False
    """Whether it belongs to the one before: the further vectors of a trained word."""


def last_state(encoder: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, None]:
    """Return the final, normalised token states: what Stable Diffusion 1 and 2 listen to."""
    masked = getattr(encoder.config, "use_attention_mask", False)
    return _run(encoder, ids, mask if masked else None)[0], None


def penultimate_state(encoder: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the last but one layer's token states, not normalised, and the projected summary: Stable Diffusion XL's.

    The summary is None for a text model without projection.
    """
    answer = _run(encoder, ids, output_hidden_states=True)
    return answer.hidden_states[-2], getattr(answer, "text_embeds", None)


def encode(
    tokenizer: "PreTrainedTokenizerBase", encoder: nn.Module, prompts: Sequence[str], layer: Layer, syntax: bool
) -> tuple[Tensor, Tensor | None]:
    """Return what `layer` takes of an encoder for every prompt: states (B, W * T, D) and summary (B, E).

    Without `syntax` prompts are plain text for one window. With it they are read by the rules of `emphasis` and `windows`:
    all get as many windows as the longest needs, each with its own beginning and end, and the summary is that of the first.
    Every window is then read by itself, so that no prompt's bits depend on the others'.
    """
    if not syntax:
        ids, mask = tokenise(tokenizer, prompts)
        return layer(encoder, ids, mask)
    desk = desk_at(encoder)
    reserved = 0 if desk is None else desk.reserved
    room = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add() - reserved
    cut = [windows(tokenizer, read(tokenizer, prompt), room) for prompt in prompts]
    count = max(map(len, cut))
    states, summaries = list[Tensor](), list[Tensor]()
    for row in cut:
        answers = [_hear(tokenizer, encoder, each, layer, reserved) for each in (*row, *[[]] * (count - len(row)))]
        states.append(torch.cat([state for state, _ in answers], dim=1))
        summaries += [summary for _, summary in answers[:1] if summary is not None]
    return torch.cat(states), torch.cat(summaries) if summaries else None


def tokenise(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return ids and mask (B, T), padded and cut to the tokenizer's own length; multi-vector words are spelled out first."""
    texts = [expand(tokenizer, prompt) for prompt in prompts]
    length = tokenizer.model_max_length
    tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return cast(Tensor, tokens["input_ids"]), cast(Tensor, tokens["attention_mask"])


def expand(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> str:
    """Spell out trained words of several vectors: `<toy>` becomes `<toy> <toy>_1 <toy>_2`, as diffusers does."""
    added = set(cast(dict[str, int], tokenizer.added_tokens_encoder))
    if not added - set(tokenizer.all_special_tokens):
        return prompt
    for token in (t for t in dict.fromkeys(tokenizer.tokenize(prompt)) if t in added):
        spelled = [token]
        while f"{token}_{len(spelled)}" in added:
            spelled.append(f"{token}_{len(spelled)}")
        prompt = prompt.replace(token, " ".join(spelled))
    return prompt


def emphasis(prompt: str) -> list[tuple[str, float]]:
    """Return a prompt's pieces and how much each counts, by the rules of A1111.

    `(a)` counts 1.1 times as much, `[a]` 1/1.1 times, `(a:1.5)` 1.5 times; brackets nest; one that is never closed holds to
    the end. A backslash before a bracket, or before a backslash, makes a letter of it.
    """
    pieces: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []

    def close(bracket: str, factor: float) -> bool:
        place = next((i for i in reversed(range(len(opened))) if opened[i][0] == bracket), None)
        if place is None:
            return False
        _, start = opened.pop(place)
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]
        return True

    for match in SYNTAX.finditer(prompt):
        text, letter, factor = match[0], match[1], match[2]
        if letter is not None or text == "\\":
            pieces.append((letter or "", 1.0))
        elif text in ("(", "["):
            opened.append((text, len(pieces)))
        elif not (
            (factor is not None and close("(", float(factor)))
            or (text == ")" and close("(", STRONGER))
            or (text == "]" and close("[", 1 / STRONGER))
        ):
            pieces.append((text, 1.0))
    while opened:
        close(opened[-1][0], STRONGER if opened[-1][0] == "(" else 1 / STRONGER)
    return [("".join(text for text, _ in run), weight) for weight, run in groupby(pieces, key=lambda piece: piece[1])]


def read(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[Token]:
    """Return the tokens of a prompt with emphasis in it, without the marks of its beginning and end."""
    out: list[Token] = []
    for text, weight in emphasis(prompt):
        ids = cast("list[int]", tokenizer(expand(tokenizer, text), add_special_tokens=False).input_ids)
        names = cast("list[str]", tokenizer.convert_ids_to_tokens(ids))
        heads = [re.sub(r"_\d+$", "", name) for name in names]
        glued = [i > 0 and names[i] != heads[i] and heads[i] == heads[i - 1] for i in range(len(ids))]
        out += [Token(number, weight, glue) for number, glue in zip(ids, glued, strict=True)]
    return out


def windows(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[Token], room: int) -> list[list[Token]]:
    """Cut tokens into windows of at most `room`: after a comma near the end if there is one, never within a trained word."""
    comma = cast("list[int]", tokenizer(",", add_special_tokens=False).input_ids)
    out, rest = list[list[Token]](), list(tokens)
    while len(rest) > room:
        cut = next((i for i in range(room, max(0, room - BACK), -1) if [rest[i - 1].id] == comma), room)
        while cut and rest[cut].glued:
            cut -= 1
        out.append(rest[: cut or room])
        rest = rest[cut or room :]
    return [*out, rest] if rest or not out else out


def _hear(
    tokenizer: "PreTrainedTokenizerBase", encoder: nn.Module, tokens: Sequence[Token], layer: Layer, reserved: int
) -> tuple[Tensor, Tensor | None]:
    """What an encoder makes of one window: states (1, T, D) and summary (1, E)."""
    length, blank = tokenizer.model_max_length, cast("list[int]", tokenizer("").input_ids)
    begin = int(blank[0] == tokenizer.bos_token_id)
    ids = [*blank[:begin], *(token.id for token in tokens), *blank[begin:]]
    filled = torch.full((1, length), cast(int, tokenizer.pad_token_id))
    filled[0, : len(ids)] = torch.tensor(ids)
    state, summary = layer(encoder, filled, (torch.arange(length) < len(ids))[None].long())
    weights = torch.ones(length)
    start = begin + reserved
    weights[start : start + len(tokens)] = torch.tensor([token.weight for token in tokens])
    return weighed(state, weights), summary


def weighed(states: Tensor, weights: Tensor) -> Tensor:
    """Multiply token states (1, T, D) by weights (T,), and bring their mean back to what it was, as A1111 does.

    Where the states have no mean to speak of there is nothing to bring back.
    """
    if bool((weights == 1.0).all()):
        return states
    heavier = states * weights.to(states)[:, None]
    before, after = states.mean(), heavier.mean()
    least = FLAT * states.abs().mean()
    return heavier * (before / after) if min(before.abs(), after.abs()) > least else heavier


def _run(encoder: nn.Module, ids: Tensor, mask: Tensor | None = None, **flags: bool) -> Any:
    device = next(encoder.parameters()).device
    return encoder(ids.to(device), attention_mask=None if mask is None else mask.to(device), **flags)
