"""Pictures and prompts ready to train on: encoded once, drawn by turn."""

import random
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vgm_peft.data import (
    Crop,
    Encoded,
    Example,
    Order,
    View,
    bucket_ids,
    encode_images,
    encode_prompts,
    load_mask,
    orders,
    plan_views,
)
from vgm_peft.data.pictures import shown
from vgm_peft.errors import ConfigError, DataError
from vgm_peft.families import size_of
from vgm_peft.family import Condition
from vgm_peft.train.config import RunConfig
from vgm_peft.train.survey import framing
from vgm_peft.train.task import Setup, Turn
from vgm_peft.train.wording import Wording


@dataclass(frozen=True)
class Cut:
    """One way in which a picture is shown: where it is cut, and whether it is mirrored."""

    example: int
    crop: Crop
    flip: bool


@dataclass(frozen=True)
class Shown:
    """The pictures of one turn: latents (B, C, H, W) and sizes (B, 6) on the device, captions, and what is shown how."""

    x0: Tensor
    sizes: Tensor
    captions: tuple[str, ...]
    cuts: tuple[Cut, ...]
    mask: Tensor | None = None
    """Where the pictures count, (B, 1, H, W) float32 in 0 .. 1 on the device; present when `data.masks` asks for it."""

    def __len__(self) -> int:
        return len(self.captions)


class Pictures:
    """Examples through the VAE, in aspect buckets; `draw` is a pure function of the turn."""

    def __init__(self, examples: Sequence[Example], setup: Setup) -> None:
        """Plan how every picture is shown and encode it so, or find it in the cache."""
        data = setup.config.data
        self.examples, self.device, self.dropout = tuple(examples), setup.device, data.caption_dropout
        self.flips = (False, True) if data.flip else (False,)
        views = plan_views(examples, framing(setup.config, size_of(setup.base)))
        self.masks = {} if data.masks == "off" else _masks(_cuts(views, self.flips), examples, setup.base.latent_factor)
        self.views = [self._seen(view) for view in views] if self.masks else views
        self.encoded = _encoded(_cuts(self.views, self.flips), self.examples, setup)
        self.texts = tuple(orders(e.caption, data.caption_orders, data.keep_tokens) for e in self.examples)
        kept_back = held_out(len(self.examples), setup.config)
        self._trained = self._ordered(set(range(len(self.examples))) - kept_back, data.batch, setup.config.seed)
        self._held_out = self._ordered(kept_back, data.batch, setup.config.seed) if kept_back else self._trained

    def draw(self, turn: Turn) -> Shown:
        """Return the pictures of a turn: crops, mirrored copies, captions and the sample of the VAE's posterior are chosen."""
        generator = turn.generator("pictures")
        order, owner = self._held_out if turn.held_out else self._trained
        views = [self.views[owner[i]] for i in order.batch(turn.number)]
        flips = (torch.rand(len(views), generator=generator) < 0.5).tolist() if len(self.flips) > 1 else [False] * len(views)
        dropped = (torch.rand(len(views), generator=generator) < self.dropout).tolist()
        crops = _chosen([len(view.crops) for view in views], turn, "crops")
        cuts = tuple(Cut(v.example, v.crops[c], flip) for v, c, flip in zip(views, crops, flips, strict=True))
        posterior, sizes = Encoded.batch([self.encoded[cut] for cut in cuts])
        x0 = posterior.sample(torch.randn(posterior.mean.shape, generator=generator))
        texts = [self.texts[cut.example] for cut in cuts]
        picked = zip(texts, _chosen([len(t) for t in texts], turn, "captions"), dropped, strict=True)
        captions = tuple("" if drop else choices[number] for choices, number, drop in picked)
        mask = torch.stack([self.masks[cut] for cut in cuts]).float().div_(255).to(self.device) if self.masks else None
        return Shown(x0.to(self.device), sizes.to(self.device), captions, cuts, mask)

    def _ordered(self, examples: Set[int], batch: int, seed: int) -> tuple[Order, list[int]]:
        """The order in which views of these examples come up, and which view is meant by each number in it."""
        some = [(i, view.example) for i, view in enumerate(self.views) if view.example in examples]
        owner = [i for i, example in some for _ in range(self.examples[example].repeats)]  # one that counts several times
        buckets = bucket_ids([view.crops[0] for view in self.views])
        return Order(tuple(buckets[i] for i in owner), batch, seed), owner

    def _seen(self, view: View) -> View:
        """The view without the crops that show nothing of what its mask marks."""
        crops = tuple(crop for crop in view.crops if bool(self.masks[Cut(view.example, crop, False)].any()))
        if crops:
            return replace(view, crops=crops)
        example = self.examples[view.example]
        name = shown(example.path.name)
        what = f"{name} is transparent" if example.mask == example.path else f"the mask of {name} is black"
        raise DataError(f"{what} wherever it is trained", fix="give it another mask, or leave the picture out")

    def captions(self) -> list[str]:
        """Every different caption that can come up, the empty one included when captions are dropped."""
        return list(dict.fromkeys([*(text for texts in self.texts for text in texts), *([""] if self.dropout else [])]))


def held_out(count: int, config: RunConfig) -> frozenset[int]:
    """Which of `count` pictures are kept back from training. Raises `ConfigError` when none would be left."""
    wanted = config.held_out.pictures
    if wanted >= count:
        raise ConfigError(f"held_out.pictures = {wanted} of {count} pictures", expected="some to be left for training")
    return frozenset(random.Random(f"{config.seed}/held out").sample(range(count), wanted))


def _cuts(views: Sequence[View], flips: Sequence[bool]) -> list[Cut]:
    return list(dict.fromkeys(Cut(v.example, crop, flip) for flip in flips for v in views for crop in v.crops))


def _masks(cuts: Sequence[Cut], examples: Sequence[Example], factor: int) -> dict[Cut, Tensor]:
    """Where each picture counts when it is shown so, (1, H, W) uint8."""
    masks = {cut: load_mask(examples[cut.example], cut.crop, cut.flip, factor) for cut in cuts}
    return {cut: (mask * 255).round().to(torch.uint8) for cut, mask in masks.items()}


def _encoded(cuts: Sequence[Cut], examples: Sequence[Example], setup: Setup) -> dict[Cut, Encoded]:
    out: dict[Cut, Encoded] = {}
    with setup.progress("encoding pictures", len(cuts)) as tell:
        for flip in sorted({cut.flip for cut in cuts}):
            some = [cut for cut in cuts if cut.flip == flip]
            before = len(out)
            found = encode_images(
                setup.base,
                [examples[cut.example] for cut in some],
                [cut.crop for cut in some],
                setup.cache,
                flip=flip,
                progress=lambda done, _, before=before: tell(before + done, len(cuts)),
            )
            out |= zip(some, found, strict=True)
    return out


def _chosen(counts: Sequence[int], turn: Turn, purpose: str) -> list[int]:
    """One of so many for each, drawn from the turn where there is a choice."""
    if max(counts) == 1:
        return [0] * len(counts)
    rolls = torch.rand(len(counts), generator=turn.generator(purpose)).tolist()
    return [int(roll * count) for roll, count in zip(rolls, counts, strict=True)]


class Prompts:
    """Captions to conditions: encoded once for all, or at every call while a text encoder or a word in them is trained."""

    def __init__(self, captions: Iterable[str], setup: Setup, live: bool, wording: Wording | None = None) -> None:
        """Encode `captions`, unless all are to be encoded `live`, or those that a new word speaks in.

        Precedes attaching, or nothing could be cached.
        """
        self.base, self._wording = setup.base, wording
        fixed = [] if live else [c for c in captions if wording is None or not wording.speaks_in(c)]
        found = encode_prompts(setup.base, fixed, setup.cache) if fixed else {}
        self.live = live or wording is not None and bool(wording.words)
        self._known = {caption: condition.to(setup.device) for caption, condition in found.items()}

    def __call__(self, captions: Sequence[str]) -> Condition:
        """Return one row for each caption. Gradients flow where the encoding is live."""
        fresh = [caption for caption in captions if caption not in self._known]
        if len(fresh) == len(captions):
            return self.base.family.encode_prompt(self.base, captions)
        live = iter(self.base.family.encode_prompt(self.base, fresh).rows() if fresh else ())
        return Condition.cat([self._spread(self._known[c]) if c in self._known else next(live) for c in captions])

    def _spread(self, known: Condition) -> Condition:
        """What was encoded before the words were attached, as it is with them."""
        words = None if self._wording is None else self._wording.attachment
        return known if words is None else replace(known, hidden=words.spread(known.hidden))
