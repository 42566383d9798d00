"""A content-keyed store of small tensors on disk, shared by all runs of a user.

A key is the SHA-256 of everything that decides a value, so an entry is never stale: what changed has another key. Entries
are written aside and renamed, so that readers and several writers never meet half of one, and carry a checksum that is
verified at reading: a damaged entry is a miss, and is said. A cache that cannot be used costs time, never a run. What has
not been used for longest goes first when it grows too large; see `space.py`.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vgm_peft.data.space import Space
from vgm_peft.folders import cache_folder

CODE_VERSION = 1
"""Raised by hand whenever the same inputs come to mean other values."""

_log = logging.getLogger(__name__)
_CHECKSUM = "sha256"


def key_of(kind: str, *parts: str | bytes | int) -> str:
    """Return the key of a value: SHA-256 over its kind, the code version and all that decides it, in order."""
    digest = hashlib.sha256()
    for part in (kind, CODE_VERSION, *parts):
        raw = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        # Lengths and types are hashed too, so that no two lists of parts run into one another.
        digest.update(f"{type(part).__name__}:{len(raw)}:".encode())
        digest.update(raw)
    return digest.hexdigest()


class Cache:
    """Dictionaries of tensors by key. `notes` gathers what a user should be told; each is logged as a warning once."""

    def __init__(self, root: Path | None = None, *, enabled: bool = True, gib: float | None = None) -> None:
        """Use the folder `root` (made when first written), by default the user's own; unless `enabled` it stays empty.

        `gib` is the largest size in GiB; left out, what the environment says (`VGM_CACHE_GIB`), else `space.GIB`.
        """
        self.root = cache_folder() if root is None else root
        self.notes: list[str] = []
        self._readable = self._writable = enabled
        self._space = Space(self.root, gib)

    def get(self, key: str, fits: Callable[[Mapping[str, Tensor]], bool] | None = None) -> dict[str, Tensor] | None:
        """Return the tensors of a key, or `None`: no such entry, or one that is damaged or that `fits` denies."""
        if not self._readable:
            return None
        path = self._path(key)
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._say(f"cache {self.root} cannot be read ({error.strerror}); its values are computed again")
            return None
        tensors = _parse(raw, key)
        if tensors is None or (fits is not None and not fits(tensors)):
            self._say(f"cache entry {path.name} in {self.root} is damaged; it is computed again")
            return None
        self._space.used(path)
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors under a key. A full disk or a folder that may not be written is noted, not raised."""
        if not self._writable:
            return
        path = self._path(key)
        aside = path.with_name(f".{path.name}.{os.getpid()}.{uuid4().hex[:8]}")
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        raw = save(whole, {_CHECKSUM: _checksum(whole, key)})
        try:  # no fsync: after a power cut a hollow entry fails its checksum and is made again
            path.parent.mkdir(parents=True, exist_ok=True)
            self._space.claim()
            aside.write_bytes(raw)
            os.replace(aside, path)
            over = self._space.grown(len(raw))
        except OSError as error:
            self._writable = False
            self._say(f"cache {self.root} cannot be written ({error.strerror}); going on without it")
            _forget(aside)
        else:
            if over:
                self._say(over)

    def close(self) -> None:
        """Say that this run needs none of its entries any more; it may be used further."""
        self._space.release()

    def _path(self, key: str) -> Path:
        return self.root / key[:2] / f"{key}.safetensors"

    def _say(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)
            _log.warning(note)


def _parse(raw: bytes, key: str) -> dict[str, Tensor] | None:
    """Return the tensors of an entry, or `None` when it is not whole and right."""
    try:
        tensors = load(raw)
        header: Any = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        right = cast(Mapping[str, str], header["__metadata__"])[_CHECKSUM]
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AttributeError):
        return None
    return tensors if _checksum(tensors, key) == right else None


def _checksum(tensors: Mapping[str, Tensor], key: str) -> str:
    """Return SHA-256 over names, types, shapes, values and the key itself (an entry under another's name is wrong too)."""
    digest = hashlib.sha256(key.encode())
    for name in sorted(tensors):
        update_with(digest, name, tensors[name])
    return digest.hexdigest()


class Hash(Protocol):
    """What `hashlib` makes, as far as we use it."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Feed bytes."""
        ...


def update_with(digest: Hash, name: str, tensor: Tensor) -> None:
    """Feed a named tensor to a hash: name, type, shape and bytes (on the CPU, in any dtype)."""
    digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    flat = tensor.detach().cpu().contiguous().view(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)


def _forget(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # what cannot be written cannot be deleted either; the note has been made
