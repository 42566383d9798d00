"""For all tests: no network, one thread (tiny models gain nothing from more), the user's cache left alone, tiny bases."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", GRADIO_ANALYTICS_ENABLED="False", TOKENIZERS_PARALLELISM="false")

import pytest
from hypothesis import settings

# Examples take as long as they take (the machine may be busy); CI draws the same ones every time, a desk new ones.
settings.register_profile("desk", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "desk")

if TYPE_CHECKING:
    from vgm_peft.family import Base


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the user's own cache out of the tests, and the tests out of it (subprocesses inherit this)."""
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root))
        yield root


@pytest.fixture(scope="session")
def tiny() -> "Callable[[str], Base]":
    """`tiny("sd15")` is a new, frozen base of that family, of the real classes with seeded random weights (0.3 s)."""
    from vgm_peft.families import family_named
    from vgm_peft.family import Base

    def make(name: str) -> "Base":
        family = family_named(name)
        return Base(family.tiny(), family, f"tiny {name}").freeze()

    return make
