"""Where words are live: hooks that answer for their ids, put them before prompts, and show each layer its own rows.

A layer-wise word (P+, Voynov et al. 2023, arXiv 2303.09522) makes one prompt into S conditions, one for each cross-attention
of the denoiser. The text encoder reads the prompt S times, each time with other rows, and its states leave it side by side,
(B, T, S * D); every cross-attention takes its own D of them. So a stock pipeline carries them from one to the other.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from vgm_peft.errors import DeltaError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedTokenizerBase


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a forward."""


class Owner(Protocol):
    """Who brings words to a desk: token -> part -> rows (N, D) or (S, N, D), and which of the tokens lead."""

    rows: dict[str, dict[str, nn.Parameter]]
    leading: frozenset[str]


@dataclass(frozen=True)
class _Order:
    """How the rows of all words are numbered."""

    start: int
    """The first id that is ours."""
    layers: Tensor
    """The id that each of our tokens has at each layer, (S, tokens); S is 1 where no word is layer-wise."""
    lead: Tensor
    """Ids that go before every prompt."""
    blank: Tensor
    """Ids of the empty prompt, (1, T), which nothing goes before: guidance compares with it."""
    first: int
    """Where a prompt begins: behind the mark of its beginning, if there is one."""
    end: int


class Desk:
    """One text encoder's desk: answers for the ids of all words attached to it, whoever attached them.

    It lives in the hooks of the encoder and its embedding and nowhere else (`desk_at` finds it there), so it dies with them.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self.owners: list[tuple[Owner, DiffusionPipeline, str]] = []
        self.originals: list[tuple[DiffusionPipeline, str, PreTrainedTokenizerBase]] = []
        self._order: _Order | None = None
        self._asked: Tensor | None = None
        self._passes = 1
        self._encoder = encoder
        embedding = cast(Any, encoder).get_input_embeddings()
        self._hooks = [embedding.register_forward_pre_hook(self._before), embedding.register_forward_hook(self._after)]
        self._outer: list[RemovableHandle] = []

    @property
    def names(self) -> list[str]:
        """The tokens that are taken, in the order of their ids."""
        return [name for token, rows, _ in self._rows() for name in spelled(token, rows.shape[-2])]

    @property
    def reserved(self) -> int:
        """Places in every prompt that words which lead take."""
        return sum(rows.shape[-2] for _, rows, leads in self._rows() if leads)

    def _rows(self) -> list[tuple[str, nn.Parameter, bool]]:
        return [(token, p[part], token in o.leading) for o, _, part in self.owners for token, p in o.rows.items()]

    def take(self, owner: Owner, pipe: "DiffusionPipeline", part: str) -> None:
        """Add an attachment and renumber."""
        if not any(known is pipe for known, _, _ in self.originals):
            self.originals.append((pipe, part, tokenizer_of(pipe, part)))
        self.owners.append((owner, pipe, part))
        self._renumber()

    def leave(self, owner: Owner) -> None:
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
        for hook in (*self._hooks, *self._outer):
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
            self._order = self._numbered(ids[0], original)
            setattr(pipe, _tokenizer_name(part), extended)
        wanted = self._order is not None and (len(self._order.layers) > 1 or len(self._order.lead) > 0)
        if wanted and not self._outer:
            # Ids are changed before anyone else looks at them, and states put side by side before anyone sees them.
            opening = self._encoder.register_forward_pre_hook(self._open, with_kwargs=True, prepend=True)
            self._outer = [opening, self._encoder.register_forward_hook(self._close, prepend=True)]
        elif not wanted:
            while self._outer:
                self._outer.pop().remove()

    def _numbered(self, start: int, tokenizer: "PreTrainedTokenizerBase") -> _Order:
        """Number the rows: those that tokens name come first, those of further layers behind them, layer by layer."""
        rows = self._rows()
        layers = max((len(p) for _, p, _ in rows if p.dim() == 3), default=1)
        named = torch.arange(start, start + sum(p.shape[-2] for _, p, _ in rows))
        layered = torch.cat([torch.full((p.shape[-2],), p.dim() == 3) for _, p, _ in rows])
        ids = named.repeat(layers, 1)
        further = torch.arange((layers - 1) * int(layered.sum())) + start + len(named)
        ids[1:, layered] = further.view(layers - 1, int(layered.sum()))
        lead = torch.cat([torch.full((p.shape[-2],), leads) for _, p, leads in rows])
        blank = torch.tensor([tokenizer("", padding="max_length", truncation=True).input_ids])
        first = int(blank[0, 0] == tokenizer.bos_token_id)
        return _Order(start, ids, named[lead], blank, first, cast(int, tokenizer.eos_token_id))

    def _table(self) -> Tensor:
        """All rows in the order of their ids."""
        rows = [p for _, p, _ in self._rows()]
        layered = [p for p in rows if p.dim() == 3]
        further = [p[layer] for layer in range(1, len(layered[0]) if layered else 1) for p in layered]
        return torch.cat([p[0] if p.dim() == 3 else p for p in rows] + further)

    def _before(self, embedding: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._asked = args[0]
        return (args[0].masked_fill(args[0] >= cast(_Order, self._order).start, 0), *args[1:])

    def _after(self, embedding: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        asked, self._asked = cast(Tensor, self._asked), None
        start = cast(_Order, self._order).start
        ours = F.embedding((asked - start).clamp(min=0), self._table().to(output.device)).to(output.dtype)
        return torch.where((asked >= start).unsqueeze(-1), ours, output)

    def _open(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Put words before the prompt, and have it read once for each layer (a forward pre-hook of the encoder)."""
        order = cast(_Order, self._order)
        ids, mask = _led(_given(args, kwargs, 0, "input_ids"), _given(args, kwargs, 1, "attention_mask"), order)
        layers, ours = order.layers.to(ids.device), ids >= order.start
        places = (ids - order.start).clamp(0, layers.shape[1] - 1)
        differ = bool((ours & (layers[0] != layers[-1])[places]).any())
        self._passes = len(layers) if differ else 1
        if differ:
            ids = torch.where(ours, layers[:, places], ids).flatten(0, 1)
            mask = None if mask is None else mask.repeat(len(layers), 1)
        args, kwargs = _putting(ids, args, kwargs, 0, "input_ids")
        return (args, kwargs) if mask is None else _putting(mask, args, kwargs, 1, "attention_mask")

    def _close(self, encoder: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Put the states of all layers side by side (a forward hook of the encoder)."""
        layers = len(cast(_Order, self._order).layers)
        if layers == 1:
            return output
        fold = partial(_side_by_side, layers=layers, passes=self._passes)
        if not hasattr(output, "keys"):
            return fold(output)
        for key in list(output.keys()):
            output[key] = fold(output[key])
        return output


def _given(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> Any:
    """Return an argument of a call, wherever it stands."""
    return args[place] if len(args) > place else kwargs.get(name)


def _putting(value: object, args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> Call:
    """Return the arguments of a call with another value for one of them."""
    if len(args) > place:
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: value}


def _led(ids: Tensor, mask: Tensor | None, order: _Order) -> tuple[Tensor, Tensor | None]:
    """Return prompts (B, T) with the words that lead in them; what no longer fits behind is cut off, but never the end."""
    count, length, first = len(order.lead), ids.shape[1], order.first
    if not count:
        return ids, mask
    blank = order.blank.to(ids.device)
    empty = (ids == blank).all(1) if blank.shape[1] == length else torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    lead = order.lead.to(ids.device).expand(len(ids), count)
    led = torch.cat([ids[:, :first], lead, ids[:, first:]], dim=1)[:, :length]
    led[(led != order.end).all(1), -1] = order.end
    led = torch.where(empty[:, None], ids, led)
    if mask is not None:
        shifted = torch.cat([mask.new_ones(len(mask), count), mask], dim=1)[:, :length]
        mask = torch.where(empty[:, None], mask, shifted)
    return led, mask


def _side_by_side(states: Any, layers: int, passes: int) -> Any:
    """Turn token states (S * B, T, D) of `passes` = S readings into (B, T, S * D), of one into S copies; average summaries."""
    if isinstance(states, (tuple, list)):
        return tuple(_side_by_side(each, layers, passes) for each in cast("tuple[Any, ...]", states))
    if not isinstance(states, Tensor) or states.dim() not in (2, 3):
        return states
    if passes == 1:
        return states if states.dim() == 2 else states.repeat(1, 1, layers)
    apart = states.unflatten(0, (passes, -1))
    return apart.mean(0) if states.dim() == 2 else apart.movedim(0, 2).flatten(2)


def spelled(token: str, vectors: int) -> list[str]:
    """The tokens that a word of so many vectors is written with, one for each."""
    return [token, *(f"{token}_{i}" for i in range(1, vectors))]


def desk_at(encoder: nn.Module) -> "Desk | None":
    """Return the desk of a text encoder, if there is one."""
    embedding = cast(Any, encoder).get_input_embeddings()
    owners = (getattr(hook, "__self__", None) for hook in embedding._forward_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Desk)), None)


def tokenizer_of(pipe: "DiffusionPipeline", part: str) -> "PreTrainedTokenizerBase":
    """Return the tokenizer that belongs to a text encoder."""
    return getattr(pipe, _tokenizer_name(part))


def _tokenizer_name(part: str) -> str:
    return part.replace("text_encoder", "tokenizer")


# --- the other end: cross-attentions


def cross_attentions(network: nn.Module) -> list[str]:
    """Return the names of a denoiser's (or ControlNet's) cross-attentions in the order of its forward: down, middle, up."""
    turns = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    names = [name for name, module in network.named_modules() if getattr(module, "is_cross_attention", False)]
    return sorted(names, key=lambda name: turns.get(name.removeprefix("nets.").lstrip("0123456789.").split(".")[0], 1))


def hook_cross_attentions(
    networks: Iterable[nn.Module], layers: Mapping[str, int], widths: tuple[int, ...]
) -> list[RemovableHandle]:
    """Have every cross-attention of the networks take its own states. `layers`: name in the denoiser -> number, from 0.

    `widths` are those of the text encoders, which the states are joined from; a ControlNet's layers are known by the same
    names. States that are not side by side are left alone.
    """
    hooks: list[RemovableHandle] = []
    for network in networks:
        for name in cross_attentions(network):
            number = layers.get(name.removeprefix("nets.").lstrip("0123456789."))
            if number is not None:
                take = partial(_take, number=number, layers=len(layers), widths=widths)
                hooks.append(network.get_submodule(name).register_forward_pre_hook(take, with_kwargs=True))
    return hooks


def _take(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], number: int, layers: int, widths: tuple[int, ...]
) -> Call | None:
    """Give one cross-attention its own part of the states (a forward pre-hook)."""
    states = cast("Tensor | None", _given(args, kwargs, 1, "encoder_hidden_states"))
    if states is None or states.shape[-1] != layers * sum(widths):
        return None
    starts = [layers * sum(widths[:i]) for i in range(len(widths))]
    own = [states.narrow(-1, start + number * width, width) for start, width in zip(starts, widths, strict=True)]
    return _putting(torch.cat(own, dim=-1) if len(own) > 1 else own[0], args, kwargs, 1, "encoder_hidden_states")


def spread(states: Tensor, layers: int, widths: tuple[int, ...]) -> Tensor:
    """Put states (B, T, D) that all layers share side by side, as the states of layer-wise words are."""
    if states.shape[-1] != sum(widths):
        return states
    return torch.cat([own.repeat(1, 1, layers) for own in states.split(widths, dim=-1)], dim=-1)
