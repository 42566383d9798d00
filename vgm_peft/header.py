"""A strict reader of the safetensors header: what is in a file, without reading a single tensor and without torch.

The stock library accepts duplicate names (the last wins), leading white space and headers of any shape; files come from
strangers, so this reader is stricter. Layout: 8 bytes little-endian length N, N bytes of JSON, then the data region.
`open_header` answers with `DeltaError` and nothing else, within time and memory bounded by the file's own size.
"""

import json
import os
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import cast

from vgm_peft.errors import DeltaError

MAX_HEADER = 100_000_000
MAX_TENSORS = 100_000
MAX_NAME = 1_000
MAX_AXES = 8
SIZES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
"""Bytes of one value, by the format's name of the dtype."""

LOOKS_LIKE: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint saved by pickle, or a download that was not unpacked)"),
    (b"\x80\x02", "a Python pickle (an old PyTorch checkpoint)"),
    (b"\x80\x03", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"version https://git-lfs", "a Git-LFS pointer, not the file it points to"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"<!doctype", "an HTML page (a failed download)"),
    (b"<html", "an HTML page (a failed download)"),
    (b"<?xml", "an XML page (a failed download)"),
    (b'{"', "a JSON text (a failed download, or an index file)"),
)
"""How files begin that are often mistaken for safetensors; compared without regard to case."""

UNPICKLED = "get the .safetensors of it, or convert it as docs/formats.md shows; pickles are never opened here"


@dataclass(frozen=True)
class Entry:
    """One tensor: its dtype by the format's name, its shape, and where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself; `tensors` in the order of their data."""

    path: Path
    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]
    size: int
    """Bytes of the whole file."""


def open_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a safetensors file. Raises `DeltaError` saying what is wrong or what the file is instead."""
    path = Path(path)
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(512)
        length = _header_length(path, head, size)
        file.seek(8)
        raw = file.read(length)
    table = _parse(path, raw)
    metadata = _metadata(path, table.pop("__metadata__", {}))
    if len(table) > MAX_TENSORS:
        raise _damaged(path, f"it lists {len(table)} tensors", f"at most {MAX_TENSORS}")
    entries = {name: _entry(path, name, value, 8 + length) for name, value in table.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_contiguous(path, ordered, 8 + length, size)
    return Header(path, ordered, metadata, size)


def open_plain(path: Path) -> BufferedReader:
    """Open an ordinary file for reading. Raises `DeltaError` when there is none, or it is unreadable, a folder or a pipe."""
    try:
        # O_NONBLOCK: opening a pipe must not hang before it can be seen to be one
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise DeltaError(
            f"{path}: no such file", fix="check the spelling; a finished run keeps its delta.safetensors"
        ) from None
    except (OSError, ValueError) as error:
        raise DeltaError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise DeltaError(f"{path}: not an ordinary file", expected="a .safetensors file")
    return os.fdopen(number, "rb")


def _header_length(path: Path, head: bytes, size: int) -> int:
    if size == 0:
        raise DeltaError(f"{path}: the file is empty", expected="a safetensors file", fix="download or export it again")
    length: int = struct.unpack("<Q", head[:8])[0] if size >= 8 else MAX_HEADER + 1
    brace = head[8:9] == b"{"
    if brace and 2 <= length <= min(size - 8, MAX_HEADER):
        return length  # before anything else: a length may begin with the same bytes as a pickle
    begin = head.lstrip().lower()
    for signature, name in LOOKS_LIKE:
        if head.startswith(signature) or begin.startswith(signature.lower()):
            if "pickle" in name and b"string_to_param" in head:
                name = "a token trained with A1111, in a Python pickle"
            fix = UNPICKLED if "pickle" in name else "download it again"
            raise DeltaError(f"{path}: this is {name}", expected="a safetensors file", fix=fix)
    if brace and length <= MAX_HEADER:
        raise _damaged(path, f"the header should have {length} bytes and the whole file has {size}", "a whole file")
    raise DeltaError(f"{path}: not a safetensors file", expected="a header of at most 100 MB that begins with {")


def _parse(path: Path, raw: bytes) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        table: dict[str, object] = {}
        for name, value in pairs:
            if name in table:
                raise ValueError(f"{shown(name)} is there twice")
            table[name] = value
        return table

    def refuse(constant: str) -> object:
        raise ValueError(f"{constant} is no JSON")

    try:
        table: object = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
        if b"\\ud" in raw.lower():  # half a letter by its number, which is no text: nothing could write or show it again
            json.dumps(table, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"the header cannot be read ({error})", "JSON without duplicate names") from None
    if not isinstance(table, dict):
        raise _damaged(path, "the header is no table", "a JSON object")
    return cast(dict[str, object], table)


def _metadata(path: Path, value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _damaged(path, "__metadata__ is no table", "texts by name")
    table = cast(dict[str, object], value)
    for key, text in table.items():
        if not isinstance(text, str):
            raise _damaged(path, f"__metadata__ {shown(key)} is a {type(text).__name__}", "a text")
    return cast(dict[str, str], table)


def _entry(path: Path, name: str, value: object, data: int) -> Entry:
    def wrong(what: str, expected: str) -> DeltaError:
        return _damaged(path, f"tensor {shown(name)} {what}", expected)

    if len(name) > MAX_NAME:
        raise wrong(f"has a name of {len(name)} letters", f"at most {MAX_NAME}")
    if not isinstance(value, dict) or set(cast(dict[str, object], value)) != {"dtype", "shape", "data_offsets"}:
        raise wrong("is not described as one", "dtype, shape and data_offsets")
    fields = cast(dict[str, object], value)
    dtype = fields["dtype"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise wrong(f"has the dtype {shown(str(dtype))}", "one of " + ", ".join(SIZES))
    shape, offsets = _counts(fields["shape"]), _counts(fields["data_offsets"])
    if shape is None or len(shape) > MAX_AXES:
        raise wrong("has an impossible shape", f"at most {MAX_AXES} whole numbers from 0 to 2^62")
    if offsets is None or len(offsets) != 2 or offsets[1] - offsets[0] != prod(shape) * SIZES[dtype]:
        raise wrong(
            f"({dtype} {'x'.join(map(str, shape))}) has the offsets {shown(str(fields['data_offsets']))}",
            f"{prod(shape) * SIZES[dtype]} bytes",
        )
    return Entry(dtype, shape, data + offsets[0], data + offsets[1])


def _counts(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list) or len(cast(list[object], value)) > MAX_AXES:
        return None
    items = cast(list[object], value)
    if not all(type(n) is int and 0 <= n < 2**62 for n in items):
        return None
    return tuple(cast(list[int], items))


def _check_contiguous(path: Path, entries: Mapping[str, Entry], data: int, size: int) -> None:
    end = data
    for name, entry in entries.items():
        if entry.start != end:
            word = "overlaps the one before it" if entry.start < end else "leaves a hole before it"
            raise _damaged(path, f"tensor {shown(name)} {word}", "tensors side by side")
        end = entry.end
    if end > size:
        raise DeltaError(
            f"{path}: the file is cut short, {size} of {end} bytes", expected="a whole file", fix="download or export it again"
        )
    if end < size:
        raise _damaged(path, f"{size - end} bytes follow the last tensor", "none")


def shown(name: str) -> str:
    """Return a name from a file as it may be shown: quoted, control characters escaped, a long one without its middle."""
    text = ascii(name)
    return text if len(text) <= 120 else f"{text[:60]}...{text[-57:]}"


def listed(names: Sequence[str], most: int = 3) -> str:
    """List the first few names of a file as they may be shown, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more


def _damaged(path: Path, what: str, expected: str) -> DeltaError:
    return DeltaError(f"{path}: damaged: {what}", expected=expected, fix="download or export it again")
