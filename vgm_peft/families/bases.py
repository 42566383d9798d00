"""Loading a base model by what the user calls it: the embedded one, a diffusers folder, a single file, a hub id.

All four end in the same place: a stock text-to-image pipeline of a known family, its weights read from safetensors
only. Whatever a folder or file says of itself is checked before any class that it names is touched.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from vgm_peft.digests import digest_of_files
from vgm_peft.errors import BaseModelError
from vgm_peft.families.index import family_of_folder, family_of_index
from vgm_peft.families.original import load_file
from vgm_peft.family import Base, Family
from vgm_peft.folders import HUB_ID, PICKLED, check_whole, fetch_config, first_line, quiet, read_json

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TOYBOX = "toybox"
SAMPLING = "sampling.json"
"""In a diffusers folder: how this base draws best, `{"guidance": 2.0}`. Ours to write and read; others pass it over."""


def toybox_folder() -> Path:
    """Return the folder of the embedded base: the checkout's, else the installed package's. Raises `BaseModelError`."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package.parent / "assets" / TOYBOX, package / "assets" / TOYBOX):
        if (folder / "model_index.json").is_file():
            return folder
    raise BaseModelError(
        "the embedded base (toybox) is not in this installation",
        expected="assets/toybox beside or inside the package",
        fix="reinstall, or train it: python -m vgm_peft.toybox train-base",
    )


def load_base(
    families: Mapping[str, Family], source: str | Path, dtype: torch.dtype, device: "torch.device | str", digest: bool
) -> Base:
    """Load a base of one of `families`, frozen; see `families.load`."""
    name, guidance = str(source), None
    path = toybox_folder() if name == TOYBOX else Path(source).expanduser()
    if path.is_file() or path.suffix in (*PICKLED, ".safetensors"):
        pipe, files = load_file(families, path, dtype), [path]
    else:
        if not path.is_dir():
            path = _download(families, name)
        family = family_of_folder(families, path)
        pipe = _from_pretrained(family, path, dtype, _variant(path / family.denoiser))
        files, guidance = _loaded_files(pipe, path), own_guidance(path)
    _check_whole(pipe, files)
    family = next((f for f in families.values() if f.recognises(pipe)), None)
    if family is None:
        raise BaseModelError(f"{name}: a {type(pipe).__name__} of another make", expected="one of " + ", ".join(families))
    if torch.device(device) != pipe.device:  # diffusers scolds any move of a float16 pipeline to the CPU
        pipe.to(device)
    base = Base(pipe, family, name, digest_of_files(files) if digest else "", guidance)
    channels = cast(Any, base.denoiser).config.in_channels
    if channels != cast(Any, pipe).vae.config.latent_channels:
        raise BaseModelError(
            f"{name}: its denoiser reads {channels} channels",
            expected="as many as a latent has; inpainting models are no bases",
        )
    return base.freeze()


def own_guidance(folder: Path) -> float | None:
    """The guidance that a base's folder asks for, if it says. Raises `BaseModelError` for nonsense."""
    path = folder / SAMPLING
    if not path.is_file() or (value := read_json(path).get("guidance")) is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 100.0:
        raise BaseModelError(f"{path}: guidance = {value!r}", expected="a number, 0 .. 100", fix="mend or delete the file")
    return float(value)


def _from_pretrained(family: Family, folder: Path, dtype: torch.dtype, variant: str | None) -> "DiffusionPipeline":
    import diffusers

    build: Any = getattr(diffusers, family.pipelines[0])
    options = {"dtype": dtype, "variant": variant, "use_safetensors": True, "local_files_only": True, **family.loading}
    try:
        with quiet():
            return build.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(
            f"{folder}: cannot be loaded ({first_line(error)})", fix="fetch or copy the folder anew"
        ) from error


def _check_whole(pipe: "DiffusionPipeline", files: list[Path]) -> None:
    """Refuse a pipeline of which the files hold only a part. Raises `BaseModelError`."""
    for name, network in pipe.components.items():
        weights = [path for path in files if path.suffix == ".safetensors" and path.parent.name == name]
        if isinstance(network, nn.Module):
            check_whole(network, weights[0] if weights else files[0], _names(weights) if name.startswith("text") else None)


def _names(weights: list[Path]) -> set[str] | None:
    """Names of all tensors in a component's files; None for what came out of a single file under other names."""
    found: set[str] = set()
    for path in weights:
        with safe_open(path, "pt") as file:
            found |= set(file.keys())
    return found or None


def _variant(folder: Path) -> str | None:
    """Say `fp16` where a component has no other weights; diffusers then wants to be told."""
    names = [path.name for path in folder.glob("*.safetensors")]
    return "fp16" if names and all(".fp16" in name for name in names) else None


def _download(families: Mapping[str, Family], name: str) -> Path:
    """Bring a hub model into the local cache, safetensors only, and return its folder; what it is is judged first."""
    if not HUB_ID.fullmatch(name):
        raise BaseModelError(
            f'base "{name}": no such file or folder',
            expected="toybox, a diffusers folder, a .safetensors file, or a hub id (stabilityai/stable-diffusion-xl-base-1.0)",
        )
    import diffusers

    family = family_of_index(families, read_json(fetch_config(name)), Path(name))
    build: Any = getattr(diffusers, family.pipelines[0])
    try:
        return Path(build.download(name, use_safetensors=True, **family.loading))
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"{name}: cannot be fetched whole ({first_line(error)})",
            expected="a model with .safetensors weights",
            fix="try again; what has been fetched is kept",
        ) from error


def _loaded_files(pipe: "DiffusionPipeline", folder: Path) -> list[Path]:
    """The files that made a pipeline: weights, configurations and vocabularies of the components it really has."""
    files: list[Path] = []
    for name, component in sorted(pipe.components.items()):
        here = folder / name
        variant = _variant(here)
        for path in sorted(here.glob("*")) if component is not None and here.is_dir() else []:
            kept = path.suffix in (".json", ".txt") or (
                path.suffix == ".safetensors" and "non_ema" not in path.name and (".fp16" in path.name) == (variant == "fp16")
            )
            if kept:
                files.append(path)
    return files
