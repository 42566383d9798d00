"""Tiny bases shared by the tests that only read them."""

from collections.abc import Callable
from functools import cache

import pytest

from vgm_peft.family import Base


@pytest.fixture(scope="session")
def shared(tiny: Callable[[str], Base]) -> Callable[[str], Base]:
    """`shared("sd15")` is one tiny base for all tests, which must leave it as it is."""
    return cache(tiny)
