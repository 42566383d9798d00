"""Finding delta files in folders that were named as libraries, and nowhere else."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vgm_peft.errors import DeltaError
from vgm_peft.picture import label
from vgm_peft.stack.recipe import Stack, delta_sha256, network_sha256

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


def locate(stack: Stack, folders: Sequence[Path]) -> Stack:
    """Give the plain names of a stack read from a picture their places in the libraries, by digest, else by name.

    Raises `DeltaError` for a file that is in none of them.
    """
    files = [path for folder in folders for path in _files(folder)]
    by_part = {p.parent.parent for folder in folders for p in folder.rglob("adapter_model.safetensors")} if stack.deltas else ()
    places = [*files, *(p for p in sorted(by_part) if any(p.as_posix().endswith(f"/{d.file}") for d in stack.deltas))]
    deltas = tuple(replace(d, file=str(_match(d.file, d.digest, places, delta_sha256))) for d in stack.deltas)
    networks = [p.parent for folder in folders for p in sorted(folder.rglob("config.json"))] if stack.controls else []
    controls = tuple(
        replace(
            c,
            network=str(_match(c.network, c.network_digest, [*networks, *files])),
            image=_picture(c.image, c.image_digest, folders),
            mask=_picture(c.mask, c.mask_digest, folders) if c.mask else "",
        )
        for c in stack.controls
    )
    return replace(stack, deltas=deltas, controls=controls)


def _picture(name: str, digest: str, folders: Sequence[Path]) -> str:
    return str(_match(name, digest, [p for folder in folders for p in sorted(folder.rglob(name))]))


def _match(name: str, digest: str, places: Sequence[Path], of: Callable[[Path], str] = network_sha256) -> Path:
    named = [p for p in places if p.as_posix().endswith(f"/{name}")]
    if not digest and named:
        return named[0].absolute()
    for path in (*named, *(p for p in places if p not in named)):
        if digest == of(path):
            return path.absolute()
    raise DeltaError(
        f'"{name}" ({digest[:12] or "no digest"}) is in none of the folders searched', fix="name the folder that holds it"
    )


def _files(folder: Path) -> Iterator[Path]:
    root, count = folder.resolve(), 0
    for here, below, names in os.walk(folder):
        depth = len(Path(here).relative_to(folder).parts)
        below[:] = sorted(d for d in below if d not in SKIPPED and not d.startswith(".") and depth < DEPTH)
        if "model_index.json" in names or "config.json" in names:
            below.clear()
            continue
        for name in sorted(names):
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
