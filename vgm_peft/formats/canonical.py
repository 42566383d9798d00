"""Our own writer of safetensors: the same content gives the same bytes, and a write that fails leaves what was there.

The stock writer puts metadata in a random order, so that the same run makes different files. Here the header is fixed:
metadata first and sorted, then the tensors by descending size of a value and by name, spaces up to a multiple of 8, so
that every tensor is aligned to its dtype. Files are written aside, fsynced, checked where the caller gives a check, and
only then renamed over the old one.
"""

import errno
import hashlib
import json
import os
import secrets
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from io import BufferedReader
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from vgm_peft.errors import DeltaError, SaveError
from vgm_peft.header import SIZES, Header, open_header, open_plain, shown

__all__ = ["bytes_of", "data_digest", "header_of", "open_header", "read_tensor", "read_tensors", "read_values", "save_file"]

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
EIGHT_BITS = ("F8_E4M3", "F8_E5M2")
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save_file(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write a safetensors file whole or not at all, and return its path; missing folders are made.

    `check` gets the path of the finished file before it takes its name; when it raises, nothing has happened. Raises
    `SaveError` when the file cannot be written (disk full, no permission); whatever stood there before is unharmed.
    """
    path = Path(path)
    aside = path.with_name(f".{secrets.token_hex(8)}.part")  # short, since the name itself may be as long as names can be
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(_header(tensors, metadata or {}))
            for chunk in _chunks(tensors):
                file.write(chunk)
            file.flush()
            _sync(file.fileno())
        if check is not None:
            check(aside)
        os.replace(aside, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _refusal(path, error) from None
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
    return path


def read_tensors(header: Header) -> dict[str, Tensor]:
    """Read all tensors of a file whose header was read, into memory of their own."""
    with open_plain(header.path) as file:
        return {name: _read(file, header, name) for name in header.tensors}


def read_values(header: Header) -> dict[str, Tensor]:
    """As `read_tensors`, for a file by strangers, whose tensors must hold something: real numbers.

    Eight-bit floats come as float16, which holds each of them exactly and which torch can calculate with. Raises
    `DeltaError` for an axis of length 0 and for complex numbers, which would lose their imaginary half.
    """
    for name, entry in header.tensors.items():
        if entry.dtype == "C64" or not prod(entry.shape):
            found = f"{entry.dtype} {'x'.join(map(str, entry.shape))}"
            raise DeltaError(f"{header.path}: tensor {shown(name)} is {found}", expected="real numbers, at least one")
    tensors = read_tensors(header)
    return {name: tensor.half() if header.tensors[name].dtype in EIGHT_BITS else tensor for name, tensor in tensors.items()}


def read_tensor(header: Header, name: str) -> Tensor:
    """Read one tensor of a file whose header was read, into memory of its own."""
    with open_plain(header.path) as file:
        return _read(file, header, name)


def data_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, over the data region that `save_file` writes for these tensors."""
    digest = hashlib.sha256()
    for chunk in _chunks(tensors):
        digest.update(chunk)
    return digest.hexdigest()


def window_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], start: int, length: int) -> str:
    """SHA-256, in hexadecimal, over some bytes of the file that `save_file` would write; over nothing where it ends before."""
    digest, at = hashlib.sha256(), 0
    for chunk in (memoryview(_header(tensors, metadata)), *_chunks(tensors)):
        digest.update(chunk[max(0, start - at) : max(0, start + length - at)])
        at += len(chunk)
        if at >= start + length:
            break
    return digest.hexdigest()


def header_of(entries: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return all of a file before its data; `entries` give dtype and shape by name, in the order of the data."""
    table: dict[str, object] = {}
    if metadata:
        table["__metadata__"] = {key: metadata[key] for key in sorted(metadata)}
    at = 0
    for name, (dtype, shape) in entries.items():
        end = at + prod(shape) * SIZES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes as they stand in a file."""
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    ordered = ((name, tensors[name]) for name in _ordered(tensors))
    return header_of({name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in ordered}, metadata)


def _ordered(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _chunks(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    for name in _ordered(tensors):
        yield bytes_of(tensors[name])


def _read(file: BufferedReader, header: Header, name: str) -> Tensor:
    entry = header.tensors[name]
    dtype = DTYPES[entry.dtype]
    if entry.start == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    file.seek(entry.start)
    tensor = torch.empty(entry.end - entry.start, dtype=torch.uint8)
    if file.readinto(tensor.numpy().data) != len(tensor):
        raise DeltaError(f"{header.path}: tensor {shown(name)} is cut short", fix="download or export it again")
    return tensor.view(dtype).reshape(entry.shape)


def _sync(number: int) -> None:
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network folders cannot sync, and say so this way
            raise


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself durable, where the system lets a folder be opened."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        _sync(number)
    finally:
        os.close(number)


def _refusal(path: Path, error: OSError) -> SaveError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SaveError(f"{path}: the disk is full", fix="free some space and save again; what was there before is unharmed")
    return SaveError(f"{path}: cannot be written ({error.strerror or error})", fix="choose another place with -o or --output")
