"""Trained tokens as textual-inversion files, one a token, as the UIs and diffusers read them.

| base | diffusers, ComfyUI, A1111, Forge (`plain`) | kohya, and all of those but diffusers by itself |
|---|---|---|
| one text encoder | `<token>` (vectors, width) | `emb_params` (vectors, width) |
| several | `clip_l`, `clip_g` | `clip_l`, `clip_g` |

diffusers takes a single tensor's name for the token; InvokeAI wants `emb_params` there. UIs take the file's name for the
token, so files are named by it. The token also stands in the metadata, as `modelspec.trigger_phrase`.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from vgm_peft.delta import Delta, Word
from vgm_peft.errors import DeltaError
from vgm_peft.families import TABLE, family_named
from vgm_peft.family import Base
from vgm_peft.formats.books import Book, book_of, family_book
from vgm_peft.formats.canonical import read_tensors
from vgm_peft.formats.format import Format, Parcel
from vgm_peft.formats.header import Header, shown

ENCODERS = ("clip_l", "clip_g", "t5xxl")
"""What the UIs call the text encoders of a base that has several, in prompt order."""
LONE = "emb_params"
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
    tensors = {name: rows.reshape(-1, rows.shape[-1]) for name, rows in read_tensors(header).items()}
    name = next(iter(tensors))
    named = name if len(tensors) == 1 and name not in (LONE, *ENCODERS) else header.path.stem
    token = header.metadata.get(TOKEN, named)
    stacks = [tensors[key] for key in ENCODERS if key in tensors] if len(tensors) > 1 else [tensors[name]]
    if len({len(rows) for rows in stacks}) != 1 or not all(bool(torch.isfinite(rows).all()) for rows in stacks):
        raise DeltaError(f"{header.path}: the rows of {shown(token)} are not finite or differ in number between encoders")
    book = _book_for(stacks, base, header)
    rows = dict(zip(_encoders(book), stacks, strict=True))
    return Delta(book.family.name, {}, {token: Word(token, rows)}, dict(header.metadata))


def _book_for(stacks: Sequence[Tensor], base: Base | None, header: Header) -> Book:
    books = [book_of(base)] if base is not None else [family_book(name) for name in TABLE]
    wanted = [rows.shape[1] for rows in stacks]
    fitting = [book for book in books if len(_encoders(book)) == len(stacks)]
    exact = [book for book in fitting if _widths(book) == wanted]
    if exact or (fitting and base is None):  # a base that was never published has widths of its own
        return (exact or fitting)[0]
    expected = " or ".join(f"{book.family.name}'s {_widths(book)}" for book in books)
    fits = [name for name in TABLE if _widths(family_book(name)) == wanted]
    fix = f"it looks like a token of {fits[0]}" if fits else "use it with the base it was trained on"
    raise DeltaError(f"{header.path}: the token's vectors have the widths {wanted}", expected=expected, fix=fix)


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
    family = family_named(delta.family)
    encoders = family.parts[1:]
    stamps = {key: text for key, text in family.stamps([]).items() if key.startswith("modelspec.")}
    if ARCHITECTURE in stamps:
        stamps[ARCHITECTURE] += "/textual-inversion"
    out: dict[str, Parcel] = {}
    for number, word in enumerate(delta.words.values()):
        if set(word.rows) != set(encoders):
            raise DeltaError(
                f'"{word.token}" was trained on {", ".join(word.rows)}',
                expected="rows for " + " and ".join(encoders),
                fix="train it with all text encoders of the base, or keep the native file",
            )
        rows = [word.rows[part].detach() if dtype is None else word.rows[part].detach().to(dtype) for part in encoders]
        keys = ENCODERS[: len(rows)] if len(rows) > 1 else [word.token if plain else LONE]
        metadata = {**stamps, "modelspec.sai_model_spec": "1.0.1", "modelspec.implementation": "vgm_peft", TOKEN: word.token}
        ending = f".{_file_name(word.token) or number}"
        out[ending if ending not in out else f"{ending}-{number}"] = Parcel(dict(zip(keys, rows, strict=True)), metadata)
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
