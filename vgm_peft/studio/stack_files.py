"""Stacks that leave the page as TOML, and come back from TOML or from a picture: always with plain names, never with paths."""

from dataclasses import replace
from pathlib import Path

from vgm_peft.errors import ConfigError
from vgm_peft.picture import portable, read_stack
from vgm_peft.stack.recipe import Stack
from vgm_peft.studio.shelf import Shelf

MAX_BYTES = 200_000
"""Of a stack file; one of a hundred deltas takes a tenth."""


def stack_text(shelf: Shelf, stack: Stack) -> str:
    """A stack in the library's names as TOML, every file by its plain name and SHA-256. Raises `VgmError`."""
    placed = shelf.placed(replace(stack, base=shelf.settings.base)).pinned()
    return portable(placed).toml()


def open_stack(shelf: Shelf, path: Path) -> Stack:
    """Read a stack from a TOML file or a PNG made here, and name its files as the library does.

    Raises `VgmError` for what is no stack, and for files that are not in the library or have other bytes.
    """
    if path.suffix.lower() == ".png":
        return shelf.named(read_stack(path))
    if path.suffix.lower() != ".toml" or not path.is_file():
        raise ConfigError(f'"{path.name[:100]}"', expected="a stack file (.toml), or a picture made here (.png)")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path.name[:100]}: {path.stat().st_size:,} bytes", expected=f"at most {MAX_BYTES:,}")
    return shelf.named(portable(Stack.read(path)))
