"""Where a delta's sites are in ComfyUI's models, which carry the names of the original (LDM) code.

The denoiser is `diffusion_model` with the original block names; text encoders are `clip_l`, `clip_g` and `clip_h`, inside with
the names of transformers.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass

from vgm_peft.delta import Delta, Patch
from vgm_peft.errors import DeltaError
from vgm_peft.formats.books import family_book
from vgm_peft.spelling import unet_spellings

DENOISER = "diffusion_model"
ENCODERS = {"text_encoder": ("clip_l", "clip_h"), "text_encoder_2": ("clip_g",)}


@dataclass(frozen=True)
class Placed:
    """A patch, and the name of its tensor in a state dict of ComfyUI's."""

    patch: Patch
    key: str


def place(delta: Delta, denoiser: Container[str], encoders: Container[str]) -> tuple[list[Placed], list[Placed]]:
    """Find every patch in the state dicts of the denoiser and of the text encoders.

    Raises `DeltaError` when one has no place: half a delta is none.
    """
    book = family_book(delta.family)
    names = unet_spellings(module for part, module in book.sites if part == book.family.denoiser)
    unet: list[Placed] = []
    texts: list[Placed] = []
    lost: list[str] = []
    for patch in delta:
        site = patch.site
        if site.part in ENCODERS:
            found = _first(_text_keys(site.part, site.module, site.tensor), encoders)
            home = texts
        else:
            found = _first((f"{DENOISER}.{names.get(site.module, site.module)}.{site.tensor}",), denoiser)
            home = unet
        if found is None:
            lost.append(site.name)
        else:
            home.append(Placed(patch, found))
    if lost:
        raise DeltaError(
            f"{len(lost)} of {len(delta.patches)} changes have no place in this model (the first: {lost[0]})",
            expected=f"a checkpoint of {delta.family}",
        )
    return unet, texts


def _text_keys(part: str, module: str, tensor: str) -> Iterable[str]:
    inner = module if module.startswith("text_projection") else f"text_model.{module}"
    return (f"{encoder}.transformer.{inner}.{tensor}" for encoder in ENCODERS[part])


def _first(keys: Iterable[str], stored: Container[str]) -> str | None:
    return next((key for key in keys if key in stored), None)
