"""Kinds that may join the weight of a small layer: the sum and the gradients are the same as when they act as on large ones."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from tests.contract.ground import assert_close
from tests.contract.test_deltas import LAYERS, base_tensor, inputs, names_for, pair, place
from vgm_peft import socket
from vgm_peft.attachment import Attachment, Fusion
from vgm_peft.delta import Delta, Patch, apply_dense
from vgm_peft.deltas import TABLE

NEVER, ALWAYS = 0.0, float("inf")


def joining(kind: str, index: int) -> bool:
    """Whether a kind joins with these options, on any layer that it can change."""
    made = (pair(kind, index, LAYERS[n][0](), name=n) for n in LAYERS if place(n, LAYERS[n][0]()).op in TABLE[kind].ops)
    return any(patch.joins for patch in made)


CASES = [(k, i) for k, method in TABLE.items() for i in range(len(method.examples)) if joining(k, i)]


def run(layer: nn.Module, delta: Delta, x: Tensor, strength: float = 0.7) -> tuple[Tensor, list[Tensor]]:
    """Output of a layer with a delta on it, and the gradients of the input and of all parameters."""
    wanted = [x, *(p for _, p in delta.parameters() if p.requires_grad)]
    with Attachment({"part": nn.ModuleDict({"layer": layer})}, delta, strength):
        output = layer(x)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(output.dtype)
    return output.detach(), list(torch.autograd.grad(output, wanted, cotangent))


@pytest.mark.parametrize(("kind", "index"), CASES)
def test_both_ways_are_one(kind: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in names_for(kind):
        make, shape = LAYERS[name]
        layer = make().double().requires_grad_(False)
        patch, x = pair(kind, index, layer, name=name), inputs(layer, shape).requires_grad_(not isinstance(layer, nn.Embedding))
        if not patch.joins:
            continue
        delta, found = Delta("any", {patch.site.name: patch}), list[tuple[Tensor, list[Tensor]]]()
        for small in (NEVER, ALWAYS):
            monkeypatch.setattr(socket, "SMALL", small)
            found.append(run(layer, delta, x))
        with torch.no_grad():
            expected = layer(x) + 0.7 * apply_dense(patch.change(base_tensor(layer, patch)), x, layer, patch.site)
        for output, gradients in found:
            assert_close(output, expected)
            for one, other in zip(gradients, found[0][1], strict=True):
                assert_close(one, other)


class Spy:
    """Counts how often a patch is asked to join a weight."""

    def __init__(self, patch: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        inner = patch.add_change

        def counted(weight: Tensor, base: Tensor, strength: float) -> Tensor:
            self.count += 1
            return inner(weight, base, strength)

        monkeypatch.setattr(patch, "add_change", counted)


def joined(
    kind: str, x: Tensor, layer: nn.Module, monkeypatch: pytest.MonkeyPatch, options: dict[str, float] | None = None
) -> bool:
    """Whether the dense change of a patch of a kind joins a layer's weight for this input, in training."""
    site = place("linear" if isinstance(layer, nn.Linear) else "3x3", layer)
    patch = TABLE[kind](site, TABLE[kind].Options(**(options or {}))).train()
    spy = Spy(patch, monkeypatch)
    with Attachment({"part": nn.ModuleDict({"layer": layer})}, Delta("any", {site.name: patch})):
        layer(x)
    return spy.count > 0


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in CASES if {"linear", "conv"} <= TABLE[kind].ops}))
def test_only_small_layers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No dense dW on what real bases consist of: the narrowest attention of SD1.5, the fewest tokens; nor in half precision."""
    if kind in ("difffit", "diff"):
        pytest.skip("joins biases alone")
    assert joined(kind, torch.zeros(1, 16, 64), nn.Linear(64, 64), monkeypatch)
    assert joined(kind, torch.zeros(1, 32, 4, 4), nn.Conv2d(32, 32, 3), monkeypatch)
    assert not joined(kind, torch.zeros(1, 77, 768), nn.Linear(768, 320), monkeypatch)
    assert not joined(kind, torch.zeros(1, 64, 1280), nn.Linear(1280, 1280), monkeypatch)
    assert not joined(kind, torch.zeros(1, 1280), nn.Linear(1280, 320), monkeypatch)
    if TABLE[kind](place("3x3", wide := nn.Conv2d(320, 320, 3)), TABLE[kind].Options()).acts != "weight":
        assert not joined(kind, torch.zeros(1, 320, 8, 8), wide, monkeypatch)
    assert not joined(kind, torch.zeros(1, 16, 64).bfloat16(), nn.Linear(64, 64).bfloat16(), monkeypatch)


def test_what_training_hides_stays_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patch that hides inputs, ranks or blocks at random does not join: dW knows nothing of that."""
    monkeypatch.setattr(socket, "SMALL", ALWAYS)
    x = torch.zeros(1, 4, 64)
    for kind, name in product(("dora", "glora"), ("dropout", "rank_dropout")):
        assert not joined(kind, x, nn.Linear(64, 64), monkeypatch, {name: 0.5})
    assert not joined("oft", x, nn.Linear(64, 64), monkeypatch, {"block_dropout": 0.5})


def test_all_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patch joins only if all on the layer do: the product of an untouched layer is for those at its output."""
    monkeypatch.setattr(socket, "SMALL", ALWAYS)
    layer = nn.Linear(24, 16).double().requires_grad_(False)
    root, x = {"part": nn.ModuleDict({"layer": layer})}, inputs(layer, (2, 24))
    for second, expected in (("lokr", 1), ("ia3", 0), ("lora", 0)):
        patches = [pair("krona", 0, layer), pair(second, -1, layer)]
        spy = Spy(patches[0], monkeypatch)
        with torch.no_grad():
            changes = [patch.change(base_tensor(layer, patch)) for patch in patches]
            total = layer(x) + apply_dense(0.3 * changes[0] + 0.5 * changes[1], x, layer, patches[0].site)
            with (
                Attachment(root, Delta("any", {patches[0].site.name: patches[0]}), 0.3),
                Attachment(root, Delta("any", {patches[1].site.name: patches[1]}), 0.5),
            ):
                assert_close(layer(x), total)
        assert spy.count == expected


@pytest.mark.parametrize("kind", ["dora", "boft", "glora", "krona"])
def test_beside_fused_deltas_and_a_trained_base(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The change is that of the untouched weight, to which it is a constant; the weight's own gradient stays what it is."""
    layer = nn.Linear(24, 16).double()
    parts, x = {"part": nn.ModuleDict({"layer": layer})}, inputs(layer, (3, 24))
    mine, other = pair(kind, 0, layer), pair("lora", 0, layer)
    mine_on, other_on = (Delta("any", {p.site.name: p}) for p in (mine, other))
    found: list[tuple[Tensor, Tensor | None]] = []
    for small in (NEVER, ALWAYS):
        monkeypatch.setattr(socket, "SMALL", small)
        with Fusion(parts, [(other_on, 0.4)]), Attachment(parts, mine_on, 0.7):
            output = layer(x)
        layer.zero_grad()
        with Attachment(parts, mine_on, 0.7):
            layer(x).square().sum().backward()
        found.append((output.detach(), layer.weight.grad))
    assert_close(found[1][0], found[0][0])
    assert found[0][1] is not None and found[1][1] is not None and bool(found[0][1].any())


def test_a_bias_joins_where_its_gradient_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """In norms and linear layers, unless someone wants the product beside it; not in convolutions."""
    for layer, x, expected in (
        (nn.Linear(24, 16), torch.zeros(2, 24), 1),
        (nn.GroupNorm(2, 8), torch.zeros(2, 8, 3, 3), 1),
        (nn.Conv2d(8, 16, 3), torch.zeros(2, 8, 6, 6), 0),
    ):
        patch = pair("bitfit", 0, layer, torch.float32, "bias of a layer")
        root, spy = {"part": nn.ModuleDict({"layer": layer})}, Spy(patch, monkeypatch)
        with torch.no_grad():
            changed = layer(x) + apply_dense(patch.change(base_tensor(layer, patch)), x, layer, patch.site)
            with Attachment(root, Delta("any", {patch.site.name: patch})):
                assert_close(layer(x), changed)
                if isinstance(layer, nn.Linear):
                    gain = pair("ia3", 0, layer, torch.float32)
                    with Attachment(root, Delta("any", {gain.site.name: gain}), 0.0):
                        layer(x)  # at strength 0 it is not there
                    with Attachment(root, Delta("any", {gain.site.name: gain})):
                        layer(x)  # for its product the bias stays at the output
                    expected += 1
        assert spy.count == expected
