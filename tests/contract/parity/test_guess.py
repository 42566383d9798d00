"""Guess mode: the authors' shares for each layer beside diffusers' own."""

import pytest
import torch

from vgm_peft.sides.controlnet import _shares  # pyright: ignore[reportPrivateUsage]


def test_the_authors_shares_are_diffusers_to_less_than_a_hundredth() -> None:
    """0.825 is 10^(-1/12) = 0.82540 in three digits: of 13 layers the first has the largest difference, the last none."""
    ours, theirs = torch.tensor(_shares(13), dtype=torch.float64), torch.logspace(-1, 0, 13, dtype=torch.float64)
    apart = theirs / ours - 1
    assert float(apart[0]) == pytest.approx((10 ** (-1 / 12) / 0.825) ** 12 - 1) and 0.005 < float(apart[0]) < 0.006
    assert float(apart[-1]) == 0 and bool((apart.diff() < 0).all())
