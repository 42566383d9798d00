"""Writing peft's adapters: a folder for every part, with `adapter_model.safetensors` and `adapter_config.json`. LoRA and DoRA.

`PeftModel.from_pretrained(pipe.unet, "OUT/unet")` loads one. A module is `base_model.model.<path>` and then `lora_A.weight`,
`lora_B.weight` and, of a DoRA, `lora_magnitude_vector`. Scales are in `lora_B`: every alpha is its layer's rank. Ranks other
than the commonest go by a pattern, which peft matches from the end of a path, so patterns are whole paths. The other kinds that
peft knows are one kind to an adapter; what of them is a LoRA of some rank is written as that (`plan`).
"""

import json
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from vgm_peft.delta import Delta
from vgm_peft.family import Base
from vgm_peft.formats import embedding
from vgm_peft.formats.diffusers import check_place, folded, magnitude_vector
from vgm_peft.formats.format import Parcel
from vgm_peft.formats.names import DOWN, MAGNITUDE, UP
from vgm_peft.formats.paths import path_in, wrappers
from vgm_peft.formats.vocabulary import Suffixes, convert, pack_all

ROOT = "base_model.model."
MODEL, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAMES: Mapping[str, str] = {DOWN: "lora_A.weight", UP: "lora_B.weight", MAGNITUDE: "lora_magnitude_vector"}


def spell(delta: Delta, base: Base | None = None, dtype: torch.dtype | None = None) -> dict[str, Parcel]:
    """Spell a delta as the files of a folder: `PART/adapter_model.safetensors` with its configuration, tokens beside them."""
    words = embedding.parcels(delta, dtype, plain=True)
    packed = pack_all(delta, base)
    check_place("peft", delta, packed)
    wrapper = wrappers(delta, base)
    parts: dict[str, dict[str, Suffixes]] = {}
    for patch, suffixes in zip(delta, packed, strict=True):
        site = patch.site
        down, up = folded(suffixes)
        more = {MAGNITUDE: magnitude_vector(site, suffixes)} if MAGNITUDE in suffixes else {}
        parts.setdefault(site.part, {})[path_in(site.module, wrapper[site.part])] = {DOWN: down, UP: up, **more}
    files = {f"{part}/{MODEL}": _adapter(modules, dtype) for part, modules in parts.items()}
    return {**files, **{f"{ending.lstrip('.')}.safetensors": parcel for ending, parcel in words.items()}}


def _adapter(modules: Mapping[str, Suffixes], dtype: torch.dtype | None) -> Parcel:
    tensors: dict[str, Tensor] = {
        f"{ROOT}{path}.{NAMES[suffix]}": tensor for path, found in modules.items() for suffix, tensor in found.items()
    }
    config = json.dumps(_settings(modules), indent=2, sort_keys=True) + "\n"
    return Parcel(convert(tensors, dtype), {"format": "pt"}, {CONFIG: config})


def _settings(modules: Mapping[str, Suffixes]) -> dict[str, object]:
    """Return the configuration: what these modules' tensors, their scales folded in, do not say."""
    ranks = {path: len(tensors[DOWN]) for path, tensors in modules.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: own for path, own in sorted(ranks.items()) if own != rank}
    return {
        "peft_type": "LORA",
        "bias": "none",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(modules),
        "use_dora": any(MAGNITUDE in tensors for tensors in modules.values()),
    }
