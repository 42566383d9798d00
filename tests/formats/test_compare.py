"""The comparison that every written file has to pass: one value that is off is found, whatever the dtype and the way."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch

from tests.formats.ground import make_delta
from vgm_peft.delta import Delta
from vgm_peft.deltas.lora import Lora, LoraOptions
from vgm_peft.errors import DeltaError
from vgm_peft.family import Base
from vgm_peft.formats.compare import check_change

Make = Callable[[str], Base]
LAYERS = ("*down_blocks.0*attn1.to_q.weight", "*down_blocks.0*attn1.to_k.weight")
"""Two of one sort: the first is compared densely, the second by its spelling."""


@pytest.fixture
def base(shared: Make) -> Base:
    return shared("sd15")


def pairs(delta: Delta) -> list[Lora]:
    return [patch for patch in delta if isinstance(patch, Lora)]


@pytest.mark.parametrize("which", (0, 1))
@pytest.mark.parametrize(
    "dtype,off", ((torch.float64, 1e-4), (torch.float32, 1e-3), (torch.float16, 0.2), (torch.float32, float("nan")))
)
def test_one_value_that_is_off_is_found(dtype: torch.dtype, off: float, which: int, base: Base) -> None:
    meant = make_delta(base, "lora", LAYERS, rank=3, alpha=2.0).to(dtype=dtype)
    assert len({patch.site.shape for patch in meant}) == 1 < len(meant.patches)
    written = deepcopy(meant)
    check_change(meant, written, None, None)
    with torch.no_grad():
        up = pairs(written)[which].up
        up[1, 1] += off * up.abs().max()
    with pytest.raises(DeltaError, match="differs by"):
        check_change(meant, written, None, None)


def test_a_scale_may_move_into_a_factor(base: Base) -> None:
    meant = make_delta(base, "lora", LAYERS, rank=3, alpha=2.0)
    written = deepcopy(meant)
    for patch in pairs(meant):
        folded = Lora(patch.site, LoraOptions(rank=3))
        folded.load_state_dict({"down": patch.down, "up": patch.up * (2 / 3)})
        written.patches[patch.site.name] = folded
    check_change(meant, written, None, None)


def test_halves_whose_product_is_no_half_are_compared_too(base: Base) -> None:
    """65504 is the largest half; of such products only not-a-numbers would be left to compare."""
    meant = make_delta(base, "lora", LAYERS, rank=3)
    with torch.no_grad():
        for patch in pairs(meant):
            patch.down.fill_(300.0)
            patch.up.fill_(300.0)
    meant.to(dtype=torch.float16)
    check_change(meant, deepcopy(meant), None, torch.float16)
