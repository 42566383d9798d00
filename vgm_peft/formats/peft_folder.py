"""Writing peft's adapters: a folder for every part, with `adapter_model.safetensors` and `adapter_config.json`.

`PeftModel.from_pretrained(pipe.unet, "OUT/unet")` loads one. A module is `base_model.model.<path>` and then the suffix of its
kind. A part whose changes are all of one of peft's kinds is an adapter of that (`peft_kinds`), any other one of LoRAs or DoRAs:
`lora_A.weight`, `lora_B.weight` and, of a DoRA, `lora_magnitude_vector`, scales in `lora_B`: every alpha is its layer's rank.
What differs from the commonest goes by a pattern, which peft matches from the end of a path, so patterns are whole paths.
"""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from vgm_peft.delta import Delta, Patch
from vgm_peft.family import Base
from vgm_peft.formats import embedding
from vgm_peft.formats.books import book_of, family_book
from vgm_peft.formats.diffusers import check_place, folded, magnitude_vector
from vgm_peft.formats.format import Parcel
from vgm_peft.formats.names import DOWN, MAGNITUDE, UP
from vgm_peft.formats.paths import path_in, wrappers
from vgm_peft.formats.peft_kinds import Adapter, adapter_of, by_name
from vgm_peft.formats.vocabulary import Suffixes, convert, pack_all

ROOT, SHARED = "base_model.model.", "base_model."
"""What is before the name of a tensor of a layer, and before that of one that all layers share."""
MODEL, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAMES: Mapping[str, str] = {DOWN: "lora_A.weight", UP: "lora_B.weight", MAGNITUDE: "lora_magnitude_vector"}


def spell(delta: Delta, base: Base | None = None, dtype: torch.dtype | None = None) -> dict[str, Parcel]:
    """Spell a delta as the files of a folder: `PART/adapter_model.safetensors` with its configuration, tokens beside them."""
    words = embedding.parcels(delta, dtype, plain=True)
    wrapper = wrappers(delta, base)
    book = book_of(base) if base is not None else family_book(delta.family)
    parts: dict[str, dict[str, Patch]] = {}
    for patch in delta:
        site = patch.site
        parts.setdefault(site.part, {})[path_in(site.module, wrapper[site.part])] = patch
    adapters = {part: adapter_of(patches, book) or _low_rank(delta.family, patches, base) for part, patches in parts.items()}
    files = {f"{part}/{MODEL}": _parcel(adapter, dtype) for part, adapter in adapters.items()}
    return {**files, **{f"{ending.lstrip('.')}.safetensors": parcel for ending, parcel in words.items()}}


def _low_rank(family: str, patches: Mapping[str, Patch], base: Base | None) -> Adapter:
    """Return an adapter of LoRAs or DoRAs. Raises `DeltaError` for other kinds."""
    part = Delta(family, {patch.site.name: patch for patch in patches.values()})
    packed = pack_all(part, base)
    check_place("peft", part, packed)
    modules: dict[str, Suffixes] = {}
    for (path, patch), suffixes in zip(patches.items(), packed, strict=True):
        down, up = folded(suffixes)
        more = {NAMES[MAGNITUDE]: magnitude_vector(patch.site, suffixes)} if MAGNITUDE in suffixes else {}
        modules[path] = {NAMES[DOWN]: down, NAMES[UP]: up, **more}
    rank, others = by_name({path: len(tensors[NAMES[DOWN]]) for path, tensors in modules.items()})
    settings = {"bias": "none", "r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others}
    return Adapter("LORA", modules, {**settings, "use_dora": any(NAMES[MAGNITUDE] in found for found in modules.values())})


def _parcel(adapter: Adapter, dtype: torch.dtype | None) -> Parcel:
    tensors: dict[str, Tensor] = {f"{SHARED}{name}": tensor for name, tensor in adapter.shared.items()}
    tensors |= {f"{ROOT}{path}.{name}": value for path, found in adapter.tensors.items() for name, value in found.items()}
    about = {"peft_type": adapter.kind, "inference_mode": True, "target_modules": sorted(adapter.tensors)}
    config = json.dumps({**about, **adapter.settings}, indent=2, sort_keys=True) + "\n"
    return Parcel(convert(tensors, dtype), {"format": "pt"}, {CONFIG: config})
