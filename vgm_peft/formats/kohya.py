"""The spelling that every UI reads: kohya's names with LyCORIS' suffixes (A1111, ComfyUI, Forge, InvokeAI, SD.Next, diffusers).

A module is its path with `_` for `.` behind a prefix for its part (`lora_unet_`, `lora_te_`, SDXL `lora_te1_`, `lora_te2_`);
dots are lost, so names are looked up in the family's key table and never guessed. SDXL's U-Net is written with the original
block names (`input_blocks_4_1`), the one spelling no loader stumbles over. `alpha` is always written, such that alpha / rank
is the scale: a missing one would be read as 1 by some and as the rank by others (here as the rank, as kohya does). Within a
part all alphas are made the same, since diffusers loses those that differ.
"""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from vgm_peft.delta import Delta
from vgm_peft.errors import DeltaError
from vgm_peft.family import Base
from vgm_peft.formats import embedding
from vgm_peft.formats.books import Book, Place, assemble, book_of, choose_book, family_book
from vgm_peft.formats.canonical import data_digest, read_tensors
from vgm_peft.formats.format import Format, Parcel
from vgm_peft.formats.header import Header, listed
from vgm_peft.formats.vocabulary import Suffixes, convert, pack_all, rank_of

PREFIXES = ("lora_unet_", "lora_te")
UP, ALPHA = "lora_up.weight", "alpha"
ALGORITHMS = {"lokr_": "lokr", "hada_": "loha", "oft_": "diag-oft", "diff": "full", "w_norm": "full"}
"""How suffixes begin -> LyCORIS' word for the kind."""

PUBLIC = frozenset(
    ("ss_output_name", "ss_resolution", "ss_clip_skip", "ss_seed", "ss_steps", "ss_num_train_images", "ss_learning_rate")
)
"""What of a delta's own `ss_` metadata is written; the others may hold paths and names of the machine. `modelspec.` is all."""


def recognises(header: Header) -> bool:
    """Say whether any name is kohya's."""
    return any(name.startswith(PREFIXES) for name in header.tensors)


def read(header: Header, base: Base | None = None) -> Delta:
    """Read a file in kohya's names, in either block naming. Raises `DeltaError` when one tensor is not understood."""
    named: dict[str, Suffixes] = {}
    for name, tensor in read_tensors(header).items():
        module, _, suffix = name.partition(".")
        named.setdefault(module, {})[suffix] = tensor
    where = str(header.path)
    book = choose_book(named, _look_up, base, where, header.metadata.get("ss_base_model_version"))
    groups: dict[Place, Suffixes] = {}
    for name, tensors in named.items():
        place = book.spelled[name]
        if place in groups:
            raise DeltaError(f"{where}: {'.'.join(place)} is there in two spellings, {listed([name])} is the second")
        groups[place] = tensors
    return assemble(book, groups, where, header.metadata)


def _look_up(book: Book, name: str) -> Place | None:
    return book.spelled.get(name)


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
    for patch, suffixes in zip(delta, packed, strict=True):
        prefix = book.written[patch.site.part, patch.site.module]
        tensors |= {f"{prefix}.{suffix}": tensor for suffix, tensor in suffixes.items()}
    tensors = convert(tensors, dtype)
    return {"": Parcel(tensors, _metadata(delta, base, book, packed, tensors)), **words}


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


def _metadata(
    delta: Delta, base: Base | None, book: Book, packed: list[Suffixes], tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    own = {key: text for key, text in delta.metadata.items() if key in PUBLIC or key.startswith("modelspec.")}
    sites = [patch.site for patch in delta]
    stamps = book.family.stamps(sites, None if base is None else base.process.prediction)
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "vgm_peft",
        **own,
        **{key: f"{text}/lora" if key == embedding.ARCHITECTURE else text for key, text in stamps.items()},
        **_network(packed),
        "sshs_model_hash": data_digest(tensors),
    }


def _network(packed: list[Suffixes]) -> dict[str, str]:
    """Describe the kind of delta as kohya and LyCORIS do."""
    ranks = {rank_of(suffixes) for suffixes in packed}
    alphas = {float(suffixes["alpha"]) for suffixes in packed if "alpha" in suffixes}
    kinds = {word for suffixes in packed for name in suffixes for start, word in ALGORITHMS.items() if name.startswith(start)}
    rank = ranks.pop() if len(ranks) == 1 else "Dynamic"
    out = {
        "ss_network_module": "lycoris.kohya" if kinds else "networks.lora",
        "ss_network_dim": "1" if rank is None else str(rank),  # factors in full have no rank; 1 and alpha 1 make the scale 1
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
    }
    if kinds:
        out["ss_network_args"] = json.dumps({"algo": min(kinds)})
    return out


FORMAT = Format(
    "kohya", "ComfyUI, A1111, Forge, InvokeAI, SD.Next, kohya and diffusers: LoRA, LoKr and kin", recognises, read, spell
)
