"""Reading the files of cloneofsimo's `lora`, in which tensors are numbered: `unet:0:up`, `unet:0:down`, `text_encoder:0:up` ...

A number counts the layers inside modules of the classes that the metadata lists (`unet` = `["CrossAttention", "GEGLU",
"Attention"]`), in the order of the network's own modules. That order was once self-attention, feed-forward,
cross-attention; since diffusers 0.17 the feed-forward is last. The shapes tell which of the two it is, since every tensor
has to fit. There is no alpha: the change is up @ down. Tokens trained beside stand under their own names, marked `<embed>`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vgm_peft.delta import Delta
from vgm_peft.errors import DeltaError
from vgm_peft.families import TABLE
from vgm_peft.family import Base, Place
from vgm_peft.formats import embedding
from vgm_peft.formats.books import Book, assemble, book_of, books
from vgm_peft.formats.canonical import read_values
from vgm_peft.formats.format import Format, Parcel
from vgm_peft.formats.names import DOWN, UP
from vgm_peft.formats.settings import parse
from vgm_peft.formats.vocabulary import Suffixes
from vgm_peft.header import Header, listed, shown

EMBEDDED = "<embed>"
LAYERS: Mapping[str, str] = {
    "CrossAttention": r".*\.attn[12]\.to_(?:q|k|v|out\.0)",
    "Attention": r".*\.attn[12]\.to_(?:q|k|v|out\.0)",
    "GEGLU": r".*\.ff\.net\.0\.proj",
    "ResnetBlock2D": r".*resnets\.\d+\.(?:conv1|conv2|conv_shortcut|time_emb_proj)",
    "CLIPAttention": r".*\.self_attn\.(?:k|v|q|out)_proj",
    "CLIPMLP": r".*\.mlp\.fc[12]",
}
"""Class of a module -> the layers in it."""
TEXT_ORDER = ("k_proj", "v_proj", "q_proj", "out_proj")
"""The order of a CLIP attention's layers, which are all of one shape."""

_NUMBERED = re.compile(r"(?P<part>\w+):(?P<number>\d{1,5}):(?P<half>up|down)")


def recognises(header: Header) -> bool:
    """Say whether any tensor is numbered."""
    return any(_NUMBERED.fullmatch(name) for name in header.tensors)


def read(header: Header, base: Base | None = None) -> Delta:
    """Read a file of numbered tensors. Raises `DeltaError` when one of them fits nothing."""
    where, tensors = str(header.path), read_values(header)
    tokens = {name: tensors.pop(name) for name in list(tensors) if header.metadata.get(name) == EMBEDDED}
    odd = [name for name in tensors if not _NUMBERED.fullmatch(name)]
    if odd:
        raise DeltaError(f"{where}: {len(odd)} tensors are neither numbered nor tokens ({listed(odd)})", expected="none")
    rows = {part: _Row(part, pairs, _classes(header, part)) for part, pairs in _pairs(tensors, where).items()}
    tried = [book_of(base)] if base is not None else list(books(list(TABLE)))
    for book in tried:
        groups = _placed(book, list(rows.values()))
        if groups is not None:
            said = {key: text for key, text in header.metadata.items() if key not in {*rows, *tokens} and ":" not in key}
            delta = assemble(book, groups, where, said)
            for token, vectors in tokens.items():
                delta.words[token] = embedding.word_of(token, {"*": vectors}, book, where)
            return delta
    found = ", ".join(f"{len(row.pairs)} layers of {part}" for part, row in rows.items())
    raise DeltaError(
        f"{where}: {found} do not fit {' or '.join(dict.fromkeys(book.family.name for book in tried))} one by one",
        expected="the layers of the classes that its metadata lists",
        fix="use it with the base it was trained on",
    )


@dataclass(frozen=True)
class _Row:
    """The numbered layers of one part, and the classes they are in."""

    part: str
    pairs: Sequence[Suffixes]
    classes: Sequence[str]

    def places(self, book: Book) -> list[list[Place]]:
        """Return the places that the numbers may stand for, in each of the orders there were."""
        pattern = re.compile("|".join(LAYERS[kind] for kind in self.classes))
        modules = [module for part, module in book.sites if part == self.part and pattern.fullmatch(module)]
        if self.part != book.family.denoiser:
            rank = {name: number for number, name in enumerate(TEXT_ORDER)}
            heads = list(dict.fromkeys(module.rpartition(".")[0] for module in modules))
            modules.sort(key=lambda m: (heads.index(m.rpartition(".")[0]), rank.get(m.rpartition(".")[2], 0)))
            return [[(self.part, module) for module in modules]]
        blocks = [module.partition(".attn")[0].partition(".ff.")[0] for module in modules]
        first = {block: number for number, block in reversed(list(enumerate(blocks)))}
        old = sorted(range(len(modules)), key=lambda n: (first[blocks[n]], ".attn2." in modules[n]))
        return [[(self.part, module) for module in modules], [(self.part, modules[n]) for n in old]]


def _placed(book: Book, rows: Sequence[_Row]) -> dict[Place, Suffixes] | None:
    """Return the tensors by place, or None when they do not fit a base layer by layer."""
    groups: dict[Place, Suffixes] = {}
    for row in rows:
        fitting = [places for places in row.places(book) if _fits(book, places, row.pairs)]
        if not fitting:
            return None
        groups.update(zip(fitting[0], row.pairs, strict=True))
    return groups


def _fits(book: Book, places: Sequence[Place], pairs: Sequence[Suffixes]) -> bool:
    if len(places) != len(pairs):
        return False
    shapes = [book.sites[place]["weight"].shape for place in places]
    return all(
        up.shape[:1] == shape[:1] and down.dim() > 1 and down.shape[1:] == shape[1:]
        for shape, (up, down) in zip(shapes, ((pair[UP], pair[DOWN]) for pair in pairs), strict=True)
    )


def _pairs(tensors: Mapping[str, Tensor], where: str) -> dict[str, list[Suffixes]]:
    """Return each part's pairs by number. Raises `DeltaError` when a number or half of a pair is missing."""
    found: dict[str, dict[int, Suffixes]] = {}
    for name, tensor in tensors.items():
        part, number, half = name.split(":")
        pair = found.setdefault(part, {}).setdefault(int(number), {})
        if (UP if half == "up" else DOWN) in pair:
            raise DeltaError(f"{where}: {shown(name)} is there in two spellings", expected="every number once")
        pair[UP if half == "up" else DOWN] = tensor
    for part, pairs in found.items():
        missing = [n for n in range(len(pairs)) if len(pairs.get(n, {})) != 2]
        if missing:
            name = shown(f"{part}:{missing[0]}")
            raise DeltaError(f"{where}: {name} is not there whole", expected="up and down, without gaps")
    return {part: [pairs[number] for number in sorted(pairs)] for part, pairs in found.items()}


def _classes(header: Header, part: str) -> list[str]:
    """Return the classes that the metadata lists for a part."""
    text = header.metadata.get(part, "")
    names = parse(f'{{"names": {text}}}', f"{header.path}: damaged: its list of classes for {shown(part)}").get("names")
    classes = [str(name) for name in names] if isinstance(names, list) else []
    unknown = [name for name in classes if name not in LAYERS]
    if unknown or not classes:
        raise DeltaError(
            f"{header.path}: {shown(part)} has layers of {listed(unknown) if unknown else 'no class'}",
            expected="some of " + ", ".join(LAYERS),
        )
    return classes


def spell(delta: Delta, base: Base | None = None, dtype: torch.dtype | None = None) -> dict[str, Parcel]:
    """Refuse: these files are read here and not written."""
    raise DeltaError("files of numbered tensors are read and not written", fix="write the delta as kohya or diffusers")


FORMAT = Format("numbered", "cloneofsimo's lora: read only", recognises, read, spell)
