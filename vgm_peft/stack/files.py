"""The files that a stack names: where it names them, and the digests by which they are known again."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from vgm_peft.digests import digests_of
from vgm_peft.errors import DeltaError

FileKind = Literal["delta", "network", "picture"]
Named = tuple[tuple[FileKind, str, str], ...]
"""For each file that a dataclass may name: what it is, the field of its name and that of its digest."""
Renaming = Callable[[FileKind, str, str], tuple[str, str]]
"""What a file is, its name and its digest -> the name and the digest it should have."""


class _Naming(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]
    files: ClassVar[Named]


N = TypeVar("N", bound=_Naming)


def with_files(naming: N, of: Renaming) -> N:
    """Return a copy of a dataclass in which every file that it names has the name and the digest that `of` gives it."""
    changes: dict[str, str] = {}
    for kind, key, digest in naming.files:
        if name := getattr(naming, key):
            changes[key], changes[digest] = of(kind, name, getattr(naming, digest))
    return replace(naming, **changes)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex; remembered if it is large. Raises `DeltaError` when it cannot be read."""
    try:
        return digests_of([path])[0]
    except OSError as error:
        raise DeltaError(f"{path}: cannot be read ({error.strerror})", fix="check the path") from None


def delta_sha256(path: Path) -> str:
    """SHA-256 of a delta's file, in hex; of a folder with one for every part over the names and bytes of all in it."""
    if not path.is_dir():
        return sha256(path)
    from vgm_peft.formats import files_of

    files = files_of(path)
    if len(files) == 1:
        return sha256(files[0])
    all_of = [p for file in files for p in (file, file.with_name("adapter_config.json")) if p.is_file()]
    return hashlib.sha256("".join(f"{p.relative_to(path).as_posix()}:{sha256(p)}\n" for p in all_of).encode()).hexdigest()


def network_sha256(folder: Path) -> str:
    """SHA-256 of a network's file, or over the names and bytes of the configuration and weights in its folder, in hex."""
    if folder.is_file():
        return sha256(folder)
    files = sorted(p for p in folder.glob("*") if p.suffix in (".safetensors", ".json"))
    if not files:
        raise DeltaError(
            f"{folder}: no network there", expected="a .safetensors file, or a folder with config.json and weights"
        )
    return hashlib.sha256("".join(f"{p.name}:{sha256(p)}\n" for p in files).encode()).hexdigest()


DIGEST_OF: Mapping[FileKind, Callable[[Path], str]] = {"delta": delta_sha256, "network": network_sha256, "picture": sha256}
