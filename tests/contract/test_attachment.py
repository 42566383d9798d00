"""The attachment engine: whatever is put on, in whatever order and however it ends, the base comes back untouched."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.contract.ground import Gain, NoOptions, State, assert_close, delta_of, draw, predict, sites_for, tiny_net
from vgm_peft.attachment import Attachment, Fusion, attached, attachments
from vgm_peft.delta import Delta, apply_dense
from vgm_peft.deltas import TABLE
from vgm_peft.errors import DeltaError
from vgm_peft.family import Base
from vgm_peft.site import Op, find_sites

KINDS = list(TABLE)


# --- nothing is left behind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_inside_forward(base: Base, kind: str) -> None:
    """The base is usable and removable in the middle of what went wrong (the fixture checks that it is as before)."""
    method = TABLE[kind]
    delta = Delta.fit(base.family.name, method, sites_for(method, base), method.examples[0]).train(False)
    draw(delta, size=0.05)
    last = list(delta)[-1]
    with torch.no_grad():
        expected = predict(base)
        with pytest.raises(RuntimeError, match="in the middle"), Attachment(base.parts, delta):
            for way in ("add_to", "add_feed", "add_change"):  # at the output, at the input, in the weight
                setattr(last, way, raising)
            predict(base)
        assert torch.equal(predict(base), expected)


def raising(*_: object) -> Tensor:
    raise RuntimeError("in the middle")


class Reluctant(nn.Linear):
    """A layer that takes no hooks."""

    def register_forward_hook(self, *_: object, **__: object) -> torch.utils.hooks.RemovableHandle:
        raise RuntimeError("no hooks here")


def test_attaching_that_fails_half_way_leaves_nothing() -> None:
    net = tiny_net()
    net.append(Reluctant(8, 8).double())
    state = State.of({"net": net})
    with pytest.raises(RuntimeError, match="no hooks here"):
        Attachment({"net": net}, delta_of(net, TABLE[KINDS[0]]))
    state.check({"net": net})
    stranger = delta_of(nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4)), TABLE[KINDS[0]])
    for put_on in (lambda: Attachment({"net": net}, stranger), lambda: Fusion({"net": net}, [(stranger, 1.0)])):
        with pytest.raises(DeltaError, match="net.2 linear 4x16: the base has 8x16 there"):
            put_on()
        state.check({"net": net})


def test_fusing_that_fails_half_way_leaves_nothing() -> None:
    net = tiny_net()
    state = State.of({"net": net})
    delta = delta_of(net, TABLE[KINDS[0]])
    list(delta)[-1].change = raising  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(RuntimeError, match="in the middle"):
        Fusion({"net": net}, [(delta, 1.0)])
    state.check({"net": net})


def test_weights_that_cannot_be_fused_are_named() -> None:
    net = tiny_net()
    net[0].weight = net.append(nn.Linear(8, 16)).double()[3].weight
    delta = delta_of(tiny_net(), TABLE[KINDS[0]])
    with pytest.raises(DeltaError, match=r"net\.0 linear 16x8: this tensor is shared"):
        Fusion({"net": net}, [(delta, 1.0)])
    with pytest.raises(DeltaError, match="not in memory"):
        Fusion({"net": tiny_net().to("meta")}, [(delta, 1.0)])
    net = tiny_net()
    net[2].weight = nn.Parameter(torch.zeros(8, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(DeltaError, match=r"net\.2 linear 8x16: its values are quantised"):
        Fusion({"net": net}, [(delta, 1.0)])


def test_a_shared_layer_is_changed_alone_when_live() -> None:
    net = tiny_net()
    net.append(nn.Linear(8, 16)).double()
    net[3].weight = net[0].weight
    x = torch.ones(1, 8, dtype=torch.float64)
    expected = net[3](x)
    with Attachment({"net": net}, delta_of(tiny_net(), TABLE[KINDS[0]])):
        assert torch.equal(net[3](x), expected) and not torch.equal(net[0](x), tiny_net()[0](x))


# --- live and fused together --------------------------------------------------------------------------------------------


def test_a_change_that_depends_on_the_base_sees_the_original() -> None:
    """Whatever else is fused or live, in any order: (1 + g * 1 + g * 2) W, never a product."""
    net, x = tiny_net(), torch.randn(3, 8, dtype=torch.float64)
    gain = delta_of(net, Gain)
    g = gain.patches["net.0.weight"].get_parameter("g").detach()
    expected = nn.functional.linear(x, (1 + 3 * g) * net[0].weight, net[0].bias)
    parts = {"net": net}
    with Fusion(parts, [(gain, 1.0)]), Attachment(parts, gain, 2.0):
        assert_close(net[0](x), expected)
    with Attachment(parts, gain, 2.0), Fusion(parts, [(gain, 1.0)]):
        assert_close(net[0](x), expected)
    with Fusion(parts, [(gain, 1.0)]), Fusion(parts, [(gain, 2.0)]):
        assert_close(net[0](x), expected)
    with Attachment(parts, gain, 1.0), Attachment(parts, gain, 2.0):
        assert_close(net[0](x), expected)
        assert attached(net[0]) == 2 and len(attachments(parts)) == 2
    assert attachments(parts) == [] and attached(net[0]) == 0


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(8, 4), torch.randn(2, 3, 8)),
        (nn.Conv2d(8, 4, 3, stride=2), torch.randn(2, 8, 7, 6)),
        (nn.Conv1d(8, 4, 3, padding=1, groups=2), torch.randn(2, 8, 7)),
        (nn.LayerNorm(8), torch.randn(2, 3, 8)),
        (nn.GroupNorm(2, 8), torch.randn(2, 8, 5, 4)),
        (nn.Embedding(16, 8), torch.randint(0, 16, (2, 3))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_dense_way_serves_every_tensor_that_a_base_can_have(layer: nn.Module, x: Tensor) -> None:
    """Weight and bias of every kind of layer, each alone: live, and in the weights, and by hand."""
    layer, x = layer.double().requires_grad_(False), x.double() if x.is_floating_point() else x
    for parameter in layer.parameters():
        parameter.normal_()
    parts = {"net": nn.ModuleDict({"layer": layer})}
    for site in find_sites("net", parts["net"]):
        delta = Delta("any", {site.name: Gain(site, NoOptions()).double()})
        by_hand = copy.deepcopy(layer)
        getattr(by_hand, site.tensor).mul_(1 + 0.5 * 3)
        with Attachment(parts, delta, 3.0):
            assert_close(layer(x).detach(), by_hand(x))
        with Fusion(parts, [(delta, 3.0)]):
            assert_close(layer(x), by_hand(x))


ANYWHERE = [kind for kind in KINDS if {"linear", "conv"} <= TABLE[kind].ops]
ENTRY = st.tuples(st.sampled_from(ANYWHERE), st.integers(0, 1), st.floats(-2, 2, width=16), st.booleans())


@settings(max_examples=40, deadline=None)
@given(st.lists(ENTRY, min_size=1, max_size=5), st.randoms(use_true_random=False), st.sampled_from(["linear", "conv"]))
def test_any_stack_is_the_dense_sum(entries: list[tuple[str, int, float, bool]], order: object, op: Op) -> None:
    """Random kinds, strengths, live or fused, taken off in random order: always W plus the sum; in the end W itself."""
    layer: nn.Module = nn.Linear(8, 16) if op == "linear" else nn.Conv2d(8, 16, 3, stride=2, padding=1)
    layer = layer.double().requires_grad_(False)
    x = torch.randn(2, 8, dtype=torch.float64) if op == "linear" else torch.randn(2, 8, 6, 6, dtype=torch.float64)
    parts = {"part": nn.ModuleDict({"layer": layer})}
    site = next(s for s in find_sites("part", parts["part"]) if s.tensor == "weight")
    state, on = State.of(parts), []
    for number, (kind, example, strength, live) in enumerate(entries):
        method = TABLE[kind]
        delta = Delta("any", {site.name: method(site, method.examples[example % len(method.examples)]).double()})
        draw(delta, seed=number)
        live |= method.timed
        on.append((Attachment(parts, delta, strength) if live else Fusion(parts, [(delta, strength)]), delta, strength))
    original = state.values["part.layer.weight"]
    order.shuffle(on)  # pyright: ignore[reportAttributeAccessIssue]
    while on:
        total = sum(strength * delta.patches[site.name].change(original) for _, delta, strength in on)
        with torch.no_grad():
            expected = apply_dense(original + total, x, layer, site) + layer.bias.view(-1, *[1] * (x.dim() - 2))
            assert_close(layer(x), expected, torch.float64)
        on.pop()[0].remove()
    state.check(parts)


def test_fusing_rounds_once_and_restores_every_bit() -> None:
    net = tiny_net().to(torch.bfloat16)
    state, parts = State.of({"net": net}), {"net": net}
    delta = delta_of(net, TABLE[KINDS[0]]).to(dtype=torch.float32)
    many = [(delta, 1 / 64)] * 64
    with Fusion(parts, many), torch.no_grad():
        for name, patch in delta.patches.items():
            weight = state.values[name].float()
            once = (weight + patch.change(weight)).to(torch.bfloat16)
            assert_close(net.get_submodule(patch.site.module).weight, once, torch.float32)
    state.check(parts)
    assert all(p.dtype == torch.float32 for _, p in delta.parameters())
