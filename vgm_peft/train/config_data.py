"""`[data]` and `[[concept]]`: which pictures a run learns from, and how they become batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vgm_peft.errors import ConfigError
from vgm_peft.train.limits import within


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """`[data]`: the pictures and how they become batches."""

    images: str = ""
    """The folder of pictures; captions stand beside them in `.txt` files or in `metadata.jsonl`."""
    resolution: int = 0
    """Side in pixels of the square whose area every bucket keeps; 0 is the size that the base was made for."""
    more_resolutions: tuple[int, ...] = ()
    """Further sides at which every picture is shown as well; one too small for a side is shown at the next smaller again."""
    buckets: bool = True
    """Sort pictures by aspect into buckets of about the same area; off: one square, centre crop."""
    crops: int = 1
    """Places at which each picture is cut; a turn takes one of them. 1 is the centre. All are cached."""
    zoom: float = 1.0
    """By how much the further crops may be enlarged first, never beyond the picture's own pixels; 1 .. 4."""
    batch: int = 1
    """Pictures per micro-batch and process."""
    flip: bool = False
    """Mirror pictures at random. Off by default: text, faces and logos suffer."""
    masks: Literal["off", "files", "alpha"] = "off"
    """Where pictures count: `files` are white there (`masks/NAME`, or `mask` in metadata.jsonl), `alpha` is their own
    transparency."""
    annotator: str = ""
    """Side networks: what computes the control pictures from the pictures, in place of control pictures beside them; several,
    between commas, for one that reads as many conditions."""
    annotator_weights: str = ""
    """Its weights, a folder or hub id, where it has any; left out: its authors' on the hub."""
    trigger: str = ""
    """A word that every caption begins with; put there where the caption does not hold it."""
    caption_dropout: float = 0.0
    """Share of captions replaced by the empty one, 0 .. 1, which keeps guidance working in long runs (0.1 is usual)."""
    control_dropout: float = 0.0
    """Share of pictures that what steers them is kept from, 0 .. 1, so that guidance grows strong by it (IP-Adapters)."""
    both_dropout: float | None = None
    """Share of pictures that lose caption and what steers them together, part of both shares; left out: their product."""
    caption_orders: int = 1
    """In how many orders the tags of a caption (between commas) are shown, 8 being plenty; 1 is as written. All are cached."""
    keep_tokens: int = 0
    """Tags at the start of a caption that stay there whatever the order, the trigger not counted."""
    allow: tuple[str, ...] = ()
    """Kinds of faults in the pictures to go on in spite of; see `vgm-train --help`."""
    cache_gib: float | None = None
    """Largest size in GiB of the cache that all runs share; left out: what VGM_CACHE_GIB says, else 50."""

    def __post_init__(self) -> None:
        within("resolution", self.resolution, 0, 16384)
        for side in self.more_resolutions:
            within("more_resolutions", side, 1, 16384)
        within("crops", self.crops, 1, 64)
        within("zoom", self.zoom, 1.0, 4.0)
        within("batch", self.batch, 1, 65536)
        within("caption_dropout", self.caption_dropout, 0.0, 1.0)
        within("control_dropout", self.control_dropout, 0.0, 1.0)
        if self.both_dropout is not None:
            fewest = max(0.0, self.caption_dropout + self.control_dropout - 1.0)
            within("both_dropout", self.both_dropout, fewest, min(self.caption_dropout, self.control_dropout))
        within("caption_orders", self.caption_orders, 1, 256)
        within("keep_tokens", self.keep_tokens, 0, 1000)
        within("cache_gib", 1.0 if self.cache_gib is None else self.cache_gib, 1e-6, 1e9)
        if self.zoom > 1 and self.crops == 1:
            raise ConfigError(f"zoom = {self.zoom} without further crops", expected="crops of 2 or more", fix="crops = 4")
        if self.keep_tokens and self.caption_orders == 1:
            raise ConfigError(f"keep_tokens = {self.keep_tokens}, but captions keep their order", fix="caption_orders = 8")
        if self.annotator:
            from vgm_peft.annotate import check_name, names_in

            for name in names_in(self.annotator):
                check_name(name)
        elif self.annotator_weights:
            raise ConfigError(f'annotator_weights = "{self.annotator_weights}" without an annotator', fix='annotator = "depth"')
        if self.allow:
            from vgm_peft.data.faults import check_kinds

            check_kinds(self.allow)


@dataclass(frozen=True, kw_only=True)
class ConceptConfig:
    """`[[concept]]`: one of several things that a run learns together, each from a folder of its own."""

    images: str
    """The folder of its pictures."""
    token: str = ""
    """The word that comes to mean it; left out: that of `[task]`, or `data.trigger`."""
    class_prompt: str = ""
    """DreamBooth: what kind of thing it is; left out: that of `[task]`."""
    prompt: str = ""
    """The text of its pictures that have no caption of their own."""
    repeats: int = 1
    """How often each of its pictures comes up while another's comes up once."""

    def __post_init__(self) -> None:
        within("repeats", self.repeats, 1, 10_000)
        if not self.images:
            raise ConfigError("no pictures are named", expected="images = DIR")


def check_concepts(concepts: Sequence[ConceptConfig], images: str) -> None:
    """Raise `ConfigError` for folders named twice, or in two places."""
    if concepts and images:
        raise ConfigError(
            f'both data.images = "{images}" and [[concept]] name pictures', fix="name each folder in a [[concept]] of its own"
        )
    folders = [Path(concept.images).resolve() for concept in concepts]
    twice = next((c.images for c, folder in zip(concepts, folders, strict=True) if folders.count(folder) > 1), None)
    if twice:
        raise ConfigError(f"two concepts have the same images, {twice}", fix="keep one, and give it repeats")
