"""Finding delta files in folders that were named as libraries, and nowhere else."""

import os
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from vgm_peft.errors import DataError, DeltaError
from vgm_peft.picture import label
from vgm_peft.stack.files import DIGEST_OF, FileKind
from vgm_peft.stack.recipe import Stack

MAX_FILES = 10_000
DEPTH = 4
SKIPPED = {"checkpoints", "samples", "exports", "unet", "vae", "text_encoder", "text_encoder_2", "cache"}
"""Folders that hold weights which are no deltas to choose from."""


@dataclass(frozen=True)
class Found:
    """A delta file in a library: a short name that is unique in the listing, and its place."""

    name: str
    path: Path


def find(folders: Sequence[Path]) -> list[Found]:
    """List the `.safetensors` files of libraries by short names, sorted; a run's delta goes by the run's name.

    Symbolic links that lead out of their library, folders of models and hidden files are left out.
    """
    found: list[Found] = []
    taken: dict[str, int] = {}
    for folder in folders:
        for path in _files(folder):
            name = label(path.relative_to(folder.parent).as_posix())
            taken[name] = taken.get(name, 0) + 1
            found.append(Found(name if taken[name] == 1 else f"{name} ({taken[name]})", path))
    return sorted(found, key=lambda f: f.name.casefold())


def remake(picture: Path, libraries: Sequence[Path] = (), base: str = "") -> Stack:
    """Read the stack that a picture carries and find its files: beside it, where the command runs, in `runs`, in libraries.

    A base that the picture knows by a plain name is looked for there too, unless `base` says where it is. Raises what
    `picture.read_stack` and `locate` raise, and `DataError` for a library that is no folder.
    """
    from vgm_peft.picture import read_stack

    for library in libraries:
        if not library.is_dir():
            raise DataError(f"{library}: no such folder", fix="name the folder that holds the stack's files")
    stack = read_stack(picture)
    folders = [picture.absolute().parent, Path.cwd(), Path.cwd() / "runs", *(library.absolute() for library in libraries)]
    if base or "/" in stack.base or Path(stack.base).exists():
        return replace(locate(stack, folders), base=base or stack.base)
    places = (here / stack.base for folder in folders for here, below, names in _walk(folder) if stack.base in (*below, *names))
    found = next((place for place in places if place.is_file() or (place / "model_index.json").is_file()), None)
    return replace(locate(stack, folders), base=str(found) if found else stack.base)


def locate(stack: Stack, folders: Sequence[Path]) -> Stack:
    """Give the plain names of a stack read from a picture their places in the libraries, by digest, else by name.

    Raises `DeltaError` for a file that is in none of them, or of which only others of its name are there.
    """
    walked = cache(lambda: [each for folder in dict.fromkeys(folders) for each in _walk(folder)])
    files = cache(lambda: [path for folder in dict.fromkeys(folders) for path in _files(folder)])

    def find_it(kind: FileKind, name: str, digest: str) -> tuple[str, str]:
        if kind == "delta":
            by_part = [here.parent for here, _, names in walked() if "adapter_model.safetensors" in names]
            places = [*files(), *(p for p in dict.fromkeys(by_part) if p.as_posix().endswith(f"/{name}"))]
        elif kind == "network":
            places = [*(here for here, _, names in walked() if "config.json" in names), *files()]
        else:
            places = [here / name for here, _, names in walked() if name in names]
        return str(_match(name, digest, list(dict.fromkeys(places)), DIGEST_OF[kind])), digest

    return stack.renamed(find_it)


def _match(name: str, digest: str, places: Sequence[Path], of: Callable[[Path], str]) -> Path:
    named = [p for p in places if p.as_posix().endswith(f"/{name}")]
    if not digest and named:
        return named[0].absolute()
    for path in (*named, *(p for p in places if p not in named)):
        if digest == of(path):
            return path.absolute()
    if named:
        raise DeltaError(
            f'"{name}": {named[0]} has other bytes (SHA-256 {of(named[0])[:12]}...)',
            expected=f"{digest[:12]}...",
            fix="bring the old file back, or name the folder that holds it",
        )
    raise DeltaError(
        f'"{name}" ({digest[:12] or "no digest"}) is in none of the folders searched', fix="name the folder that holds it"
    )


def _files(folder: Path) -> Iterator[Path]:
    root, count = folder.resolve(), 0
    for here, below, names in _walk(folder, SKIPPED):
        if "model_index.json" in names or "config.json" in names:
            below.clear()
            continue
        for name in names:
            path = Path(here, name)
            if (
                name.endswith(".safetensors")
                and not name.startswith(".")
                and path.resolve().is_relative_to(root)
                and path.is_file()
            ):
                count += 1
                if count > MAX_FILES:
                    return
                yield path


def _walk(folder: Path, skipped: Container[str] = ()) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Walk a folder to `DEPTH` below it, in order, without what is hidden; whoever asks may take folders out of the lists."""
    for here, below, names in os.walk(folder):
        depth = len(Path(here).relative_to(folder).parts)
        below[:] = sorted(d for d in below if d not in skipped and not d.startswith(".") and depth < DEPTH)
        yield Path(here), below, sorted(names)
