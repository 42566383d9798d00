"""Different rows of one batch under different deltas: each row is what it would be alone, whatever the kinds."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.contract.ground import assert_close, base_of, draw, predict
from tests.contract.test_deltas import CASES, LAYERS, delta_on, inputs, pair, place
from vgm_peft.attachment import Attachment
from vgm_peft.delta import Delta
from vgm_peft.deltas import TABLE
from vgm_peft.errors import DeltaError

PLACES = ("linear", "3x3, stride 2", "group norm", "embedding", "bias of a linear", "bias of a group norm")
BESIDE = ("bitfit", "ia3", "lora", "norm", "oft")
"""Kinds that act on the input, at the output, by what is derived for all together, and as vectors that join theirs so."""


def on(delta: Delta, net: nn.Module, strength: float, rows: "slice | Tensor | None" = None) -> Attachment:
    attachment = Attachment({"part": net}, delta, strength)
    attachment.rows = rows
    return attachment


def delta_at(net: nn.Sequential, kind: str, index: int, name: str) -> Delta:
    """A delta of one patch in float64, on the weight of the only layer of a net, or its bias where the name says so."""
    drawn = pair(kind, index, net[0], name=name)
    site = replace(drawn.site, module="0")
    patch = TABLE[kind](site, drawn.options).double()
    draw(patch)
    return Delta("any", {site.name: patch})


def changed_by(kind: str) -> list[str]:
    return [name for name in PLACES if place(name, LAYERS[name][0]()).op in TABLE[kind].ops]


@pytest.mark.parametrize(("kind", "index", "name"), [(*case, name) for case in CASES for name in changed_by(case[0])])
@torch.no_grad()
def test_the_rows_that_are_not_chosen_are_bit_for_bit_those_without_it(kind: str, index: int, name: str) -> None:
    """Beside another delta on all rows, in every way that it may act; the chosen rows are those of a delta on all."""
    make, shape = LAYERS[name]
    net = nn.Sequential(make().double()).requires_grad_(False)
    x = torch.cat([inputs(net[0], shape)] * 3)[:3]
    mine = torch.tensor([True, False, True])
    delta = delta_at(net, kind, index, name)
    op = next(iter(delta)).site.op
    for other in (k for k in BESIDE if op in TABLE[k].ops):
        with on(delta_at(net, other, 0, name), net, 0.6):
            net(x)  # from the second forward on, vectors are added for all layers at once
            absent = net(x)
            with on(delta, net, 0.7) as attachment:
                everywhere = net(x)
                attachment.rows = torch.tensor([2, 0])
                found = net(x)
                attachment.rows = slice(0, 0)
                nothing = net(x)
                attachment.rows, attachment.strength = slice(0, 2), 0.0
                resting = net(x)
        assert torch.equal(nothing, absent) and torch.equal(resting, absent)
        assert torch.equal(found[~mine], absent[~mine])
        assert_close(found[mine], everywhere[mine])
        assert not torch.equal(found[mine], absent[mine])


@pytest.mark.parametrize("kind", ["diff", "tlora"])
@torch.no_grad()
def test_every_row_of_a_whole_base_is_what_it_is_alone(kind: str) -> None:
    """Text encoders, whose positions are one row for all, and a denoiser with three rows: a delta, none, another."""
    base = base_of("sd15", torch.float64)
    first, second = delta_on(base, kind), delta_on(base, kind, -1, seed=2)
    for seed, delta in enumerate((first, second)):
        draw(delta, seed + 1, 0.05)
    rows = (slice(0, 1), slice(2, None))
    pairs = [(Attachment(base.parts, delta, 0.6), row) for delta, row in zip((first, second), rows, strict=True)]
    for attachment, row in pairs:
        attachment.rows = row
    together = predict(base, 3)
    for attachment, _ in pairs:
        attachment.rows, attachment.strength = None, 0.0
    plain = predict(base, 3)
    for attachment, row in pairs:
        attachment.strength = 0.6
        assert_close(together[row], predict(base, 3)[row])
        attachment.strength = 0.0
    assert torch.equal(together[1], plain[1]) and not torch.equal(together[0], plain[0])
    for attachment, _ in pairs:
        attachment.remove()


def test_rows_that_a_call_does_not_have_are_an_error() -> None:
    net = nn.Sequential(nn.Linear(24, 16)).double()
    delta = delta_at(net, "lora", 0, "linear")
    for rows in (slice(1, 3), torch.tensor([0, 2])):
        with on(delta, net, 1.0, rows), pytest.raises(DeltaError, match="of a call with 2"):
            net(torch.ones(2, 5, 24).double())
    with pytest.raises(DeltaError, match="the numbers of rows"), on(delta, net, 1.0) as attachment:
        attachment.rows = torch.tensor([True, False])
