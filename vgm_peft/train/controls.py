"""What steers the pictures of a run: a picture of its own beside each, one computed from it, or the picture itself.

Control pictures are computed of what is shown, at the size at which it is shown, as they will be when a network is used; and
only once: the cache keys them by the bytes of the picture and by all that decides what an annotator makes of it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from vgm_peft.annotate import Annotator, names_in, open_annotator
from vgm_peft.data import Cache, Crop, Example, load_control, load_pixels
from vgm_peft.data.cache import key_of
from vgm_peft.data.encode import code_version
from vgm_peft.train.pictures import Cut, Pictures
from vgm_peft.train.task import Setup

KEPT_BYTES = 2**30
"""Control pictures kept in memory, 8 bits a value; what does not fit is read from its file at every turn."""


class Controls:
    """What steers each picture, cut and mirrored like it."""

    def __init__(self, pictures: Pictures, paired: bool, setup: Setup, conditions: int = 1) -> None:
        """Compute what has to be computed. Raises `ConfigError` or `DataError` for an annotator that cannot be had."""
        data = setup.config.data
        names = names_in(data.annotator) if data.annotator else []
        self.annotators = [open_annotator(name, data.annotator_weights, str(setup.device)) for name in names]
        self._examples, self._paired, self._conditions = pictures.examples, paired, conditions
        self._cache = setup.cache
        self._kept: dict[tuple[int, Crop], Tensor] = {}
        if self.annotators:
            self._compute(pictures, setup)

    def __call__(self, cut: Cut) -> Tensor:
        """Return what steers a picture, (3 n, P, Q) uint8 for n conditions."""
        place = (cut.example, cut.crop)
        found = self._kept.get(place)
        if found is None:
            found = self._read(self._examples[cut.example], cut.crop)
            if (len(self._kept) + 1) * found.numel() <= KEPT_BYTES:
                self._kept[place] = found
        return found.flip(-1) if cut.flip else found

    def facts(self) -> Mapping[str, str]:
        """For the manifest: what computed the control pictures."""
        return {"annotator": "; ".join(f"{a.name} {a.identity}" for a in self.annotators)} if self.annotators else {}

    def _compute(self, pictures: Pictures, setup: Setup) -> None:
        cuts = list(dict.fromkeys(Cut(view.example, crop, False) for view in pictures.views for crop in view.crops))
        with setup.progress("computing control pictures", len(cuts)) as tell:
            for done, cut in enumerate(cuts, 1):
                self(cut)
                tell(done, len(cuts))

    def _read(self, example: Example, crop: Crop) -> Tensor:
        if self.annotators:
            return torch.cat([annotated(example, crop, annotator, self._cache) for annotator in self.annotators])
        return _bytes(load_control(example, crop, count=self._conditions)) if self._paired else _shown(example, crop)


def annotated(example: Example, crop: Crop, annotator: Annotator, cache: Cache) -> Tensor:
    """Return what an annotator makes of a picture as it is cut, (3, P, Q) uint8, from the cache where it has been made."""
    place = (*crop.scaled, *crop.sizes())
    key = key_of("control", code_version(), example.digest, *place, annotator.name, annotator.identity)
    shape = (3, crop.target[1], crop.target[0])
    found = cache.get(key, lambda entry: "control" in entry and entry["control"].shape == shape)
    if found is None:
        drawn = annotator(_shown(example, crop).permute(1, 2, 0).contiguous().numpy())
        found = {"control": torch.from_numpy(drawn).permute(2, 0, 1).contiguous()}
        cache.put(key, found)
    return found["control"]


def _shown(example: Example, crop: Crop) -> Tensor:
    return _bytes((load_pixels(example, crop) + 1.0) / 2.0)


def _bytes(values: Tensor) -> Tensor:
    return (values * 255.0).round().to(torch.uint8)
