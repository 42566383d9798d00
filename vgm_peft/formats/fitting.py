"""Whose delta a file is and whether it fits a base, by its header alone: names and shapes tell, and no value is read.

What a reading would find out beyond that (values that are not finite, an alpha that is no number) is not asked here.
"""

import json
from collections.abc import Mapping
from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from vgm_peft.errors import DeltaError
from vgm_peft.families import KNOWN
from vgm_peft.family import Base
from vgm_peft.formats import embedding, native
from vgm_peft.formats.books import Reading, book_of, choose_book
from vgm_peft.formats.names import ALPHA, BUNDLED, by_module, cut
from vgm_peft.formats.vocabulary import Suffixes, shape_of
from vgm_peft.header import Header, listed


def family_of(header: Header) -> str:
    """The family of a delta file; empty where only a reading of its values could tell. Raises `DeltaError` for no delta."""
    if native.recognises(header):
        said = header.metadata.get(f"{native.PREFIX}family", "")
        return said if said in KNOWN else ""
    if embedding.recognises(header):
        return embedding.book_for(_rows(header), None, str(header.path)).family.name
    named = _named(header)
    return _reading(named, header, None).book.family.name if named else ""


def misfit(header: Header, base: Base) -> str:
    """Why a delta file does not fit a base; empty when it does, as far as names and shapes tell. Raises `DeltaError`."""
    try:
        family = family_of(header)
    except DeltaError as error:
        return str(error.what)
    if family and family != base.family.name:
        return f"it is for {family}"
    if native.recognises(header):
        return _native_misfit(header, base)
    if embedding.recognises(header):
        embedding.book_for(_rows(header), base, str(header.path))
        return ""
    named = _named(header)
    reading = _reading(named, header, base)
    wrong = [name for name, tensors in named.items() if _other_shape(reading, name, tensors)]
    return f"{len(wrong)} of {len(named)} layers have another shape ({listed(wrong, 1)})" if wrong else ""


def _reading(named: Mapping[str, Suffixes], header: Header, base: Base | None) -> Reading:
    return choose_book(named, base, header.path.name, header.metadata.get("ss_base_model_version", ""))


def _other_shape(reading: Reading, name: str, tensors: Suffixes) -> bool:
    shares = reading.find(name)
    known = reading.book.sites.get(shares[0].place, {}).get("weight") if len(shares) == 1 else None
    found = None if known is None else shape_of(tensors, known.shape)
    if known is None or found is None or len(found) == 1:
        return False
    return [n for n in found if n != 1] != [n for n in known.shape if n != 1]


def _native_misfit(header: Header, base: Base) -> str:
    sites = {site.name: site.shape for table in book_of(base).sites.values() for site in table.values()}
    try:
        groups = cast("list[Any]", json.loads(header.metadata[f"{native.PREFIX}patches"]))
        places = [(f"{part}.{module}.{tensor}", shape) for g in groups for part, module, _, shape, tensor in g["sites"]]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DeltaError(f"{header.path}: damaged: the list of patches cannot be read ({error})") from None
    wrong = [name for name, shape in places if sites.get(name) != tuple(shape)]
    if wrong:
        return f"{len(wrong)} of {len(places)} layers are not there in this size ({listed(wrong, 1)})"
    widths = embedding.widths(book_of(base))
    rows = {
        (name.rpartition("/")[2], e.shape[-1]) for name, e in header.tensors.items() if name.startswith("word/") and e.shape
    }
    return "its words have vectors of another width" if any(widths.get(part) != width for part, width in rows) else ""


def _rows(header: Header) -> dict[str, Tensor]:
    return {name: torch.empty(entry.shape, device="meta") for name, entry in header.tensors.items()}


def _named(header: Header) -> dict[str, Suffixes]:
    """The modules of a file of another tool, each tensor by its shape; alphas, of which the value is asked, as one."""
    tensors: dict[str, Tensor] = {}
    for name, entry in header.tensors.items():
        if not name.startswith(BUNDLED):
            alpha = (cut(name) or ("", ""))[1] == ALPHA and prod(entry.shape) == 1
            tensors[name] = torch.ones(entry.shape) if alpha else torch.empty(entry.shape, device="meta")
    return by_module(tensors, header)
