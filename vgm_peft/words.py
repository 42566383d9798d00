"""Trained words on live pipelines: new tokens whose embedding rows are ours, the base's own table untouched.

Textual Inversion, Gal et al. 2022, arXiv 2208.01618 (section 4, eq. 2). diffusers grows the text encoder's embedding
matrix; here the pipeline gets extended *copies* of its tokenizers, and hooks answer for the new ids (`desk`), so the base
keeps its tensors, its state-dict keys and every original row. A word of N vectors is the tokens `tok`, `tok_1` ...
`tok_{N-1}`, as in diffusers, so that stock pipelines spell it out by themselves.

Text models whose configuration still says `eos_token_id: 2` (SDXL's second) pool at the highest id of a prompt, which is
then a new word and not the end: transformers' own rule, kept here so that our pictures are those of stock pipelines.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vgm_peft.desk import Desk, cross_attentions, desk_at, hook_cross_attentions, spelled, spread, tokenizer_of
from vgm_peft.errors import DeltaError, nearest
from vgm_peft.word import Word

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedTokenizerBase

RANDOM = re.compile(r"<rand(?:-([0-9.]+))?>")
SPREAD = 0.017
"""Standard deviation of a random row where none is given: that of Mix-of-Show's code (arXiv 2305.18292)."""


class WordAttachment:
    """Words, live on a pipeline. A context manager; `remove` (idempotent) takes them off without a trace.

    `rows` holds the parameters, token -> part -> (N, D) or (S, N, D) float32, trainable where asked; changing them takes
    effect at the next encoding. Several attachments stand side by side, also on pipelines that share their text encoders.
    """

    def __init__(
        self,
        pipe: "DiffusionPipeline",
        words: Iterable[Word],
        trainable: bool = False,
        *,
        rename: bool = False,
        beside: Sequence[nn.Module] = (),
    ) -> None:
        """Attach; everything is checked first. Raises `DeltaError` for a token already taken or rows that do not fit.

        With `rename`, a word whose token is taken gets another (see `free_token`); `rows` has the tokens as they are then, in
        the order of `words`. `beside` are networks that hear the same prompts, such as ControlNets not on the pipeline itself.
        """
        encoders, embeddings = text_encoders(pipe), text_embeddings(pipe)
        denoiser = denoiser_of(pipe)
        self._layers = {name: i for i, name in enumerate(cross_attentions(denoiser))} if denoiser is not None else {}
        self._words = given = _placed(words, encoders, pipe, rename)
        for word in given:
            _check_rows(word, embeddings, len(self._layers))
        self.leading = frozenset(word.token for word in given if word.leads)
        self.rows: dict[str, dict[str, nn.Parameter]] = {
            word.token: {part: _parameter(word.rows[part], embeddings[part], trainable) for part in embeddings}
            for word in given
        }
        self._widths = tuple(embedding.embedding_dim for embedding in embeddings.values())
        self._layered = any(word.layers for word in given)
        self._desks: list[Desk] = []
        self._hooks: list[RemovableHandle] = []
        try:
            self._put_on(pipe, encoders, [*_networks(pipe), *beside])
        except BaseException:
            self.remove()
            raise

    def _put_on(self, pipe: "DiffusionPipeline", encoders: Mapping[str, nn.Module], networks: Iterable[nn.Module]) -> None:
        for part, encoder in encoders.items() if self.rows else ():
            desk = desk_at(encoder) or Desk(encoder)
            self._desks.append(desk)
            desk.take(self, pipe, part)
        if self._layered:
            self._hooks = hook_cross_attentions(networks, self._layers, self._widths)

    def words(self) -> dict[str, Word]:
        """Return the words as they are now, token -> word, rows copied."""
        now = {token: {part: p.detach().clone() for part, p in parts.items()} for token, parts in self.rows.items()}
        return {word.token: replace(word, rows=now[word.token]) for word in self._words}

    def parameters(self) -> list[nn.Parameter]:
        """All rows, in the order of tokens and parts."""
        return [p for parts in self.rows.values() for p in parts.values()]

    def spread(self, states: Tensor) -> Tensor:
        """Return the states (B, T, D) of prompts without any of these words as they would be with them attached: of layer-wise
        ones, side by side for all layers."""
        return spread(states, len(self._layers), self._widths) if self._layered else states

    def remove(self) -> None:
        """Take the words off; the last to leave a pipeline gives it its own tokenizer objects back."""
        while self._hooks:
            self._hooks.pop().remove()
        for desk in self._desks:
            desk.leave(self)
        self._desks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def text_encoders(pipe: "DiffusionPipeline") -> dict[str, nn.Module]:
    """Return every text encoder of a pipeline, by part name, in prompt order."""
    parts = pipe.components
    return {name: parts[name] for name in sorted(parts) if name.startswith("text_encoder") and parts[name] is not None}


def text_embeddings(pipe: "DiffusionPipeline") -> dict[str, nn.Embedding]:
    """Return the token embedding of every text encoder of a pipeline, by part name, in prompt order."""
    return {name: cast(Any, encoder).get_input_embeddings() for name, encoder in text_encoders(pipe).items()}


def denoiser_of(pipe: "DiffusionPipeline") -> nn.Module | None:
    """Return the network of a pipeline that layer-wise words speak to."""
    return pipe.components.get("unet") or pipe.components.get("transformer")


def layers_of(pipe: "DiffusionPipeline") -> int:
    """Return how many cross-attentions a pipeline's denoiser has, each of which a layer-wise word has rows for."""
    denoiser = denoiser_of(pipe)
    return 0 if denoiser is None else len(cross_attentions(denoiser))


def new_word(pipe: "DiffusionPipeline", token: str, like: str, vectors: int = 1, *, mean: bool = False, seed: int = 0) -> Word:
    """Make a word whose rows begin as those of the text `like`: its tokens in turn, repeated or cut to `vectors` (as in kohya).

    With `mean` all begin as the mean of its tokens. `<rand-0.02>` in the text stands for a row drawn at random with this
    standard deviation (`<rand>`: 0.017), as in Mix-of-Show. Raises `DeltaError` when `like` has no token, or words that the
    base does not know.
    """
    rows: dict[str, Tensor] = {}
    for part, embedding in text_embeddings(pipe).items():
        beginning = _rows_like(like, embedding, tokenizer_of(pipe, part), torch.Generator().manual_seed(seed))
        if not len(beginning) or vectors < 1:
            raise DeltaError(
                f'a word of {vectors} vectors beginning like "{like}"', expected="at least one vector and a text with tokens"
            )
        start = beginning.mean(0, keepdim=True) if mean else beginning
        rows[part] = start[torch.arange(vectors) % len(start)].clone()
    return Word(token, rows)


def tokens_in(pipe: "DiffusionPipeline", text: str) -> int:
    """Return the number of rows that a text would begin a word with, in the encoder where it has most."""
    parts = [piece for piece in RANDOM.split(text)[::2] if piece.strip()]
    encoders = text_encoders(pipe)
    counts = [sum(len(_ids(tokenizer_of(pipe, part), piece)) for piece in parts) for part in encoders]
    return max(counts, default=0) + len(RANDOM.findall(text))


def _rows_like(like: str, embedding: nn.Embedding, tokenizer: "PreTrainedTokenizerBase", chance: torch.Generator) -> Tensor:
    """The rows of a text's tokens, (tokens, D) float32, with random ones where it says so."""
    table, rows = embedding.weight.detach(), list[Tensor]()
    for number, piece in enumerate(RANDOM.split(like)):
        if number % 2:
            rows.append(torch.randn(1, table.shape[1], generator=chance).to(table.device) * float(piece or SPREAD))
            continue
        for word in piece.split():
            _check_known(word, tokenizer)
        ids = [i for i in _ids(tokenizer, piece) if i < embedding.num_embeddings]
        rows.append(table[ids].to(torch.float32))
    return torch.cat(rows)


def _check_known(word: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a word that falls apart into letters: what the base knows of them is nothing of the word."""
    ids = _ids(tokenizer, word)
    letters = sum(map(str.isalnum, word))
    unknown = tokenizer.unk_token_id in ids and word.lower() != str(tokenizer.unk_token)
    if unknown or letters and len(ids) > 1 and letters < 2 * len(ids):
        known = sorted({name.removesuffix("</w>") for name in tokenizer.get_vocab() if name[:-4].isalpha() and len(name) > 6})
        raise DeltaError(
            f'the base does not know the word "{word}": it reads it as {len(ids)} pieces of letters',
            expected="words from its vocabulary, to begin from",
            fix=nearest(word.lower(), known) if known else "",
        )


def free_token(token: str, vectors: int, taken: Iterable[str]) -> str:
    """Return a token that does not clash with those taken: itself, or the first of `<toy-2>`, `<toy-3>` ... that is free."""
    taken, number, name = set(taken), 1, token
    stem, end = (token[:-1], token[-1]) if token[-1:] in (">", "]", "}") else (token, "")
    while _clash(name, vectors, taken):
        number += 1
        name = f"{stem}-{number}{end}"
    return name


def _placed(words: Iterable[Word], encoders: Mapping[str, nn.Module], pipe: "DiffusionPipeline", rename: bool) -> list[Word]:
    """The words under the tokens that they are to have."""
    desks = [desk for encoder in encoders.values() if (desk := desk_at(encoder)) is not None]
    taken = {name for desk in desks for name in desk.names}
    out: list[Word] = []
    for word in words:
        vectors = word.vectors if word.rows else 1
        token = free_token(word.token, vectors, taken) if rename else word.token
        for part in encoders:
            _check_token(token, vectors, taken, tokenizer_of(pipe, part))
        taken |= set(spelled(token, vectors))
        out.append(replace(word, token=token))
    return out


def _parameter(rows: Tensor, embedding: nn.Embedding, trainable: bool) -> nn.Parameter:
    return nn.Parameter(rows.detach().to(embedding.weight.device, torch.float32).clone(), requires_grad=trainable)


def _networks(pipe: "DiffusionPipeline") -> list[nn.Module]:
    """Everything on a pipeline that may listen to prompts."""
    deaf = ("text_encoder", "vae", "safety_checker", "image_encoder")
    return [m for name, m in pipe.components.items() if isinstance(m, nn.Module) and not name.startswith(deaf)]


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return cast("list[int]", tokenizer(text, add_special_tokens=False).input_ids)


def _check_rows(word: Word, embeddings: Mapping[str, nn.Embedding], layers: int) -> None:
    fix = "use the word with the family of base models it was trained on"
    if set(word.rows) != set(embeddings):
        raise DeltaError(
            f'the word "{word.token}" has rows for {", ".join(sorted(word.rows)) or "nothing"}',
            expected="rows for " + (", ".join(embeddings) or "nothing, since the pipeline has no text encoder"),
            fix=fix,
        )
    for part, rows in word.rows.items():
        width = embeddings[part].embedding_dim
        if rows.dim() not in (2, 3) or rows.shape[-1] != width or 0 in rows.shape:
            shape = "x".join(map(str, rows.shape))
            raise DeltaError(f'the word "{word.token}" is {shape} for {part}', expected=f"rows of {width} values", fix=fix)
        if rows.dim() == 3 and len(rows) != layers:
            raise DeltaError(f'the word "{word.token}" has rows for {len(rows)} layers', expected=f"{layers} layers", fix=fix)
    lengths = {part: rows.shape[-2] for part, rows in word.rows.items()}
    if len(set(lengths.values())) > 1 or len({rows.dim() for rows in word.rows.values()}) > 1:
        raise DeltaError(f'the word "{word.token}" has {lengths} vectors', expected="the same number for every text encoder")


def _clash(token: str, vectors: int, taken: Iterable[str]) -> str:
    """Which of the tokens taken a word would be confused with: `<a>` beside a separate `<a>_1` reads as one of two vectors."""
    names = spelled(token, vectors)
    root, _, number = token.rpartition("_")
    near = {*names, f"{token}_{vectors}", *([root] if number.isdigit() else [])}
    return min(near & set(taken), default="")


def _check_token(token: str, vectors: int, taken: Iterable[str], tokenizer: "PreTrainedTokenizerBase") -> None:
    if not token or token.split() != [token]:
        raise DeltaError(f'the token "{token}"', expected="a token without spaces", fix='for example "<toy>"')
    if clash := _clash(token, vectors, taken):
        raise DeltaError(f'the words "{token}" and "{clash}" clash', fix="give one of them another token")
    room = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
    if vectors > room:
        raise DeltaError(f'the word "{token}" has {vectors} vectors', expected=f"at most {room}, which is all a prompt holds")
    known = tokenizer.get_vocab()
    for name in spelled(token, vectors):
        if name in known or len(_ids(tokenizer, name)) == 1:
            raise DeltaError(f'the token "{name}" is already a word of the base', fix='choose one like "<toy>"')
