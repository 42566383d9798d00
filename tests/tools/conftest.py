"""A tiny base of each family, in memory and in a folder: tests leave both as they are."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from vgm_peft.family import Base


@pytest.fixture(scope="session")
def shared(tiny: Callable[[str], Base]) -> Callable[[str], Base]:
    """`shared("sd15")` is one tiny base for all tests."""
    return cache(tiny)


@pytest.fixture(scope="session")
def base(shared: Callable[[str], Base]) -> Base:
    return shared("sd15")


@pytest.fixture(scope="session")
def folder(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base as diffusers writes it."""
    path = tmp_path_factory.mktemp("base") / "tiny"
    base.pipe.save_pretrained(path)
    return path
