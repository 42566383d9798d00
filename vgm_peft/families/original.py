"""Single-file checkpoints in the original (LDM) layout: recognised by their tensors, converted by diffusers, offline.

diffusers reads such a file with the help of a configuration folder, which it would fetch from a hub. Here it is written
on the spot from the family's published layout; a folder of the checkpoint's name beside it (`model_index.json` and the
components' configurations, as in any diffusers folder) takes precedence, for bases of another make.
"""

import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from vgm_peft.errors import BaseModelError
from vgm_peft.families.index import family_of_folder
from vgm_peft.family import Family
from vgm_peft.folders import CONVERT, PICKLED, first_line, quiet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

UNET = "model.diffusion_model."


def load_file(families: Mapping[str, Family], path: Path, dtype: torch.dtype) -> "DiffusionPipeline":
    """Load a single-file checkpoint. Raises `BaseModelError` when it is none, or of no known family."""
    with configured(families, path) as (family, configuration):
        return _convert(family, path, configuration, dtype)


@contextmanager
def configured(families: Mapping[str, Family], path: Path) -> Generator[tuple[Family, Path]]:
    """Find the family of a single-file checkpoint, and a folder with its configurations; no weight is read."""
    if path.suffix in PICKLED:
        raise BaseModelError(f"{path}: pickled weights are never read", expected="a .safetensors file", fix=CONVERT)
    shapes, metadata = _header(path)
    beside = path.with_suffix("")
    if (beside / "model_index.json").is_file():
        yield family_of_folder(families, beside), beside
        return
    with tempfile.TemporaryDirectory() as folder:
        for family in families.values():
            if family.configure(shapes, metadata, Path(folder)):
                yield family, Path(folder)
                return
    raise BaseModelError(f"{path}: {_guess(shapes)}", expected="a whole checkpoint of one of " + ", ".join(families))


def _header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Read names and shapes of all tensors, and what the file says of itself; no weight is read."""
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
            if shapes.get("global_step") in ((), (1,)):
                metadata.setdefault("global_step", str(int(file.get_tensor("global_step"))))
    except FileNotFoundError:
        raise BaseModelError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise BaseModelError(
            f"{path}: cannot be read as safetensors ({first_line(error)})", fix="fetch or copy the file anew"
        ) from None
    return shapes, metadata


def _convert(family: Family, path: Path, configuration: Path, dtype: torch.dtype) -> "DiffusionPipeline":
    import diffusers

    build: Any = getattr(diffusers, family.pipelines[0])
    options = {"config": str(configuration), "dtype": dtype, "local_files_only": True, **family.loading}
    try:
        with quiet():
            return build.from_single_file(path, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise BaseModelError(
            f"{path}: looks like {family.name} but cannot be converted ({first_line(error)})",
            fix="give the model in diffusers' layout, or put a folder of its name with its configurations beside it",
        ) from error


def _guess(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Say what a file that is no checkpoint seems to be."""
    first = next(iter(shapes), "")
    if any("lora" in name or "lokr" in name or "hada" in name for name in shapes):
        return "this is a delta, not a base; give it as --delta"
    if first and not any(name.startswith(UNET) for name in shapes):
        return f"one part of a model only, or another layout (first tensor: {first})"
    return f"a checkpoint of another family (first tensor: {first})" if first else "an empty file"
