"""Tiny bases of every family, checked after each test: whatever a test attached, the base must be what it was, bit for bit."""

from collections.abc import Iterator

import pytest
import torch

from tests.contract.ground import State, base_of
from vgm_peft.families import TABLE as FAMILIES
from vgm_peft.family import Base


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def base(family: str) -> Iterator[Base]:
    """A tiny float32 base."""
    yield from _watched(base_of(family))


@pytest.fixture
def base64(family: str) -> Iterator[Base]:
    """The same in float64, for algebra."""
    yield from _watched(base_of(family, torch.float64))


def _watched(base: Base) -> Iterator[Base]:
    state = State.of(base.parts)
    yield base
    state.check(base.parts)
