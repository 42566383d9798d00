"""Trained words on live pipelines: new tokens whose embedding rows are ours, the base's own table untouched.

Textual Inversion, Gal et al. 2022, arXiv 2208.01618 (section 4, eq. 2). diffusers grows the text encoder's embedding
matrix; here the pipeline gets extended *copies* of its tokenizers, and two hooks on the embedding module answer for the
new ids, so the base keeps its tensors, its state-dict keys and every original row. A word of N vectors is the tokens
`tok`, `tok_1` ... `tok_{N-1}`, as in diffusers, so that stock pipelines spell it out by themselves.

Text models whose configuration still says `eos_token_id: 2` (SDXL's second) pool at the highest id of a prompt, which is
then a new word and not the end: transformers' own rule, kept here so that our pictures are those of stock pipelines.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vgm_peft.delta import Word
from vgm_peft.errors import DeltaError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedTokenizerBase


class WordAttachment:
    """Words, live on a pipeline. A context manager; `remove` (idempotent) takes them off without a trace.

    `rows` holds the parameters, token -> part -> (N, D) float32, trainable where asked; changing them takes effect at
    the next encoding. Several attachments stand side by side, also on pipelines that share their text encoders.
    """

    def __init__(self, pipe: "DiffusionPipeline", words: Iterable[Word], trainable: bool = False) -> None:
        """Attach; everything is checked first. Raises `DeltaError` for a token already taken or rows that do not fit."""
        words = list(words)
        embeddings = text_embeddings(pipe)
        for word in words:
            _check_rows(word, embeddings)
        self.rows: dict[str, dict[str, nn.Parameter]] = {
            word.token: {part: _parameter(word.rows[part], embeddings[part], trainable) for part in embeddings}
            for word in words
        }
        for part in embeddings:
            _check_tokens(words, _desk_at(embeddings[part]), _tokenizer(pipe, part))
        self._desks: list[_Desk] = []
        if not words:
            return
        try:
            for part, embedding in embeddings.items():
                desk = _desk_at(embedding) or _Desk(embedding)
                self._desks.append(desk)
                desk.take(self, pipe, part)
        except BaseException:
            self.remove()
            raise

    def words(self) -> dict[str, Word]:
        """Return the words as they are now, token -> word, rows copied."""
        return {
            token: Word(token, {part: p.detach().clone() for part, p in parts.items()}) for token, parts in self.rows.items()
        }

    def parameters(self) -> list[nn.Parameter]:
        """All rows, in the order of tokens and parts."""
        return [p for parts in self.rows.values() for p in parts.values()]

    def remove(self) -> None:
        """Take the words off; the last to leave a pipeline gives it its own tokenizer objects back."""
        for desk in self._desks:
            desk.leave(self)
        self._desks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


class _Desk:
    """One embedding module's desk: answers for the ids of all words attached to it, whoever attached them.

    It lives in the module's hooks and nowhere else (`_desk_at` finds it there), so it dies with the module.
    """

    def __init__(self, embedding: nn.Module) -> None:
        self.owners: list[tuple[WordAttachment, DiffusionPipeline, str]] = []
        self.originals: list[tuple[DiffusionPipeline, str, PreTrainedTokenizerBase]] = []
        self.start = 0
        self._asked: Tensor | None = None
        self._hooks = [embedding.register_forward_pre_hook(self._before), embedding.register_forward_hook(self._after)]

    @property
    def names(self) -> list[str]:
        """The tokens that are taken, in the order of their ids."""
        return [name for rows in self._rows() for name in _names(*rows)]

    def _rows(self) -> list[tuple[str, nn.Parameter]]:
        return [(token, parts[part]) for owner, _, part in self.owners for token, parts in owner.rows.items()]

    def take(self, owner: WordAttachment, pipe: "DiffusionPipeline", part: str) -> None:
        """Add an attachment and renumber."""
        if not any(known is pipe for known, _, _ in self.originals):
            self.originals.append((pipe, part, _tokenizer(pipe, part)))
        self.owners.append((owner, pipe, part))
        self._renumber()

    def leave(self, owner: WordAttachment) -> None:
        """Take an attachment off; pipelines without any get their tokenizer back, and an empty desk is cleared away."""
        self.owners = [entry for entry in self.owners if entry[0] is not owner]
        for entry in list(self.originals):
            pipe, part, tokenizer = entry
            if not any(p is pipe for _, p, _ in self.owners):
                setattr(pipe, _tokenizer_name(part), tokenizer)
                self.originals.remove(entry)
        if self.owners:
            self._renumber()
            return
        for hook in self._hooks:
            hook.remove()

    def _renumber(self) -> None:
        names = self.names
        for pipe, part, original in self.originals:
            extended = copy.deepcopy(original)
            extended.add_tokens(names)
            ids = [cast(int, extended.convert_tokens_to_ids(name)) for name in names]
            if ids != list(range(ids[0], ids[0] + len(names))):
                raise DeltaError(f"{type(original).__name__} numbers the new words {ids}", expected="numbers in one row")
            for name, number in zip(names, ids, strict=True):
                if extended(name, add_special_tokens=False).input_ids != [number]:
                    raise DeltaError(f'the tokenizer does not read "{name}" as one word', fix="give it another token")
            self.start = ids[0]
            setattr(pipe, _tokenizer_name(part), extended)

    def _before(self, embedding: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._asked = args[0]
        return (args[0].masked_fill(args[0] >= self.start, 0), *args[1:])

    def _after(self, embedding: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        asked, self._asked = cast(Tensor, self._asked), None
        table = torch.cat([rows for _, rows in self._rows()])
        ours = F.embedding((asked - self.start).clamp(min=0), table.to(output.device)).to(output.dtype)
        return torch.where((asked >= self.start).unsqueeze(-1), ours, output)


def _desk_at(embedding: nn.Module) -> "_Desk | None":
    hooks = embedding._forward_hooks.values()  # pyright: ignore[reportPrivateUsage]
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return next((owner for owner in owners if isinstance(owner, _Desk)), None)


def text_embeddings(pipe: "DiffusionPipeline") -> dict[str, nn.Embedding]:
    """Return the token embedding of every text encoder of a pipeline, by part name, in prompt order."""
    parts = pipe.components
    found = {name: parts[name] for name in sorted(parts) if name.startswith("text_encoder") and parts[name] is not None}
    return {name: encoder.get_input_embeddings() for name, encoder in found.items()}


def new_word(pipe: "DiffusionPipeline", token: str, like: str, vectors: int = 1) -> Word:
    """Make a word whose rows begin as those of the text `like`, repeated where it has fewer tokens than `vectors`.

    Raises `DeltaError` when `like` has no token.
    """
    rows: dict[str, Tensor] = {}
    for part, embedding in text_embeddings(pipe).items():
        ids = cast("list[int]", _tokenizer(pipe, part)(like, add_special_tokens=False).input_ids)
        ids = [i for i in ids if i < embedding.num_embeddings]
        if not ids or vectors < 1:
            raise DeltaError(
                f'a word of {vectors} vectors beginning like "{like}"', expected="at least one vector and a text with tokens"
            )
        rows[part] = embedding.weight.detach()[[ids[i % len(ids)] for i in range(vectors)]].to(torch.float32).clone()
    return Word(token, rows)


def _parameter(rows: Tensor, embedding: nn.Embedding, trainable: bool) -> nn.Parameter:
    return nn.Parameter(rows.detach().to(embedding.weight.device, torch.float32).clone(), requires_grad=trainable)


def _tokenizer_name(part: str) -> str:
    return part.replace("text_encoder", "tokenizer")


def _tokenizer(pipe: "DiffusionPipeline", part: str) -> "PreTrainedTokenizerBase":
    return getattr(pipe, _tokenizer_name(part))


def _names(token: str, rows: Tensor) -> list[str]:
    return [token, *(f"{token}_{i}" for i in range(1, len(rows)))]


def _check_rows(word: Word, embeddings: Mapping[str, nn.Embedding]) -> None:
    fix = "use the word with the family of base models it was trained on"
    if set(word.rows) != set(embeddings):
        raise DeltaError(
            f'the word "{word.token}" has rows for {", ".join(sorted(word.rows)) or "nothing"}',
            expected="rows for " + (", ".join(embeddings) or "nothing, since the pipeline has no text encoder"),
            fix=fix,
        )
    for part, rows in word.rows.items():
        width = embeddings[part].embedding_dim
        if rows.dim() != 2 or rows.shape[1] != width or len(rows) == 0:
            shape = "x".join(map(str, rows.shape))
            raise DeltaError(f'the word "{word.token}" is {shape} for {part}', expected=f"rows of {width} values", fix=fix)
    lengths = {part: len(rows) for part, rows in word.rows.items()}
    if len(set(lengths.values())) > 1:
        raise DeltaError(f'the word "{word.token}" has {lengths} vectors', expected="the same number for every text encoder")


def _check_tokens(words: "list[Word]", desk: "_Desk | None", tokenizer: "PreTrainedTokenizerBase") -> None:
    taken = set() if desk is None else set(desk.names)
    known = tokenizer.get_vocab()
    for word in words:
        names = _names(word.token, next(iter(word.rows.values())))
        if not word.token or word.token.split() != [word.token]:
            raise DeltaError(f'the token "{word.token}"', expected="a token without spaces", fix='for example "<toy>"')
        # `<a>` beside a separate `<a>_1` would be spelled out as one word of two vectors.
        root, _, number = word.token.rpartition("_")
        near = {*names, f"{names[0]}_{len(names)}", *([root] if number.isdigit() else [])}
        if clash := sorted(near & taken):
            raise DeltaError(f'the words "{word.token}" and "{clash[0]}" clash', fix="give one of them another token")
        for name in names:
            if name in known or len(cast("list[int]", tokenizer(name, add_special_tokens=False).input_ids)) == 1:
                raise DeltaError(f'the token "{name}" is already a word of the base', fix='choose one like "<toy>"')
        taken |= set(names)
