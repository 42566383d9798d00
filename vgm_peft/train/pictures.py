"""Pictures and prompts ready to train on: encoded once, drawn by turn."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vgm_peft.data import (
    Crop,
    Encoded,
    Example,
    Order,
    bucket_ids,
    encode_images,
    encode_prompts,
    pixel_step,
    plan_crops,
)
from vgm_peft.family import Condition
from vgm_peft.train.task import Setup, Turn


@dataclass(frozen=True)
class Shown:
    """The pictures of one turn: latents (B, C, H, W) and sizes (B, 6) on the device, captions, and which examples they are."""

    x0: Tensor
    sizes: Tensor
    captions: tuple[str, ...]
    indices: tuple[int, ...]
    flipped: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.captions)


class Pictures:
    """Examples through the VAE, in aspect buckets; `draw` is a pure function of the turn."""

    def __init__(self, examples: Sequence[Example], setup: Setup) -> None:
        """Plan the crops and encode every picture, or find it in the cache."""
        data, base = setup.config.data, setup.base
        resolution = data.resolution or base.resolution
        sizes = [(e.width, e.height) for e in examples]
        self.examples, self.device = tuple(examples), setup.device
        self.crops: list[Crop] = plan_crops(sizes, resolution, pixel_step(base), square=not data.buckets)
        with setup.progress("encoding pictures", len(examples)) as tell:
            sides = [
                encode_images(base, examples, self.crops, setup.cache, flip=flip, progress=tell)
                for flip in ((False, True) if data.flip else (False,))
            ]
        self.encoded: list[tuple[Encoded, ...]] = list(zip(*sides, strict=True))
        self.flip, self.dropout = data.flip, data.caption_dropout
        # An example that counts several times is in the order several times.
        self._owner = [i for i, e in enumerate(examples) for _ in range(e.repeats)]
        buckets = bucket_ids(self.crops)
        self.order = Order(tuple(buckets[i] for i in self._owner), data.batch, setup.config.seed)

    def draw(self, turn: Turn) -> Shown:
        """Return the pictures of a turn; the VAE's posterior is sampled, mirrored copies and dropped captions are chosen."""
        generator = turn.generator("pictures")
        indices = [self._owner[i] for i in self.order.batch(turn.number)]
        flips = (torch.rand(len(indices), generator=generator) < 0.5).tolist() if self.flip else [False] * len(indices)
        dropped = (torch.rand(len(indices), generator=generator) < self.dropout).tolist()
        posterior, sizes = Encoded.batch([self.encoded[i][flip] for i, flip in zip(indices, flips, strict=True)])
        x0 = posterior.sample(torch.randn(posterior.mean.shape, generator=generator))
        captions = tuple("" if drop else self.examples[i].caption for i, drop in zip(indices, dropped, strict=True))
        return Shown(x0.to(self.device), sizes.to(self.device), captions, tuple(indices), tuple(flips))

    def captions(self) -> list[str]:
        """Every different caption, the empty one included when captions are dropped."""
        return list(dict.fromkeys([*(e.caption for e in self.examples), *([""] if self.dropout else [])]))


class Prompts:
    """Captions to conditions: encoded once for all, or at every call while a text encoder or a word is trained."""

    def __init__(self, captions: Iterable[str], setup: Setup, live: bool) -> None:
        """Encode `captions`, unless they are to be encoded `live`. Precedes attaching, or nothing could be cached."""
        self.base, self.live = setup.base, live
        found = {} if self.live else encode_prompts(setup.base, captions, setup.cache)
        self._known = {caption: condition.to(setup.device) for caption, condition in found.items()}

    def __call__(self, captions: Sequence[str]) -> Condition:
        """Return one row for each caption. Gradients flow where the encoding is live."""
        if self.live:
            return self.base.family.encode_prompt(self.base, captions)
        return Condition.cat([self._known[caption] for caption in captions])
