"""The eye of an image prompt: a frozen CLIP image encoder, found, checked, and shown pictures as it was taught to see them.

It is no part of any network that looks through it: never trained, counted or saved with one. A saved network remembers how
wide its encoder was and the digest of its files; a wrong encoder of the right width would be nonsense that no shape tells.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vgm_peft.digests import digest_of_files
from vgm_peft.errors import BaseModelError
from vgm_peft.family import Base
from vgm_peft.folders import HUB_ID, check_component, fetch_folder, first_line, quiet, read_json

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection

FOLDER = "image_encoder"
"""Where one lies in a base's folder and beside an adapter's file: the name that diffusers and the authors give it."""
ENCODER = "image_encoder"
"""Key of a file's metadata: of its encoder the widths, the digest of the weights, and the hub id if it has one, as JSON."""
PROCESSOR = "preprocessor_config.json"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels that CLIP was trained on."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Need:
    """What a network needs of its encoder: widths of the embedding and of the hidden states, 0 for any; the files' digest; and
    where it came from, if that was the hub."""

    embeds: int = 0
    states: int = 0
    digest: str = ""
    hub: str = ""

    @classmethod
    def told(cls, metadata: Mapping[str, str], embeds: int = 0, states: int = 0) -> "Need":
        """What a file with these metadata needs, of the widths that its tensors have; those of other tools tell no more."""
        try:
            said = json.loads(metadata.get(ENCODER, "{}"))
            return cls(embeds, states, str(said.get("sha256", "")), str(said.get("hub", "")))
        except (ValueError, AttributeError, RecursionError):
            return cls(embeds, states)

    def metadata(self) -> dict[str, str]:
        """What a file's metadata should say: under one key, for the library writes several in random order."""
        said = {"embeds": self.embeds, "hub": self.hub, "sha256": self.digest, "states": self.states}
        return {ENCODER: json.dumps(said)}

    def fits(self, found: "Need") -> bool:
        """Say whether an encoder has these widths."""
        return self.embeds in (0, found.embeds) and self.states in (0, found.states)


class Eye:
    """A frozen encoder. Not a module, so that a network that holds one neither trains nor saves it."""

    def __init__(
        self, encoder: "CLIPVisionModelWithProjection", told: Mapping[str, Any], digest: str = "", hub: str = ""
    ) -> None:
        """`told` may hold mean and deviation of the pixels, as a feature extractor's configuration does; else they are CLIP's.

        Raises `BaseModelError` for nonsense there.
        """
        self.encoder = encoder
        self.need = Need(*_widths(encoder.config), digest, hub)
        self.size: int = cast(Any, encoder.config).image_size
        self._mean, self._std = (_colours(told, n) or d for n, d in (("image_mean", MEAN), ("image_std", STD)))

    @torch.no_grad()
    def embeds(self, pictures: Tensor) -> Tensor:
        """Embed pictures (B, 3, P, Q) in 0 .. 1; return (B, `need.embeds`)."""
        return self.encoder(self.pixels(pictures)).image_embeds

    @torch.no_grad()
    def states(self, pictures: Tensor) -> Tensor:
        """Return the last hidden states but one of pictures in 0 .. 1, (B, T, `need.states`)."""
        return self._states(self.pixels(pictures))

    @property
    def no_embeds(self) -> Tensor:
        """The embedding (1, `need.embeds`) of no picture: zeros."""
        return torch.zeros(1, self.need.embeds, device=self.encoder.device, dtype=self.encoder.dtype)

    @cached_property
    def no_states(self) -> Tensor:
        """The hidden states (1, T, `need.states`) of no picture: pixels all zero after they were normalised, a flat grey."""
        with torch.no_grad():
            return self._states(torch.zeros(1, 3, self.size, self.size, device=self.encoder.device, dtype=self.encoder.dtype))

    def pixels(self, pictures: Tensor) -> Tensor:
        """Bring the shorter side to the encoder's size, cut the square in the middle, as CLIP and the authors do; normalise."""
        height, width = pictures.shape[-2:]
        short = min(height, width)
        if short != self.size:
            size = [self.size * side // short for side in (height, width)]
            pictures = interpolate(pictures, size, mode="bicubic", antialias=True).clamp(0.0, 1.0)
        top, left = ((side - self.size) // 2 for side in pictures.shape[-2:])
        square = pictures[..., top : top + self.size, left : left + self.size]
        mean, std = (square.new_tensor(v).view(1, 3, 1, 1) for v in (self._mean, self._std))
        return ((square - mean) / std).to(self.encoder.device, self.encoder.dtype)

    def _states(self, pixels: Tensor) -> Tensor:
        return cast(Any, self.encoder)(pixels, output_hidden_states=True).hidden_states[-2]


_open: "WeakValueDictionary[tuple[Path, torch.device, torch.dtype], Eye]" = WeakValueDictionary()
"""Encoders in use, so that several networks share one."""


def find_eye(base: Base, named: str = "", need: Need | None = None, near: Path | None = None) -> Eye:
    """Find the encoder for a base: the one that is `named` (a folder or a hub id), else what the pipeline holds, what lies
    in the base's folder, in the folder `near`, or among what was fetched from the hub before; of those that fit the `need`, the
    one with its digest.

    Raises `BaseModelError` when there is none, or none that fits.
    """
    need = need or Need()
    found = [folder_of(named)] if named else _places(base, near, need.hub)
    fitting = [place for place in found if need.fits(_need_of(place))]
    if not fitting:
        raise _none(found, need, near)
    same = [place for place in fitting if need.digest in ("", _digest(place) or need.digest)]
    if not same:
        _log.warning(
            "%s is not the image encoder that the network was trained with (another digest): what it sees may mean nothing",
            fitting[0],
        )
    place = (same or fitting)[0]
    if not isinstance(place, Path):
        processor: Any = getattr(base.pipe, "feature_extractor", None)
        return Eye(cast(Any, place), {} if processor is None else processor.to_dict())
    dtype = next(base.denoiser.parameters()).dtype
    hub = need.hub if not named else "" if Path(named).expanduser().is_dir() else named
    key = (place.resolve(), base.device, dtype)
    eye = _open.get(key)
    if eye is None:
        eye = _open[key] = _opened(place, base.device, dtype, hub)
    return eye


def folder_of(name: str) -> Path:
    """Return the folder of an encoder named by a folder, or by a hub id with folders behind it (fetched, or found again)."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    repository, inner = _split(name)
    patterns = [f"{inner}/{file}".lstrip("/") for file in ("config.json", PROCESSOR, "*.safetensors")]
    return fetch_folder(repository, patterns) / inner


def _split(name: str) -> tuple[str, str]:
    """A hub id and the folders behind it."""
    owner, _, rest = name.partition("/")
    model, _, inner = rest.partition("/")
    if not HUB_ID.fullmatch(f"{owner}/{model}") or ".." in inner.split("/"):
        raise BaseModelError(f'image encoder "{name}": no such folder', expected="one, or a hub id such as owner/name/folder")
    return f"{owner}/{model}", inner


def _fetched(name: str) -> list[Path]:
    """The folder of what was fetched from the hub before; a file that names something there has nothing fetched."""
    from huggingface_hub import try_to_load_from_cache

    try:
        repository, inner = _split(name)
        found = try_to_load_from_cache(repository, f"{inner}/config.json".lstrip("/"))
    except (BaseModelError, ValueError, OSError):
        return []
    return [Path(found).parent] if isinstance(found, str) else []


def _places(base: Base, near: Path | None, hub: str) -> list[Path | nn.Module]:
    """Where to look when none is named, the base's own first."""
    own: object = getattr(base.pipe, FOLDER, None)
    home: object = getattr(base.pipe, "name_or_path", None)
    folders = [Path(str(home)) / FOLDER] if home else []
    folders += [near / FOLDER] if near else []
    folders += _fetched(hub) if hub else []
    return [*([own] if isinstance(own, nn.Module) else []), *(f for f in folders if (f / "config.json").is_file())]


def _opened(folder: Path, device: torch.device, dtype: torch.dtype, hub: str) -> Eye:
    from transformers import CLIPVisionModelWithProjection

    check_component(folder)
    try:
        with quiet():
            build: Any = CLIPVisionModelWithProjection
            encoder, told = build.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BaseModelError(f"{folder}: cannot be loaded ({first_line(error)})", fix="fetch or copy it anew") from error
    if told["missing_keys"]:
        missing = sorted(told["missing_keys"])
        raise BaseModelError(f"{folder}: {len(missing)} tensors are missing (first: {missing[0]})", fix="fetch or copy it anew")
    processor = read_json(folder / PROCESSOR) if (folder / PROCESSOR).is_file() else {}
    return Eye(encoder.to(device).requires_grad_(False).eval(), processor, _digest(folder), hub)


def _colours(told: Mapping[str, Any], name: str) -> tuple[float, ...] | None:
    """Three numbers, for red, green and blue, where there are any."""
    values = told.get(name)
    if values is None:
        return None
    if not isinstance(values, list) or [type(v) for v in cast("list[object]", values)] != [float] * 3:
        raise BaseModelError(f"an image encoder's {name} is {values!r}"[:200], expected="three numbers")
    return tuple(cast("list[float]", values))


def _need_of(place: Path | nn.Module) -> Need:
    """The widths of an encoder, from its configuration alone."""
    from transformers import CLIPVisionConfig

    if isinstance(place, nn.Module):
        return Need(*_widths(place.config))
    try:
        return Need(*_widths(CLIPVisionConfig.from_pretrained(place, local_files_only=True)))
    except (OSError, ValueError, TypeError) as error:
        raise BaseModelError(f"{place}: no image encoder ({first_line(error)})", expected="a CLIP vision model") from error


def _widths(config: Any) -> tuple[int, int]:
    return int(getattr(config, "projection_dim", 0)), int(getattr(config, "hidden_size", 0))


def _digest(place: Path | nn.Module) -> str:
    """Of the files of one on disk; empty for one that is only in memory."""
    return "" if isinstance(place, nn.Module) else digest_of_files(sorted(place.glob("*.safetensors")))


def _none(found: Sequence[Path | nn.Module], need: Need, near: Path | None) -> BaseModelError:
    widths = [f"an embedding of {need.embeds}"] * bool(need.embeds) + [f"hidden states of {need.states}"] * bool(need.states)
    wanted = " with " + " and ".join(widths) if widths else ""
    if found:
        other = _need_of(found[0])
        what = f"the image encoder at hand has an embedding of {other.embeds} and hidden states of {other.states}"
    else:
        what = "this base has no image encoder"
    where = f"put its folder there as {near / FOLDER}" if near else "name its folder with --set task.encoder=DIR"
    return BaseModelError(what, expected=f"a CLIP vision model{wanted}", fix=f"{where}, or as {FOLDER} into the base's folder")
