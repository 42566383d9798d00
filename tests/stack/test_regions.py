"""Where regions are: shares of every place that add up to one; and what regional attention leaves as it was."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from tests.contract.ground import assert_close, base_of
from tests.stack_makers import make_delta
from vgm_peft.delta import Delta
from vgm_peft.errors import DataError
from vgm_peft.stack import DeltaUse, Region, Stack
from vgm_peft.stack.regions import Places, grid
from vgm_peft.stack.uses import Box

SIDES = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).filter(lambda pair: pair[0] < pair[1])
BOXES = st.tuples(SIDES, SIDES).map(lambda xy: (xy[0][0], xy[1][0], xy[0][1], xy[1][1]))


def places(*boxes: Box) -> Places:
    return Places(Stack(regions=tuple(Region(name=str(i), box=box) for i, box in enumerate(boxes))))


def saved(folder: Path, mask: Image.Image) -> Stack:
    mask.save(folder / "mask.png")
    return Stack(regions=(Region(name="r", mask="mask.png"),)).beginning_at(folder)


@settings(max_examples=40)
@example([(0.0, 1e-10, 1.0, 1.0)], 3, 1)
@given(st.lists(BOXES, min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 9))
def test_shares_add_up_to_one_everywhere_and_the_order_of_regions_is_all_one(boxes: list[Box], height: int, width: int) -> None:
    shares = places(*boxes).shares(height, width)
    assert shares.shape == (len(boxes) + 1, 1, height, width)
    assert bool((shares >= 0).all())
    assert_close(shares.sum(0), torch.ones(1, height, width, dtype=torch.float64))
    assert_close(places(*boxes[::-1]).shares(height, width)[1:].flip(0), shares[1:])


def test_a_box_has_the_part_of_a_place_that_it_covers() -> None:
    left, box = places((0.0, 0.5, 0.625, 1.0)).shares(2, 4)[:, 0]
    assert torch.equal(box, torch.tensor([[0.0, 0, 0, 0], [1, 1, 0.5, 0]]).double())
    assert torch.equal(left, 1 - box)


def test_regions_share_where_they_overlap_and_leave_nothing_where_they_meet() -> None:
    shares = places((0, 0, 0.75, 1), (0.25, 0, 1, 1)).shares(1, 4)[:, 0, 0]
    assert torch.equal(shares, torch.tensor([[0.0, 0, 0, 0], [1, 0.5, 0.5, 0], [0, 0.5, 0.5, 1]]).double())
    assert not places((0, 0, 0.3, 1), (0.3, 0, 1, 1)).shares(7, 7)[0].any()


def test_a_mask_of_any_size_is_stretched_over_the_picture(tmp_path: Path) -> None:
    mask = Image.new("L", (30, 50))
    mask.paste(255, (15, 0, 30, 50))
    _, region = Places(saved(tmp_path, mask)).shares(2, 10)[:, 0]
    row = torch.tensor([0.0] * 4 + [0.125, 0.875] + [1.0] * 4).double()  # a triangle as wide as two places, averaged
    assert float((region - row).abs().max()) < 0.1 and torch.equal(region[:, :4], torch.zeros(2, 4).double())
    _, grey = Places(saved(tmp_path, Image.new("L", (3, 3), 102))).shares(4, 4)
    assert_close(grey, torch.full((1, 4, 4), 0.4, dtype=torch.float64), torch.float32)


def test_a_mask_without_white_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="mask.png: black all over; expected a picture that is white where the region r is"):
        Places(saved(tmp_path, Image.new("RGB", (8, 8))))


def test_tokens_are_places_of_the_picture() -> None:
    assert grid((5, 8), 40) == (5, 8) and grid((5, 8), 3 * 4) == (3, 4) and grid((5, 8), 2 * 2) == (2, 2)
    with pytest.raises(DataError, match="regions on a layer of 41 tokens"):
        grid((9, 9), 41)


@torch.no_grad()
def first_attention(stack: Stack, given: Mapping[str, Delta]) -> Tensor:
    """What comes of the first block with a cross-attention in a drawing's only step, (places, channels), with the prompt."""
    base = base_of("sd15", torch.float64)
    made: list[Tensor] = []
    layer = base.denoiser.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0")
    with stack.on(base, given=given) as applied:
        hook = layer.register_forward_hook(lambda layer, args, out: made.append(out[-1]))
        chance, pipe = torch.Generator().manual_seed(0), cast(Any, base.pipe)
        pipe(**applied.prompting(), num_inference_steps=1, width=64, height=64, output_type="latent", generator=chance)
        hook.remove()
    return made[0]


def test_in_one_forward_what_a_region_s_delta_changes_in_cross_attentions_acts_there_alone() -> None:
    left = Region(name="left", prompt="a red toy", box=(0.0, 0.0, 0.5, 1.0))
    given = {"d": make_delta(base_of("sd15", torch.float64), "lora", 1, "cross-attention")}
    plain = first_attention(Stack(prompt="blue"), given)
    alone = first_attention(Stack(prompt="a red toy", deltas=(DeltaUse(file="d"),)), given)
    use = DeltaUse(file="d", region="left")
    mixed = first_attention(Stack(prompt="blue", regional="attention", regions=(left,), deltas=(use,)), given)
    inside = torch.arange(64) % 8 < 4
    assert_close(mixed[~inside], plain[~inside])
    assert_close(mixed[inside], alone[inside])
    assert not torch.allclose(alone, plain)
