"""LyCORIS' own spelling, of its wrapper around any network: `lycoris_<path with _ for .>.<suffix>`, a file for each part.

The wrapper knows one network and names its modules by their own paths, so nothing in a name tells the part: what changes a
text encoder goes to a file of its own beside the main one, which is the denoiser's. `create_lycoris_from_weights` of LyCORIS
loads each of them into its network; SimpleTuner and ComfyUI read the denoiser's.
"""

import torch

from vgm_peft.delta import Delta
from vgm_peft.family import Base
from vgm_peft.formats import embedding, foreign, kohya
from vgm_peft.formats.books import book_of, family_book
from vgm_peft.formats.format import Format, Parcel
from vgm_peft.formats.paths import path_in, wrappers
from vgm_peft.formats.stamps import network, stamps
from vgm_peft.formats.vocabulary import convert, pack_all
from vgm_peft.header import Header

PREFIX = "lycoris_"


def recognises(header: Header) -> bool:
    """Say whether any name is the wrapper's."""
    return any(name.startswith(PREFIX) for name in header.tensors)


def spell(delta: Delta, base: Base | None = None, dtype: torch.dtype | None = None) -> dict[str, Parcel]:
    """Spell a delta for LyCORIS: the denoiser's changes in the main file, each text encoder's in one named for it."""
    words = embedding.parcels(delta, dtype, plain=False)
    if not delta.patches:
        return embedding.alone(words)
    book = book_of(base) if base is not None else family_book(delta.family)
    wrapper = wrappers(delta, base)
    files: dict[str, Parcel] = {}
    for part in book.family.parts:
        own = Delta(delta.family, {name: p for name, p in delta.patches.items() if p.site.part == part}, {}, delta.metadata)
        if not own.patches:
            continue
        modules = kohya.by_module(own, pack_all(own, base), book)
        tensors = {
            f"{PREFIX}{path_in(module, wrapper[part]).replace('.', '_')}.{suffix}": tensor
            for (_, module), suffixes in modules.items()
            for suffix, tensor in suffixes.items()
        }
        said = {**stamps(delta, base, book), **network(list(modules.values()))}
        files["" if part == book.family.denoiser else f".{part}"] = Parcel(convert(tensors, dtype), said)
    return {**files, **words}


FORMAT = Format("lycoris", "LyCORIS, SimpleTuner, ComfyUI: every form", recognises, foreign.read, spell, by_part=True)
