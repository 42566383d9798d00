"""The room of file formats: deltas read by sniffing, whatever tool wrote them, and written by name, checked before they count.

`read` and `write` are the two verbs; `FORMATS` is the table. A file is read whole or refused: every tensor is used or named
in the error. A file is written aside, read back, and compared by the change it makes, before it takes its name.
"""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from vgm_peft.delta import Delta
from vgm_peft.errors import ConfigError, DeltaError, nearest
from vgm_peft.family import Base
from vgm_peft.folders import replace_folder
from vgm_peft.formats import adapter, diffusers, embedding, kohya, lycoris, native, numbered
from vgm_peft.formats.books import book_of
from vgm_peft.formats.canonical import open_header, save_file
from vgm_peft.formats.compare import check_change, check_words, identical
from vgm_peft.formats.format import Format, Parcel
from vgm_peft.formats.parts import PartsFolder, parts_folder
from vgm_peft.formats.stamps import sealed
from vgm_peft.header import Header, listed
from vgm_peft.site import locate

__all__ = ["FORMATS", "files_of", "format_named", "open_header", "read", "sniff", "write", "write_all"]

FORMATS: Mapping[str, Format] = MappingProxyType(
    {module.FORMAT.name: module.FORMAT for module in (native, adapter, numbered, lycoris, kohya, diffusers, embedding)}
)
"""Every format, in the order in which a file is offered to them."""

IN_FOLDER = ("delta.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""The delta's file in a run's folder, in one of diffusers, in one of peft."""


def format_named(name: str) -> Format:
    """Return a format by its name; what a tool can have of it, `targets` knows. Raises `ConfigError` with the nearest name."""
    found = FORMATS.get(name)
    if found is None:
        raise ConfigError(f'no format is called "{name}"', fix=nearest(name, [*FORMATS]))
    return found


def sniff(path: str | os.PathLike[str]) -> str:
    """Return the name of a file's format, from its header alone. Raises `DeltaError` when it is none of them."""
    return _recognised(open_header(files_of(path)[0])).name


def read(path: str | os.PathLike[str], base: Base | None = None) -> Delta:
    """Read a delta from a file, from the folder of a run, or from one with a folder of peft's for every part.

    With a base everything is checked against it. Without, the family and the shapes come from the file. Raises
    `DeltaError` when the file is damaged, holds a tensor that is not understood, or belongs to another family.
    """
    found = _found(path)
    if isinstance(found, Path):
        delta = _read(open_header(found), base)
    else:
        with _same_chance():
            delta = found.read(base)
    if base is not None:
        _check_fit(delta, base, found if isinstance(found, Path) else found.path)
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
    foreign weight files and go to files of their own beside it (`write_all`). Raises `DeltaError` when the format cannot
    hold the delta exactly, `SaveError` when the disk refuses; an older file of that name then stays as it was.
    """
    return write_all(delta, path, format, base, dtype=dtype)[0]


def write_all(
    delta: Delta,
    path: str | os.PathLike[str],
    format: str = "native",
    base: Base | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> list[Path]:
    """As `write`; return the paths of all files that were made: the main one first, then those of the trained tokens."""
    chosen = format_named(format)
    path = place_for(path, chosen)
    check_family("the delta", delta, base)
    parcels = chosen.spell(delta, base, dtype)
    if chosen.name != native.FORMAT.name:  # whose metadata is the delta's own, to the letter
        parcels = {ending: sealed(parcel, {}) for ending, parcel in parcels.items()}
    return put(parcels, path, chosen, Meant(delta, base, dtype, chosen.by_part))


@dataclass(frozen=True)
class Meant:
    """What files are to mean when they are read back: a delta, up to the rounding of a dtype."""

    delta: Delta
    base: Base | None
    dtype: torch.dtype | None

    by_part: bool = False
    """Every file holds the changes of one part only."""

    def check(self, file: Path) -> None:
        """Raise `DeltaError` unless a file that was just written holds the delta, or its share of it: a part, or a token."""
        header = open_header(file)
        written = _read(header, self.base)
        if _recognised(header).name == native.FORMAT.name:
            if not identical(self.delta, written):
                raise DeltaError(f"{file}: what was read back is not what was written", fix="report this as a fault")
        elif written.words:
            check_words(_only(self.delta, written), written, self.dtype)
        else:
            meant = _share(self.delta, written) if self.by_part else self.delta
            check_change(meant, written, self.base, self.dtype)


def put(parcels: Mapping[str, Parcel], path: Path, format: Format, meant: Meant) -> list[Path]:
    """Write spelled files, each read back and compared before it takes its name, and return their paths.

    A folder is put in its place whole. Raises `DeltaError` when a file does not mean what it should, `SaveError`.
    """
    parts = {patch.site.part for patch in meant.delta}
    if format.by_part and sum(parcel.titled for parcel in parcels.values()) != len(parts):
        raise DeltaError(f"{path}: {len(parcels)} files for {', '.join(sorted(parts))}", fix="report this as a fault")
    if not format.folder:
        for ending, parcel in parcels.items():
            save_file(parcel.tensors, _named(path, ending), parcel.metadata, check=meant.check)
        return [_named(path, ending) for ending in parcels]
    with replace_folder(path, lambda old: all((old / name).is_file() for name in parcels)) as aside:
        for name, parcel in parcels.items():
            (aside / name).parent.mkdir(exist_ok=True)
            for beside, text in parcel.beside.items():
                (aside / name).with_name(beside).write_text(text, encoding="utf-8")
            save_file(parcel.tensors, aside / name, parcel.metadata)
            meant.check(aside / name)
    return [path / name for name in parcels]


def place_for(path: str | os.PathLike[str], format: Format) -> Path:
    """Return where a format is to be written. Raises `DeltaError` for a folder in a file's place, or a file in a folder's."""
    path = Path(path)
    if format.folder and path.is_file():
        raise DeltaError(f"{path}: a file is there", expected="the name of a folder")
    if not format.folder and path.is_dir():
        raise DeltaError(f"{path}: a folder is there", expected="the name of a file")
    return path


def _named(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.stem}{ending}{path.suffix}") if ending else path


def _share(delta: Delta, written: Delta) -> Delta:
    """Return the delta's patches on the parts that a file has, where its format has a file for each part."""
    parts = {patch.site.part for patch in written}
    return Delta(delta.family, {name: patch for name, patch in delta.patches.items() if patch.site.part in parts})


def _only(delta: Delta, written: Delta) -> Delta:
    return Delta(delta.family, {}, {token: word for token, word in delta.words.items() if token in written.words})


def files_of(path: str | os.PathLike[str]) -> list[Path]:
    """Return the files of tensors of a delta that is a file or a folder, the main one first. Raises `DeltaError` as `read`."""
    found = _found(path)
    return [found] if isinstance(found, Path) else found.files


def _found(path: str | os.PathLike[str]) -> Path | PartsFolder:
    """Return the delta's file for a file or the folder that holds it, or a folder of parts."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in IN_FOLDER:
        if (path / name).is_file():
            return path / name
    parts = parts_folder(path)
    if parts is not None:
        return parts
    below = sorted({found.parent for name in IN_FOLDER for found in path.glob(f"*/{name}")})
    fix = f"name one of the folders in it, such as {below[0]}" if below else "name the file itself"
    raise DeltaError(f"{path}: no delta in this folder", expected=" or ".join(IN_FOLDER), fix=fix)


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
    with _same_chance():
        return format.read(header, base)


def _same_chance() -> AbstractContextManager[None]:
    """Initial values that are overwritten must not shift the caller's random numbers."""
    return torch.random.fork_rng(devices=[])


def check_family(what: str, delta: Delta, base: Base | None) -> None:
    """Raise `DeltaError` for a base of another family than the delta's."""
    if base is not None and delta.family != base.family.name:
        raise DeltaError(
            f"{what}: a delta of {delta.family}, but {base.source} is of {base.family.name}",
            fix=f"use it with a base of {delta.family}",
        )


def _check_fit(delta: Delta, base: Base, where: Path) -> None:
    """Raise `DeltaError` unless every patch and token of a delta fits a base."""
    check_family(str(where), delta, base)
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
        found = {part: rows.shape[-1] for part, rows in word.rows.items()}
        if any(widths.get(part) != width for part, width in found.items()):
            raise DeltaError(f"{where}: the vectors of {listed([word.token])} have the widths {found}", expected=f"{widths}")
