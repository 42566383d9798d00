"""Feature networks of transformers: found by folder or hub id, read from safetensors alone, shown pictures as they know them.

No code of a model's own is run, and nothing is loaded by halves: transformers would fill what is missing at random.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as nf

from vgm_peft.digests import digest_of_files
from vgm_peft.errors import BaseModelError, ConfigError
from vgm_peft.folders import HUB_ID, check_component, fetch_config, fetch_folder, first_line, quiet, read_json
from vgm_peft.score import Common, Scorer

CONFIG, SHOWN = "config.json", "preprocessor_config.json"
FILES = ("*.json", "*.txt", "*.safetensors")
"""What is fetched and counts of a model: configurations, vocabularies, weights."""
TOGETHER = 16
"""Pictures that a network sees at once."""


@dataclass(frozen=True)
class Lens:
    """How pictures are shown: the short side `short` pixels long, of that the middle square of `side`, values normalised."""

    short: int
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, folder: Path, side: int, usual: tuple[tuple[float, ...], tuple[float, ...]]) -> Self:
        """As the model's folder says; where it does not, squares of `side` with the `usual` mean and deviation."""
        said = read_json(folder / SHOWN) if (folder / SHOWN).is_file() else {}
        mean, std = (said.get(key) or given for key, given in zip(("image_mean", "image_std"), usual, strict=True))
        try:
            short = _side(said.get("size"), side)
            crop = min(short, _side(said.get("crop_size"), short))
            lens = cls(short, crop, tuple(map(float, mean)), tuple(map(float, std)))
        except (TypeError, ValueError):
            lens = None
        if lens is None or lens.side < 1 or len(lens.mean) != 3 or len(lens.std) != 3 or min(lens.std) <= 0:
            raise BaseModelError(f"{folder / SHOWN}: cannot be made sense of", fix="fetch or copy the model anew")
        return lens

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pictures of any sizes as a network sees them, (B, 3, side, side) float32."""
        seen = np.stack([self._square(picture) for picture in pictures]).astype(np.float32) / 255.0
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (torch.from_numpy(seen).permute(0, 3, 1, 2) - mean) / std

    def _square(self, picture: Image.Image) -> "np.ndarray[Any, Any]":
        picture = picture.convert("RGB")
        width, height = (int(self.short * length / min(picture.size)) for length in picture.size)
        left, top = (width - self.side) // 2, (height - self.side) // 2
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(resized.crop((left, top, left + self.side, top + self.side)))


def _side(said: object, usual: int) -> int:
    """A length in pixels as processors' configurations spell it: a number, or a table of one or two equal ones."""
    if isinstance(said, Mapping):
        said = next(iter(cast(Mapping[str, object], said).values()), None)
    return usual if said is None else int(cast(int, said))


class FeatureScorer(Scorer):
    """What the scorers of this room share: a frozen network in float32, and the lens through which it sees."""

    kinds: ClassVar[Mapping[str, str]]
    """`model_type` -> class of transformers."""
    example: ClassVar[str]
    """A model of this kind that is often used."""
    usual: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]]
    """Mean and deviation of the values with which such networks were trained."""
    spare: ClassVar[tuple[str, ...]] = ()
    """What names of tensors begin with that play no part and may be missing."""

    def __init__(self, folder: Path) -> None:
        """Load what a checked folder holds. Raises `BaseModelError`."""
        self.network = self._network(folder)
        config = cast(Any, self.network).config
        self.lens = Lens.of(folder, int(getattr(config, "vision_config", config).image_size), self.usual)
        self.digest = digest_of_files(sorted(path for pattern in FILES for path in folder.glob(pattern)))
        try:
            self.look([Image.new("RGB", (self.lens.side, self.lens.side))])
        except (ValueError, RuntimeError) as error:  # better now than at the first measurement
            raise BaseModelError(f"{folder}: network and {SHOWN} do not fit ({first_line(error)})") from error

    @classmethod
    def load(cls, model: str) -> Self:
        """Load a folder or hub id. Raises `ConfigError` when none is named, `BaseModelError` for one of the wrong kind."""
        if not model:
            raise ConfigError(
                f"no model is named to score by {cls.name}", fix=f'--set scores.model="{cls.example}", or a folder'
            )
        folder = Path(model).expanduser()
        if folder.is_dir():
            return cls(cls._checked(folder))
        if not HUB_ID.fullmatch(model):
            raise BaseModelError(f'scores.model "{model}": no such folder', expected=f"a folder or a hub id ({cls.example})")
        cls._kind(fetch_config(model, CONFIG))  # of the right kind, before its weights are fetched
        return cls(cls._checked(fetch_folder(model, FILES)))

    @classmethod
    def _checked(cls, folder: Path) -> Path:
        check_component(folder)
        cls._kind(folder / CONFIG)
        return folder

    @classmethod
    def _kind(cls, config: Path) -> str:
        """The class of transformers that a configuration names. Raises `BaseModelError` for any but those of `kinds`."""
        kind = str(read_json(config).get("model_type", ""))
        if kind not in cls.kinds:
            known = " or ".join(cls.kinds)
            raise BaseModelError(f"{config}: a model of type {kind!r}", expected=known, fix=f"for example {cls.example}")
        return cls.kinds[kind]

    @classmethod
    def _network(cls, folder: Path) -> nn.Module:
        import transformers

        made: Any = getattr(transformers, cls._kind(folder / CONFIG))
        options = {"use_safetensors": True, "local_files_only": True, "dtype": torch.float32, "output_loading_info": True}
        try:
            with quiet():
                network, found = made.from_pretrained(folder, **options)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise BaseModelError(f"{folder}: cannot be loaded ({first_line(error)})", fix="fetch or copy it anew") from error
        missing = sorted(name for name in found["missing_keys"] if not name.startswith(cls.spare or "\0"))
        if missing:
            what = f"{len(missing)} tensors of {type(network).__name__} are missing (first: {missing[0]})"
            raise BaseModelError(f"{folder}: {what}", fix="fetch or copy it anew")
        return cast(nn.Module, network).requires_grad_(False).eval()

    def to(self, device: torch.device | str) -> None:
        """Move the network."""
        self.network.to(device)

    @torch.no_grad()
    def look(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (B, D) of pictures, on the CPU."""
        device = next(self.network.parameters()).device
        groups = [pictures[i : i + TOGETHER] for i in range(0, len(pictures), TOGETHER)]
        return torch.cat([nf.normalize(self.features(self.lens(group).to(device)), dim=-1).cpu() for group in groups])

    def features(self, pixels: Tensor) -> Tensor:
        """Features (B, D) of pictures as the lens shows them."""
        raise NotImplementedError

    def likeness(self, pictures: Sequence[Image.Image], references: Sequence[Image.Image], of: Common) -> Tensor:
        """The mean cosine with the references, as DreamBooth measures it (arXiv 2208.12242, section 4.2); below 0 is 0."""
        return (self.look(pictures) @ self.look(references).T).mean(1).clamp(0.0, 1.0)
