"""The spelling of diffusers and peft: `unet.<path>.lora_A.weight`, `text_encoder.<path>.lora_B.weight`. LoRA and DoRA only.

Written without alpha: the scale is folded into `lora_B`, since tools disagree on where this spelling keeps it. Ranks that
differ within a part are filled up with zeros to the highest, because older versions apply the first rank's scale to all.
Text encoders are spelled with `text_model.`, which every version of transformers reads. A DoRA has `lora_magnitude_vector`
beside, one value for every output, of a convolution (1, O, 1, 1); where one layer of a part has it, peft gives it to all.
"""

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vgm_peft.delta import Delta, Patch
from vgm_peft.errors import DeltaError
from vgm_peft.family import Base
from vgm_peft.formats import embedding
from vgm_peft.formats.books import book_of, family_book
from vgm_peft.formats.foreign import is_dotted as recognises
from vgm_peft.formats.foreign import read
from vgm_peft.formats.format import Format, Parcel
from vgm_peft.formats.names import ALPHA, DOWN, MAGNITUDE, UP
from vgm_peft.formats.settings import ADAPTER
from vgm_peft.formats.stamps import modelspec, stamps
from vgm_peft.formats.vocabulary import Suffixes, convert, pack_all
from vgm_peft.site import WRAPPER, Site

CLIP_BODY = ("encoder.layers.", "embeddings.", "final_layer_norm")
"""What is inside `text_model.` in CLIP text encoders; the projection is outside."""


def spell(delta: Delta, base: Base | None = None, dtype: torch.dtype | None = None) -> dict[str, Parcel]:
    """Spell a delta for `load_lora_weights`, each trained token in a file of its own for `load_textual_inversion`."""
    words = embedding.parcels(delta, dtype, plain=True)
    if not delta.patches:
        return embedding.alone(words)
    packed = pack_all(delta, base)
    check_place("diffusers", delta, packed)
    pairs = [folded(suffixes) for suffixes in packed]
    highest: dict[str, int] = {}
    for patch, (down, _) in zip(delta, pairs, strict=True):
        highest[patch.site.part] = max(highest.get(patch.site.part, 0), len(down))
    tensors: dict[str, Tensor] = {}
    for patch, suffixes, pair in zip(delta, packed, pairs, strict=True):
        site = patch.site
        prefix = f"{site.part}.{WRAPPER if site.module.startswith(CLIP_BODY) else ''}{site.module}"
        down, up = _filled(*pair, highest[site.part])
        tensors |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
        if MAGNITUDE in suffixes:
            tensors[f"{prefix}.lora_magnitude_vector.weight"] = magnitude_vector(site, suffixes)
    book = book_of(base) if base is not None else family_book(delta.family)
    said = {**modelspec(stamps(delta, base, book)), ADAPTER: _settings(delta, highest, packed), "format": "pt"}
    return {"": Parcel(convert(tensors, dtype), said), **words}


def _settings(delta: Delta, ranks: Mapping[str, int], packed: Sequence[Suffixes]) -> str:
    """Return peft's settings of every part, as newer versions take them instead of guessing from the tensors."""
    table: dict[str, object] = {}
    for part, rank in ranks.items():
        own = [(patch.site.module, suffixes) for patch, suffixes in zip(delta, packed, strict=True) if patch.site.part == part]
        fields = {"r": rank, "lora_alpha": rank, "target_modules": sorted(module for module, _ in own)}
        decomposed = any(MAGNITUDE in suffixes for _, suffixes in own)
        table |= {f"{part}.{name}": value for name, value in {**fields, "use_dora": decomposed}.items()}
    return json.dumps(table, indent=2, sort_keys=True)


def magnitude_vector(site: Site, suffixes: Suffixes) -> Tensor:
    """Return a DoRA's magnitudes as peft has them: (O,), of a convolution (1, O, 1, 1)."""
    vector, kernel = suffixes[MAGNITUDE].flatten(), [1] * (len(site.shape) - 2)
    return vector.view(1, -1, *kernel) if kernel else vector


def check_place(tool: str, delta: Delta, packed: Sequence[Suffixes]) -> None:
    """Raise `DeltaError` for what a LoRA loader of peft's would drop or change."""
    other: list[Patch] = []
    scaled: dict[str, set[bool]] = {}
    for patch, suffixes in zip(delta, packed, strict=True):
        by_output = MAGNITUDE not in suffixes or suffixes[MAGNITUDE].shape[:2] == (patch.site.rows, 1)
        if not by_output or not {UP, DOWN} <= {*suffixes} <= {UP, DOWN, ALPHA, MAGNITUDE}:
            other.append(patch)
        scaled.setdefault(patch.site.part, set()).add(MAGNITUDE in suffixes)
    if other:
        raise DeltaError(
            f"{tool}'s LoRA loader has no place for {', '.join(sorted({patch.kind for patch in other}))} "
            f"({len(other)} of {len(packed)} layers)",
            fix="write it as kohya for the UIs, export it with --approximate, or put the native file on with vgm_peft.attach",
        )
    for part, kinds in scaled.items():
        if len(kinds) > 1:
            raise DeltaError(f"{part}: some layers are DoRAs and some are not", expected="all or none, as peft has it")


def folded(suffixes: Suffixes) -> tuple[Tensor, Tensor]:
    """Return down and up with the scale in the latter."""
    down, up = suffixes[DOWN], suffixes[UP]
    scale = float(suffixes[ALPHA]) / len(down) if ALPHA in suffixes else 1.0
    return down, up if scale == 1.0 else (up.to(torch.float64) * scale).to(up.dtype)


def _filled(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Add zeros up to a rank."""
    more = rank - len(down)
    if not more:
        return down, up
    return torch.cat([down, down.new_zeros(more, *down.shape[1:])]), torch.cat(
        [up, up.new_zeros(len(up), more, *up.shape[2:])], 1
    )


FORMAT = Format("diffusers", "diffusers and peft: LoRA and DoRA", recognises, read, spell)
