"""The spelling of diffusers and peft: `unet.<path>.lora_A.weight`, `text_encoder.<path>.lora_B.weight`. LoRA and DoRA only.

Written without alpha: the scale is folded into `lora_B`, since tools disagree on where this spelling keeps it. Ranks that
differ within a part are filled up with zeros to the highest, because older versions apply the first rank's scale to all.
Text encoders are spelled with `text_model.`, which every version of transformers reads. A DoRA has `lora_magnitude_vector`
beside, one value for every output, of a convolution (1, O, 1, 1); where one layer of a part has it, peft gives it to all.

Read are the new spelling, with alphas in the `lora_adapter_metadata` of the file, and the older ones: `.lora.down.weight`,
`.lora_linear_layer.down.weight`, and `.processor.to_q_lora.down.weight` with or without the part in front.
"""

import json
import re
from collections.abc import Sequence
from math import sqrt
from typing import cast

import torch
from torch import Tensor

from vgm_peft.delta import Delta, Patch
from vgm_peft.errors import DeltaError
from vgm_peft.family import Base
from vgm_peft.formats import embedding
from vgm_peft.formats.books import Book, Place, assemble, choose_book
from vgm_peft.formats.canonical import read_tensors
from vgm_peft.formats.format import Format, Parcel
from vgm_peft.formats.header import Header, listed, shown
from vgm_peft.formats.vocabulary import Suffixes, convert, pack_all
from vgm_peft.site import WRAPPER

CLIP_BODY = ("encoder.layers.", "embeddings.", "final_layer_norm")
"""What is inside `text_model.` in CLIP text encoders; the projection is outside."""
ADAPTER = "lora_adapter_metadata"
UP, DOWN, ALPHA, MAGNITUDE = "lora_up.weight", "lora_down.weight", "alpha", "dora_scale"

_NAME = re.compile(
    r"(?P<module>.+?)(?:"
    r"\.lora_(?P<letter>[AB])(?:\.\w+)?\.weight"
    r"|(?:\.lora|\.lora_linear_layer|_lora)\.(?P<word>up|down)\.weight"
    r"|\.lora_(?P<magnitude>magnitude_vector)(?:\.\w+){0,2}"
    r"|(?:\.lora|\.lora_linear_layer|_lora)?\.alpha)"
)


def recognises(header: Header) -> bool:
    """Say whether any name is a LoRA's in one of diffusers' spellings."""
    return any(match and "." in match["module"] for match in map(_NAME.fullmatch, header.tensors))


def read(header: Header, base: Base | None = None) -> Delta:
    """Read a file in any of diffusers' spellings. Raises `DeltaError` when one tensor is not understood."""
    where = str(header.path)
    foreign = [name for name in header.tensors if name.startswith("base_model.model.")]
    if foreign:
        raise DeltaError(
            f"{where}: a peft adapter ({listed(foreign)}) whose alpha is in its adapter_config.json",
            fix="save it with diffusers' save_lora_weights",
        )
    strange = [name for name in header.tensors if not _NAME.fullmatch(name)]
    if strange:
        raise DeltaError(
            f"{where}: {len(strange)} tensors are not a LoRA's ({listed(strange)})",
            expected="lora_A, lora_B and lora_magnitude_vector only",
        )
    named: dict[str, Suffixes] = {}
    for name, tensor in read_tensors(header).items():
        module, suffix = _parse(name)
        if suffix in named.setdefault(module, {}):
            raise DeltaError(f"{where}: {shown(module)} has two tensors for {suffix}", expected="one")
        named[module][suffix] = tensor.flatten() if suffix == MAGNITUDE else tensor
    book = choose_book(named, find, base, where)
    scales = _Scales(header)
    groups: dict[Place, Suffixes] = {}
    for module, tensors in named.items():
        place = cast(Place, find(book, module))
        if place in groups:
            raise DeltaError(f"{where}: {'.'.join(place)} is there in two spellings, {shown(module)} is the second")
        groups[place] = _without_filling(scales.give_alpha(tensors, place))
    metadata = {key: text for key, text in header.metadata.items() if key != ADAPTER}
    return assemble(book, groups, where, metadata)


def _parse(name: str) -> tuple[str, str]:
    """Split a name into the module as the newest spelling has it, and kohya's suffix."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(name)
    kinds = {"A": DOWN, "B": UP, "down": DOWN, "up": UP, "magnitude_vector": MAGNITUDE}
    suffix = kinds.get(match["letter"] or match["word"] or match["magnitude"] or "", ALPHA)
    module = re.sub(r"\.processor\.to_out$", ".to_out.0", match["module"])
    return module.replace(".processor.", "."), suffix


def find(book: Book, name: str) -> Place | None:
    """Find a dotted name, with or without its part and `text_model.`, among a family's modules."""
    for part in book.family.parts:
        if name.startswith(f"{part}."):
            inner = name.removeprefix(f"{part}.")
            places = [(part, inner), (part, inner.removeprefix(WRAPPER))]
            return next((place for place in places if place in book.sites), None)
    place = (book.family.denoiser, name)
    return place if place in book.sites else None


class _Scales:
    """The alphas of a file that keeps them in its metadata, as peft's configuration of each part."""

    def __init__(self, header: Header) -> None:
        try:
            table: object = json.loads(header.metadata.get(ADAPTER, "{}"))
        except (ValueError, RecursionError):
            table = None
        if not isinstance(table, dict):
            raise DeltaError(f"{header.path}: damaged: its {ADAPTER} cannot be read", expected="a JSON table")
        self._table, self._where = cast(dict[str, object], table), header.path
        for key, value in self._table.items():
            if key.endswith(".init_lora_weights") and str(value).startswith(("pissa", "olora", "corda", "loftq")):
                raise DeltaError(
                    f"{self._where}: made with {shown(str(value))}, which changes the base's own weights too",
                    fix="save its difference to the untouched base instead (peft: path_initial_model_for_weight_conversion)",
                )

    def give_alpha(self, tensors: Suffixes, place: Place) -> Suffixes:
        """Return a module's tensors with the alpha that the metadata says, such that alpha / rank is the scale."""
        part, module = place
        alpha = self._table.get(f"{part}.lora_alpha")
        if alpha is None or DOWN not in tensors:
            return tensors
        if ALPHA in tensors:
            raise DeltaError(f"{self._where}: {part}.{module} has two alphas, its own and that in {ADAPTER}", expected="one")
        pattern = self._table.get(f"{part}.alpha_pattern")
        if isinstance(pattern, dict):
            for name, value in cast(dict[str, object], pattern).items():
                if f".{module}".endswith(f".{name.removeprefix(WRAPPER)}"):
                    alpha = value
        if not isinstance(alpha, (int, float)):
            raise DeltaError(f"{self._where}: {part}.{module} has the alpha {shown(str(alpha))}", expected="a number")
        stable = self._table.get(f"{part}.use_rslora") is True
        return {**tensors, ALPHA: torch.tensor(float(alpha) * (sqrt(len(tensors[DOWN])) if stable else 1.0))}


def _without_filling(tensors: Suffixes) -> Suffixes:
    """Drop ranks that are zero on both sides, with which files fill lower ranks up; the scale stays."""
    down, up = tensors.get(DOWN), tensors.get(UP)
    if down is None or up is None or up.dim() < 2 or up.shape[1] != len(down):
        return tensors
    live = down.flatten(1).any(1) | up.transpose(0, 1).flatten(1).any(1)
    live[0] = True
    if bool(live.all()):
        return tensors
    alpha = float(tensors.get(ALPHA, torch.tensor(0.0))) or float(len(down))
    kept = int(live.sum())
    return {**tensors, DOWN: down[live], UP: up[:, live], ALPHA: torch.tensor(alpha * kept / len(down))}


def spell(delta: Delta, base: Base | None = None, dtype: torch.dtype | None = None) -> dict[str, Parcel]:
    """Spell a delta for `load_lora_weights`, each trained token in a file of its own for `load_textual_inversion`."""
    words = embedding.parcels(delta, dtype, plain=True)
    if not delta.patches:
        return embedding.alone(words)
    packed = pack_all(delta, base)
    _check_place(delta, packed)
    folded = [_folded(suffixes) for suffixes in packed]
    highest: dict[str, int] = {}
    for patch, (down, _) in zip(delta, folded, strict=True):
        highest[patch.site.part] = max(highest.get(patch.site.part, 0), len(down))
    tensors: dict[str, Tensor] = {}
    for patch, suffixes, pair in zip(delta, packed, folded, strict=True):
        site = patch.site
        prefix = f"{site.part}.{WRAPPER if site.module.startswith(CLIP_BODY) else ''}{site.module}"
        down, up = _filled(*pair, highest[site.part])
        tensors |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
        if MAGNITUDE in suffixes:
            vector = suffixes[MAGNITUDE].flatten()
            kernel = [1] * (len(site.shape) - 2)
            tensors[f"{prefix}.lora_magnitude_vector.weight"] = vector.view(1, -1, *kernel) if kernel else vector
    metadata = {key: text for key, text in delta.metadata.items() if key.startswith("modelspec.")}
    return {"": Parcel(convert(tensors, dtype), {**metadata, "format": "pt"}), **words}


def _check_place(delta: Delta, packed: Sequence[Suffixes]) -> None:
    """Raise `DeltaError` for what diffusers' loader would drop or change."""
    other: list[Patch] = []
    scaled: dict[str, set[bool]] = {}
    for patch, suffixes in zip(delta, packed, strict=True):
        by_output = MAGNITUDE not in suffixes or suffixes[MAGNITUDE].shape[:2] == (patch.site.rows, 1)
        if not by_output or not {UP, DOWN} <= {*suffixes} <= {UP, DOWN, ALPHA, MAGNITUDE}:
            other.append(patch)
        scaled.setdefault(patch.site.part, set()).add(MAGNITUDE in suffixes)
    if other:
        raise DeltaError(
            f"diffusers' LoRA loader has no place for {', '.join(sorted({patch.kind for patch in other}))} "
            f"({len(other)} of {len(packed)} layers)",
            fix="write it as kohya for the UIs, or attach the native file to the pipeline with vgm_peft.attach",
        )
    for part, kinds in scaled.items():
        if len(kinds) > 1:
            raise DeltaError(f"{part}: some layers are DoRAs and some are not", expected="all or none, as peft has it")


def _folded(suffixes: Suffixes) -> tuple[Tensor, Tensor]:
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
