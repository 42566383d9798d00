"""How the deltas and regions of a stack meet in one picture: a call of the denoiser is made of several branches.

Every row of a call becomes one row for each branch, which has its own prompt and its own deltas; what the branches answer is
blended into what the sampler gets. So any stock pipeline of the base draws regions, and side networks hear every branch.

* Regions by noise: a branch for each place, blended by the masks (as in MultiDiffusion, Bar-Tal et al. 2023, arXiv 2302.08113,
  section 4.2, on one grid).
* Regions by attention: one branch, in which every cross-attention reads each place's own prompt (`regions`).
* LoRA Switch and LoRA Composite (Zhong et al. 2024, arXiv 2402.16843, section 3): a branch for each delta, of which one
  answers at a time, or all, and the mean is taken. Guidance is linear, so the mean of guided answers is the guided mean.
"""

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vgm_peft.attachment import Attachment
from vgm_peft.delta import Delta
from vgm_peft.desk import Call, cross_attentions, hook_cross_attentions, spread
from vgm_peft.drawing import guided, moment
from vgm_peft.errors import ConfigError
from vgm_peft.family import Base, Condition
from vgm_peft.stack.acting import Acting, Branch
from vgm_peft.stack.handle import renamed
from vgm_peft.stack.recipe import Stack
from vgm_peft.stack.regions import Places, RegionalAttention
from vgm_peft.words import WordAttachment, text_embeddings

TURNS = 20
"""How many turns a whole drawing has when deltas switch, or as many as it has steps: the paper's 5 of 100 steps each."""
Key = tuple[int, tuple[str, ...]]
"""A place, and the live deltas that act on its prompt."""


@dataclass(frozen=True)
class _Read:
    """What a prompt and its negative became, with the states of an empty window to make them longer."""

    positive: Condition
    negative: Condition
    blank: Tensor

    def grown(self, tokens: int, layers: int, widths: tuple[int, ...]) -> "_Read":
        """Return it with so many tokens, side by side for so many layers (0: as they are)."""

        def one(condition: Condition, blank: Tensor) -> Condition:
            short = tokens - condition.hidden.shape[1]
            hidden = torch.cat([condition.hidden, *[blank] * (short // blank.shape[1])], dim=1)
            return Condition(spread(hidden, layers, widths) if layers else hidden, condition.pooled)

        zeros = not bool(self.negative.hidden.any())
        blank = torch.zeros_like(self.blank) if zeros else self.blank
        return _Read(one(self.positive, self.blank), one(self.negative, blank), self.blank)


def branches_of(stack: Stack, patched: Collection[str]) -> list[Branch]:
    """Return the branches that a stack asks for, those for the same places side by side.

    `patched` are the uses of live deltas, by their names, that change any weight: what is only words has no branch to itself.
    """
    homes = {region.name: number for number, region in enumerate(stack.regions, 1)}
    every = tuple(range(len(stack.regions) + 1))
    out: list[Branch] = []
    for places in [every] if stack.regional == "attention" else [(place,) for place in every]:
        present = [use.name for use in stack.deltas if not use.region or homes[use.region] in places]
        acting = tuple(name for name in present if name in patched)
        apart = [(name,) for name in acting] if stack.combine != "sum" else [acting]
        out += [Branch(deltas, places) for deltas in apart or [()]]
    return out


def turn_of(begin: float, end: float, count: int) -> int:
    """Return which of `count` deltas has its turn in a step, by the shares of all steps where it begins and ends."""
    steps = round(1.0 / (end - begin)) if end > begin else TURNS
    return round(begin * steps) // max(1, round(steps / TURNS)) % count


class Mixture:
    """Hooks on a base's denoiser that make its calls of branches. `tell` has to be asked before every drawing.

    `attachments` are by the names of the uses; a delta without (fused) acts in all branches. `deltas` are by their files.
    `networks` hear the same prompts. `remove` (idempotent) takes everything away.
    """

    def __init__(
        self,
        base: Base,
        stack: Stack,
        attachments: Mapping[str, Attachment],
        deltas: Mapping[str, Delta],
        networks: Sequence[nn.Module] = (),
    ) -> None:
        """Read masks and check words, then hook. Raises `DataError` and `DeltaError`."""
        self._base, self._stack, self._deltas = base, stack, deltas
        self._listeners = [base.denoiser, *networks]
        self._places = Places(stack)
        homes = {use.name: self._places.numbers[use.region] for use in stack.deltas if use.region}
        self._acting = Acting(attachments, homes)
        self._branches = branches_of(stack, [name for name, one in attachments.items() if one.delta.patches])
        self._read: dict[Key, _Read] = {}
        self._weights: Tensor | None = None
        self._wide: list[RemovableHandle] = []
        self.notices = [notice for place in range(len(self._places)) for notice in self._trial(place)]
        """What the user should know of words that get another token in a region."""
        self._hooks: list[RemovableHandle] = []
        self._hook()
        attends = stack.regional == "attention" and bool(stack.regions)
        self._attention = RegionalAttention(base.denoiser, self._places, self._acting) if attends else None

    def _hook(self) -> None:
        """Be the first that hears of a call, so that whatever else listens hears every branch, and the last that answers."""
        _remove(self._hooks)
        before = self._base.denoiser.register_forward_pre_hook(self._divide, with_kwargs=True, prepend=True)
        self._hooks = [before, self._base.denoiser.register_forward_hook(self._blend, always_call=True)]

    # --- prompts

    @torch.no_grad()
    def tell(self) -> dict[str, Tensor]:
        """Read the prompts, each with the words and text patches that act there alone; return how a stock pipeline is told."""
        read: dict[Key, _Read] = {}
        told: dict[str, Tensor] | None = None
        for place in range(len(self._places)):
            with self._words_at(place):
                for key in dict.fromkeys(self._key(b, place) for b in self._branches if place in b.places):
                    with self._acting.only(key[1]):
                        prompting = self._prompting(place)
                        blank = self._base.family.encode_prompt(self._base, [""], syntax=True).hidden
                    told = told or prompting
                    read[key] = _Read(*_conditions(prompting), blank)
        self._hear(read)
        self._hook()
        return cast("dict[str, Tensor]", told)

    def _prompting(self, place: int) -> dict[str, Tensor]:
        return self._base.family.prompting(self._base, self._places.prompts[place], self._stack.negative)

    def _key(self, branch: Branch, place: int) -> Key:
        return place, tuple(name for name in branch.deltas if self._acting.is_at(name, place))

    def _hear(self, read: Mapping[Key, _Read]) -> None:
        """Bring what was read to one length, and to one width where words have rows for each layer."""
        _remove(self._wide)
        tokens = max(one.positive.hidden.shape[1] for one in read.values())
        widths = tuple(embedding.embedding_dim for embedding in text_embeddings(self._base.pipe).values())
        wide = any(one.positive.hidden.shape[2] != sum(widths) for one in read.values())
        layers = cross_attentions(self._base.denoiser)
        if wide:
            numbers = {name: number for number, name in enumerate(layers)}
            self._wide = hook_cross_attentions(self._listeners, numbers, widths)
        self._read = {key: one.grown(tokens, len(layers) if wide else 0, widths) for key, one in read.items()}

    @contextmanager
    def _words_at(self, place: int) -> Generator[list[str]]:
        """Have a region's own words beside those that act everywhere, for a while; give what should be said of them."""
        uses = [use for use in self._stack.deltas if use.strength != 0.0]
        everywhere = {use.file for use in uses if not use.region}
        here = [use.file for use in uses if use.region and self._places.numbers[use.region] == place]
        brought = [(name, word) for name in here if name not in everywhere for word in self._deltas[name].words.values()]
        if not brought:
            yield []
            return
        with WordAttachment(self._base.pipe, [word for _, word in brought], rename=True) as words:
            pairs = zip(brought, words.rows, strict=True)
            yield [renamed(name, word.token, token) for (name, word), token in pairs if token != word.token]

    def _trial(self, place: int) -> list[str]:
        with self._words_at(place) as notices:
            return notices

    # --- calls

    def _divide(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Make every row of a call one for each branch (a forward pre-hook)."""
        if not self._read:
            raise ConfigError(
                "a stack with regions, or deltas that do not act all at once, whose prompts were not read",
                fix="tell the pipeline what Applied.prompting() returns",
            )
        told: dict[str, Any] = dict(signature(denoiser.forward).bind_partial(*args, **kwargs).arguments)
        noisy = cast(Tensor, told.pop("sample"))
        rows, latents = len(noisy), (noisy.shape[-2], noisy.shape[-1])
        branches, self._weights = self._chosen(told["timestep"], latents)
        self._acting.divide(branches, rows)
        told = _each(told, rows, len(branches))
        condition = self._condition(branches, 0, rows)
        hidden = cast(Tensor, told["encoder_hidden_states"])
        told["encoder_hidden_states"] = condition.hidden.to(hidden)
        if condition.pooled is not None:
            told["added_cond_kwargs"] = {**told["added_cond_kwargs"], "text_embeds": condition.pooled.to(hidden)}
        if self._attention is not None:
            others = [self._condition(branches, place, rows).hidden.to(hidden) for place in range(1, len(self._places))]
            self._attention.tell(others, latents)
        return (_each(noisy, rows, len(branches)),), told

    def _chosen(self, t: "Tensor | float", latents: tuple[int, int]) -> tuple[list[Branch], Tensor]:
        """Return the branches of a step and how much each counts where, (branches, 1, height, width)."""
        shares = self._places.shares(*latents)
        chosen: list[Branch] = []
        weights: list[Tensor] = []
        for places, group in groupby(self._branches, key=lambda branch: branch.places):
            share = shares[list(places)].sum(0)
            if not bool(share.any()):
                continue
            branches = list(group)
            awake = [b for b in branches if any(map(self._acting.is_awake, b.deltas))] or branches[:1]
            if self._stack.combine == "switch":
                awake = [awake[turn_of(*moment(self._base, t), len(awake))]]
            chosen += awake
            weights += [share / len(awake)] * len(awake)
        return chosen, torch.stack(weights)

    def _condition(self, branches: Sequence[Branch], number: int, rows: int) -> Condition:
        """Return what the rows of a call read at one place of their branches, by its number among these."""
        reads = [self._read[self._key(branch, branch.places[number])] for branch in branches]
        halves = [[read.positive for read in reads]]
        if guided(self._base):
            halves.insert(0, [read.negative for read in reads])
        return Condition.cat([one for half in halves for one in half * (rows // len(halves))])

    def _blend(self, denoiser: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Make one answer of the branches' (a forward hook); also after a failure, which has none."""
        weights, self._weights = self._weights, None
        self._acting.rest()
        if self._attention is not None:
            self._attention.tell((), (0, 0))
        if output is None or weights is None or len(weights) == 1:
            return None
        answers = cast(Tensor, output[0])
        blended = (answers.unflatten(0, (-1, len(weights))) * weights.to(answers.dtype).to(answers.device)).sum(1)
        return (blended, *output[1:]) if isinstance(output, tuple) else type(output)(blended)

    def remove(self) -> None:
        """Take the hooks away; calling it again does nothing."""
        self._acting.rest()
        if self._attention is not None:
            self._attention.remove()
        _remove(self._hooks)
        _remove(self._wide)


def _remove(hooks: list[RemovableHandle]) -> None:
    while hooks:
        hooks.pop().remove()


def _conditions(prompting: Mapping[str, Tensor]) -> tuple[Condition, Condition]:
    """Return prompt and negative as they are told to a stock pipeline; it takes zeros where it is told no negative."""
    hidden, pooled = prompting["prompt_embeds"], prompting.get("pooled_prompt_embeds")
    negative = prompting.get("negative_prompt_embeds", torch.zeros_like(hidden))
    summary = None if pooled is None else prompting.get("negative_pooled_prompt_embeds", torch.zeros_like(pooled))
    return Condition(hidden, pooled), Condition(negative, summary)


def _each(value: Any, rows: int, times: int) -> Any:
    """Return an argument of a call with each of its rows so many times in turn, whatever holds them."""
    if isinstance(value, Tensor):
        return value.repeat_interleave(times, 0) if value.dim() and len(value) == rows else value
    if isinstance(value, dict):
        return {key: _each(one, rows, times) for key, one in cast("dict[str, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        held = cast("list[Any]", value)
        return type(held)(_each(one, rows, times) for one in held)
    return value
