"""The spelling that every UI reads: kohya's names with LyCORIS' suffixes (A1111, ComfyUI, Forge, InvokeAI, SD.Next, diffusers).

A module is its path with `_` for `.` behind a prefix for its part (`lora_unet_`, `lora_te_`, SDXL `lora_te1_`, `lora_te2_`);
dots are lost, so names are looked up in the family's key table and never guessed. SDXL's U-Net is written with the original
block names (`input_blocks_4_1`), the one spelling no loader stumbles over. `alpha` is always written, such that alpha / rank
is the scale: a missing one would be read as 1 by some and as the rank by others (here as the rank, as kohya does). Within a
part all alphas are made the same, since diffusers loses those that differ.

A normalisation is spelled by `w_norm` and `b_norm`, always both, because A1111 and SD.Next refuse one alone and nobody reads
`b_norm` alone: what a delta does not change is filled in with zeros. When read, a half of zeros beside one that is not is
taken for such filling and dropped. The bias of any other layer is `diff_b`; alone on its layer it is read by ComfyUI and Forge
only, and A1111 and InvokeAI refuse the file.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vgm_peft.delta import Delta
from vgm_peft.errors import DeltaError
from vgm_peft.family import Base
from vgm_peft.formats import embedding
from vgm_peft.formats.books import Book, Place, book_of, family_book
from vgm_peft.formats.foreign import is_flat as recognises
from vgm_peft.formats.foreign import read
from vgm_peft.formats.format import Format, Parcel
from vgm_peft.formats.stamps import network, stamps
from vgm_peft.formats.vocabulary import Suffixes, convert, pack_all
from vgm_peft.header import listed

UP, ALPHA = "lora_up.weight", "alpha"
NORM = {"diff": "w_norm", "w_norm": "w_norm", "diff_b": "b_norm"}
"""What a change of a normalisation is called as one of any layer -> its own name."""


def spell(delta: Delta, base: Base | None = None, dtype: torch.dtype | None = None) -> dict[str, Parcel]:
    """Spell a delta for UIs: the weights in the main file, each trained token in a file of its own beside it."""
    words = embedding.parcels(delta, dtype, plain=False)
    if not delta.patches:
        return embedding.alone(words)
    packed = _one_alpha_a_part(delta, pack_all(delta, base))
    book = book_of(base) if base is not None else family_book(delta.family)
    tensors: dict[str, Tensor] = {}
    missing = [patch.site.name for patch in delta if (patch.site.part, patch.site.module) not in book.written]
    if missing:
        raise DeltaError(f"{len(missing)} sites have no name in {delta.family} for other tools ({listed(missing)})")
    modules = by_module(delta, packed, book)
    for place, suffixes in modules.items():
        tensors |= {f"{book.written[place]}.{suffix}": tensor for suffix, tensor in suffixes.items()}
    said = {**stamps(delta, base, book), **network(list(modules.values()))}
    return {"": Parcel(convert(tensors, dtype), said), **words}


def by_module(delta: Delta, packed: Sequence[Suffixes], book: Book) -> dict[Place, Suffixes]:
    """Put what changes a module's weight and bias together, and give normalisations their names and both halves."""
    modules: dict[Place, Suffixes] = {}
    for patch, suffixes in zip(delta, packed, strict=True):
        modules.setdefault((patch.site.part, patch.site.module), {}).update(suffixes)
    for place, suffixes in modules.items():
        if book.is_norm(place):
            named = {NORM.get(suffix, suffix): tensor for suffix, tensor in suffixes.items()}
            some = next(iter(named.values()))
            missing = {NORM[name] for name, tensor in (("diff", "weight"), ("diff_b", "bias")) if tensor in book.sites[place]}
            modules[place] = {**dict.fromkeys(sorted(missing), torch.zeros_like(some)), **named}
    return modules


def _one_alpha_a_part(delta: Delta, packed: list[Suffixes]) -> list[Suffixes]:
    """Give all low-rank modules of a part the same alpha, the commonest, with the difference of scale in `lora_up`.

    diffusers (0.42) loses the alphas of attention layers when they differ within a part, and warns at best.
    """
    common: dict[str, float] = {}
    for part in delta.parts:
        alphas = [float(t[ALPHA]) for patch, t in zip(delta, packed, strict=True) if patch.site.part == part and UP in t]
        common[part] = max(sorted(set(alphas)), key=alphas.count, default=1.0)
    out: list[Suffixes] = []
    for patch, tensors in zip(delta, packed, strict=True):
        alpha = common[patch.site.part]
        if UP in tensors and float(tensors[ALPHA]) != alpha:
            up = (tensors[UP].to(torch.float64) * (float(tensors[ALPHA]) / alpha)).to(tensors[UP].dtype)
            tensors = {**tensors, UP: up, ALPHA: torch.tensor(alpha)}
        out.append(tensors)
    return out


FORMAT = Format(
    "kohya", "ComfyUI, A1111, Forge, InvokeAI, SD.Next, kohya and diffusers: LoRA, LoKr and kin", recognises, read, spell
)
