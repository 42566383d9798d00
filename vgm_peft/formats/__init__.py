"""The room of file formats: deltas read by sniffing, whatever tool wrote them, and written by name, checked before they count.

`read` and `write` are the two verbs; `FORMATS` is the table. A file is read whole or refused: every tensor is used or named
in the error. A file is written aside, read back, and compared by the change it makes, before it takes its name.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from vgm_peft.delta import Delta
from vgm_peft.errors import ConfigError, DeltaError, nearest
from vgm_peft.family import Base
from vgm_peft.formats import diffusers, embedding, kohya, native
from vgm_peft.formats.books import book_of
from vgm_peft.formats.canonical import open_header, save_file
from vgm_peft.formats.compare import check_change, check_words, identical
from vgm_peft.formats.format import Format, Parcel
from vgm_peft.formats.header import Header, listed
from vgm_peft.site import locate

__all__ = ["ALIASES", "FORMATS", "file_of", "format_named", "names_of", "open_header", "read", "sniff", "write"]

FORMATS: Mapping[str, Format] = MappingProxyType(
    {module.FORMAT.name: module.FORMAT for module in (native, kohya, diffusers, embedding)}
)
"""Every format, in the order in which a file is offered to them."""

ALIASES: Mapping[str, str] = MappingProxyType(dict.fromkeys(("comfyui", "a1111", "forge", "invokeai"), "kohya"))
"""Names of tools -> the format that they read."""

IN_FOLDER = ("delta.safetensors", "pytorch_lora_weights.safetensors")
"""The delta's file in a run's folder, and in one of diffusers."""


def format_named(name: str) -> Format:
    """Return a format by its name or by that of a tool. Raises `ConfigError` with the nearest known name."""
    found = FORMATS.get(ALIASES.get(name, name))
    if found is None:
        raise ConfigError(f'no format is called "{name}"', fix=nearest(name, [*FORMATS, *ALIASES]))
    return found


def sniff(path: str | os.PathLike[str]) -> str:
    """Return the name of a file's format, from its header alone. Raises `DeltaError` when it is none of them."""
    return _recognised(open_header(file_of(path))).name


def read(path: str | os.PathLike[str], base: Base | None = None) -> Delta:
    """Read a delta from a file, or from the folder of a run, whatever tool wrote it.

    With a base everything is checked against it. Without, the family and the shapes come from the file. Raises
    `DeltaError` when the file is damaged, holds a tensor that is not understood, or belongs to another family.
    """
    header = open_header(file_of(path))
    delta = _read(header, base)
    if base is not None:
        _check_fit(delta, base, header.path)
    return delta


def write(
    delta: Delta,
    path: str | os.PathLike[str],
    format: str = "native",
    base: Base | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a delta, read it back, compare, and only then let it take its name; return the path of the main file.

    `base` is needed only by kinds whose change depends on the base's weights, and for bases of a block structure never
    published. `dtype` rounds the values of foreign formats; by default they keep theirs. Trained tokens have no place in
    foreign weight files and go to files of their own beside it (`names_of`). Raises `DeltaError` when the format cannot
    hold the delta exactly, `SaveError` when the disk refuses; an older file of that name then stays as it was.
    """
    path, chosen = Path(path), format_named(format)
    if path.is_dir():
        raise DeltaError(f"{path}: a folder is there", expected="the name of a file")
    if base is not None and delta.family != base.family.name:
        raise _other_family("the delta", delta, base)
    parcels = chosen.spell(delta, base, dtype)
    for ending, parcel in parcels.items():

        def check(aside: Path, parcel: Parcel = parcel) -> None:
            written = _read(open_header(aside), base)
            if chosen.name == native.FORMAT.name:
                if not identical(delta, written):
                    raise DeltaError(f"{path}: what was read back is not what was written", fix="report this as a fault")
            elif written.words:
                check_words(_only(delta, written), written, dtype)
            else:
                check_change(delta, written, base, dtype)

        save_file(parcel.tensors, _named(path, ending), parcel.metadata, check=check)
    return _named(path, next(iter(parcels)))


def names_of(delta: Delta, path: str | os.PathLike[str], format: str = "native") -> list[Path]:
    """Return the paths of the files that `write` makes: the main one first, then those of the trained tokens."""
    if format_named(format).name == native.FORMAT.name:
        return [Path(path)]
    words = list(embedding.parcels(delta, None, plain=True))
    endings = ["", *words] if delta.patches else words if len(words) > 1 else [""]
    return [_named(Path(path), ending) for ending in endings]


def _named(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.stem}{ending}{path.suffix}") if ending else path


def _only(delta: Delta, written: Delta) -> Delta:
    return Delta(delta.family, {}, {token: word for token, word in delta.words.items() if token in written.words})


def file_of(path: str | os.PathLike[str]) -> Path:
    """Return the delta's file for a file or the folder that holds it. Raises `DeltaError` when the folder has none."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in IN_FOLDER:
        if (path / name).is_file():
            return path / name
    raise DeltaError(f"{path}: no delta in this folder", expected=" or ".join(IN_FOLDER), fix="name the file itself")


def _recognised(header: Header) -> Format:
    for format in FORMATS.values():
        if format.recognises(header):
            return format
    names = list(header.tensors)
    raise DeltaError(
        f"{header.path}: not a delta of a known format ({listed(names) if names else 'it holds no tensor'})",
        expected="one of " + ", ".join(FORMATS),
        fix="a whole checkpoint is given as the base, with --base" if header.size > 500_000_000 else "",
    )


def _read(header: Header, base: Base | None) -> Delta:
    format = _recognised(header)
    with torch.random.fork_rng(devices=[]):  # initial values that are overwritten must not shift the caller's random numbers
        return format.read(header, base)


def _other_family(what: str, delta: Delta, base: Base) -> DeltaError:
    return DeltaError(
        f"{what}: a delta of {delta.family}, but {base.source} is of {base.family.name}",
        fix=f"use it with a base of {delta.family}",
    )


def _check_fit(delta: Delta, base: Base, where: Path) -> None:
    """Raise `DeltaError` unless every patch and token of a delta fits a base."""
    if delta.family != base.family.name:
        raise _other_family(str(where), delta, base)
    wrong: list[DeltaError] = []
    for patch in delta:
        try:
            locate(base.parts, patch.site)
        except DeltaError as error:
            wrong.append(error)
    if wrong:
        raise DeltaError(
            f"{where}: {len(wrong)} of {len(delta.patches)} changes do not fit {base.source}; the first: {wrong[0]}"
        )
    widths = embedding.widths(book_of(base)) if delta.words else {}
    for word in delta.words.values():
        found = {part: rows.shape[1] for part, rows in word.rows.items()}
        if any(widths.get(part) != width for part, width in found.items()):
            raise DeltaError(f"{where}: the vectors of {listed([word.token])} have the widths {found}", expected=f"{widths}")
