"""Trained tokens as textual-inversion files, one a token, as the UIs and diffusers read them.

| base | diffusers, ComfyUI, A1111, Forge (`plain`) | kohya, and all of those but diffusers by itself |
|---|---|---|
| one text encoder | `<token>` (vectors, width) | `emb_params` (vectors, width) |
| several | `clip_l`, `clip_g` | `clip_l`, `clip_g` |

diffusers takes a single tensor's name for the token; InvokeAI wants `emb_params` there. UIs take the file's name for the
token, so files are named by it. The token also stands in the metadata, as `modelspec.trigger_phrase`.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vgm_peft.delta import Delta, Word
from vgm_peft.errors import DeltaError
from vgm_peft.families import KNOWN, TABLE, naming_of
from vgm_peft.family import Base
from vgm_peft.formats.books import Book, book_of, books
from vgm_peft.formats.canonical import read_values
from vgm_peft.formats.format import Format, Parcel
from vgm_peft.header import Header, listed, shown

ENCODERS = ("clip_l", "clip_g", "t5xxl")
"""What the UIs call the text encoders of a base that has several, in prompt order."""
LONE = ("emb_params", "string_to_param.*", "*")
"""What the rows are called where they are alone: by kohya, and by A1111; their token is then the file's name."""
ARCHITECTURE = "modelspec.architecture"
TOKEN = "modelspec.trigger_phrase"
TABLE_OF_TOKENS = ("embeddings.token_embedding", "shared")
"""The module that holds a text encoder's token rows: CLIP's, T5's."""


def recognises(header: Header) -> bool:
    """Say whether a file holds nothing but token rows."""
    names = set(header.tensors)
    rows = bool(names) and all(1 <= len(entry.shape) <= 2 for entry in header.tensors.values())
    return rows and (names <= set(ENCODERS) or len(names) == 1)


def read(header: Header, base: Base | None = None) -> Delta:
    """Read one token's rows. The token is what the file says, else the tensor's name, else the file's."""
    tensors = read_values(header)
    name = next(iter(tensors))
    named = name if len(tensors) == 1 and name not in (*LONE, *ENCODERS) else header.path.stem
    token = header.metadata.get(TOKEN, named)
    book = book_for(tensors, base, str(header.path))
    return Delta(book.family.name, {}, {token: word_of(token, tensors, book, str(header.path))}, dict(header.metadata))


def word_of(token: str, tensors: Mapping[str, Tensor], book: Book, where: str) -> Word:
    """Make a token of a file's rows for each text encoder. Raises `DeltaError` when they are not as many as `book` has."""
    if not token or any(rows.dim() not in (1, 2) for rows in tensors.values()):
        raise DeltaError(f"{where}: {shown(token)} has no name or no rows", expected="(vectors, width) for every text encoder")
    stacks = _stacks(tensors)
    if len({len(rows) for rows in stacks}) != 1 or not all(bool(torch.isfinite(rows).all()) for rows in stacks):
        raise DeltaError(f"{where}: the rows of {shown(token)} are not finite or differ in number between encoders")
    encoders = _encoders(book)
    if len(stacks) != len(encoders):
        raise DeltaError(
            f"{where}: {shown(token)} has rows for {len(stacks)} text encoders ({listed(list(tensors))})",
            expected=f"{len(encoders)}, as {book.family.name} has",
        )
    return Word(token, dict(zip(encoders, stacks, strict=True)))


def _stacks(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the rows for each text encoder, in prompt order."""
    order = [key for key in ENCODERS if key in tensors] if len(tensors) > 1 else list(tensors)
    return [tensors[key].reshape(-1, tensors[key].shape[-1]) for key in order]


def book_for(tensors: Mapping[str, Tensor], base: Base | None, where: str) -> Book:
    """Return the base's book, or that of the published base whose text encoders are as wide as these rows."""
    wanted = [rows.shape[1] for rows in _stacks(tensors)]
    known = [book_of(base)] if base is not None else books(list(KNOWN))
    exact = next((book for book in known if _widths(book) == wanted), None)
    if exact is not None:
        return exact
    if base is None:  # a base that was never published has widths of its own
        fitting = [book for book in books(list(TABLE)) if len(_encoders(book)) == len(wanted)]
        if fitting:
            return fitting[0]
    tried = [book_of(base)] if base is not None else list(books(list(TABLE)))
    expected = " or ".join(dict.fromkeys(f"{book.family.name}'s {_widths(book)}" for book in tried))
    fits = [book.family.name for book in books(list(KNOWN)) if _widths(book) == wanted]
    fix = f"it looks like a token of {fits[0]}" if fits else "use it with the base it was trained on"
    raise DeltaError(f"{where}: the token's vectors have the widths {wanted}", expected=expected, fix=fix)


def _encoders(book: Book) -> tuple[str, ...]:
    return book.family.parts[1:]


def widths(book: Book) -> dict[str, int]:
    """Return the width of each text encoder's token rows."""
    places = ((part, module) for part in _encoders(book) for module in TABLE_OF_TOKENS)
    return {place[0]: book.sites[place]["weight"].shape[1] for place in places if place in book.sites}


def _widths(book: Book) -> list[int]:
    return list(widths(book).values())


def parcels(delta: Delta, dtype: torch.dtype | None, plain: bool) -> dict[str, Parcel]:
    """Spell every trained token as a file of its own: name ending -> content."""
    if not delta.words:
        return {}
    family = naming_of(delta.family)
    encoders = family.parts[1:]
    stamps = {key: text for key, text in family.stamps([]).items() if key.startswith("modelspec.")}
    if ARCHITECTURE in stamps:
        stamps[ARCHITECTURE] += "/textual-inversion"
    out: dict[str, Parcel] = {}
    for number, word in enumerate(delta.words.values()):
        if not word.is_plain():
            kind = "has rows for every cross-attention" if word.layers else "leads every prompt"
            raise DeltaError(f'"{word.token}" {kind}', expected="what other tools know", fix="keep the native file")
        if set(word.rows) != set(encoders):
            raise DeltaError(
                f'"{word.token}" was trained on {", ".join(word.rows)}',
                expected="rows for " + " and ".join(encoders),
                fix="train it with all text encoders of the base, or keep the native file",
            )
        rows = [word.rows[part].detach() if dtype is None else word.rows[part].detach().to(dtype) for part in encoders]
        keys = ENCODERS[: len(rows)] if len(rows) > 1 else [word.token if plain else LONE[0]]
        metadata = {**stamps, "modelspec.sai_model_spec": "1.0.1", "modelspec.implementation": "vgm_peft", TOKEN: word.token}
        ending = f".{_file_name(word.token) or number}"
        out[ending if ending not in out else f"{ending}-{number}"] = Parcel(
            dict(zip(keys, rows, strict=True)), metadata, titled=False
        )
    return out


def _file_name(token: str) -> str:
    """What of a token can stand in a file's name anywhere."""
    return re.sub(r"[^\w-]+", "", token)[:80]


def alone(words: dict[str, Parcel]) -> dict[str, Parcel]:
    """Give a single token the main file's name. Raises `DeltaError` when there is none at all."""
    if not words:
        raise DeltaError("the delta is empty", expected="at least one patch or trained token")
    return {"": next(iter(words.values()))} if len(words) == 1 else words


def spell(delta: Delta, base: Base | None = None, dtype: torch.dtype | None = None) -> dict[str, Parcel]:
    """Spell a delta that is nothing but trained tokens."""
    if delta.patches:
        raise DeltaError(
            f"an embedding file cannot hold the {len(delta.patches)} weight changes of this delta",
            fix="write it as kohya or diffusers: the tokens go to files beside the weights",
        )
    return alone(parcels(delta, dtype, plain=True))


FORMAT = Format("embedding", "diffusers, ComfyUI, A1111, Forge, SD.Next: trained tokens", recognises, read, spell)
