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

import json
from collections import Counter
from collections.abc import Mapping, Sequence

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
DORA, ROTATION = "dora_scale", "oft_blocks"
NORM = {"diff": "w_norm", "w_norm": "w_norm", "diff_b": "b_norm"}
"""What a change of a normalisation is called as one of any layer -> its own name."""
ALGORITHMS = {
    "hada_w1_b": "loha",
    "lokr_w1": "lokr",
    "lokr_w1_a": "lokr",
    "b1.weight": "glora",
    "on_input": "ia3",
    "diff": "full",
    "diff_b": "full",
}
"""A suffix by which a kind other than LoRA is known -> LyCORIS' word for it."""

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
        groups[place] = _without_filling(tensors)
    return assemble(book, groups, where, header.metadata)


def _without_filling(tensors: Suffixes) -> Suffixes:
    """Drop the half of a normalisation's change that is there for the other's sake."""
    halves = [name for name in NORM.values() if name in tensors]
    live = {name for name in halves if bool(tensors[name].any())}
    return {name: tensor for name, tensor in tensors.items() if not live or name in live or name not in halves}


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
    modules = _by_module(delta, packed, book)
    for place, suffixes in modules.items():
        tensors |= {f"{book.written[place]}.{suffix}": tensor for suffix, tensor in suffixes.items()}
    tensors = convert(tensors, dtype)
    return {"": Parcel(tensors, _metadata(delta, base, book, list(modules.values()), tensors)), **words}


def _by_module(delta: Delta, packed: Sequence[Suffixes], book: Book) -> dict[Place, Suffixes]:
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


def _network(modules: Sequence[Suffixes]) -> dict[str, str]:
    """Describe the kind of delta as kohya and LyCORIS do: by the commonest that kohya's own code cannot read."""
    ranks = {rank for suffixes in modules if (rank := rank_of(suffixes)) is not None}
    alphas = {float(suffixes[ALPHA]) for suffixes in modules if ALPHA in suffixes}
    kinds = Counter(word for suffixes in modules if (word := _algorithm(suffixes)) is not None)
    out = {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic" if ranks else "1",  # 1: what has no rank
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic" if alphas else "1.0",
    }
    scales = [suffixes[DORA] for suffixes in modules if DORA in suffixes]
    lowrank = any(UP in suffixes for suffixes in modules)
    args = {"algo": max(sorted(kinds), key=kinds.__getitem__, default="locon" if lowrank else "full")}
    if scales:
        args |= {"dora_wd": "True", "wd_on_output": str(scales[0].shape[1] == 1)}
    if any("w_norm" in suffixes for suffixes in modules):
        args["train_norm"] = "True"
    if args == {"algo": "locon"}:
        return {**out, "ss_network_module": "networks.lora"}
    return {**out, "ss_network_args": json.dumps(args)}


def _algorithm(suffixes: Suffixes) -> str | None:
    """Return LyCORIS' word for a module's kind; None for a LoRA, and for a normalisation, which has none of its own."""
    if ROTATION in suffixes:
        return "boft" if suffixes[ROTATION].dim() == 4 else "diag-oft"
    return next((word for name, word in ALGORITHMS.items() if name in suffixes), None)


FORMAT = Format(
    "kohya", "ComfyUI, A1111, Forge, InvokeAI, SD.Next, kohya and diffusers: LoRA, LoKr and kin", recognises, read, spell
)
