"""Vectors added for all layers of a part at once: as each layer's own hooks would add them, and gone after its forward."""

from collections.abc import Callable, Iterator
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.contract.ground import State, assert_close, draw
from vgm_peft import sums
from vgm_peft.attachment import Attachment
from vgm_peft.delta import Delta
from vgm_peft.deltas import TABLE
from vgm_peft.site import find_sites


class Net(nn.Module):
    """Two norms and a linear layer with biases, the norm in the middle under activation checkpointing when asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList((nn.LayerNorm(8), nn.Linear(8, 8), nn.GroupNorm(2, 8)))
        self.double().requires_grad_(False)
        self.reentrant: bool | None = None
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layers[0](x))
        if self.fails:
            raise RuntimeError("told to")
        again = self.reentrant
        x = self.layers[1](x) if again is None else cast(Tensor, checkpoint(self.layers[1], x, use_reentrant=again))
        return self.layers[2](x)


@pytest.fixture(params=["norm", "bitfit", "difffit"])
def ground(request: pytest.FixtureRequest) -> tuple[Net, Delta, Tensor]:
    """A net, a delta on all norms and biases that the kind changes, and an input."""
    net, method = Net(), TABLE[request.param]
    delta = Delta.fit("any", method, [s for s in find_sites("net", net) if s.op in method.ops & {"norm", "bias"}])
    delta.to(dtype=torch.float64)
    draw(delta)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return net, delta, x.requires_grad_(True)  # without it the reentrant form of checkpointing records nothing


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many sums were made at once, forward by forward."""
    counts, inner = list[int](), cast(Callable[..., object], sums._Sums.apply)  # pyright: ignore[reportPrivateUsage]

    def counted(tensors: list[Tensor], *rest: object) -> object:
        counts.append(len(tensors))
        return inner(tensors, *rest)

    monkeypatch.setattr(sums._Sums, "apply", counted)  # pyright: ignore[reportPrivateUsage]
    yield counts


def gradients(delta: Delta, loss: Tensor) -> list[Tensor]:
    loss.backward()
    found = [cast(Tensor, p.grad).clone() for _, p in delta.parameters()]
    for _, p in delta.parameters():
        p.grad = None
    return found


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_output_and_gradients_are_those_of_the_hooks(
    ground: tuple[Net, Delta, Tensor], made: list[int], strength: float
) -> None:
    net, delta, x = ground
    state = State.of({"net": net})
    with Attachment({"net": net}, delta, strength) as attachment:
        expected = net.forward(x)  # without the part's hooks; and now it is known where each layer runs
        assert not made
        found = net(x)
        assert made == [len(delta.patches)]
        assert_close(found, expected)
        assert_same(gradients(delta, found.square().sum()), gradients(delta, expected.square().sum()))
        attachment.strengths = {name: 0.0 if n else 0.5 for n, name in enumerate(delta.patches)}
        assert_close(net(x), net.forward(x))
        assert made[-1] == 1
    state.check({"net": net})


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(ground: tuple[Net, Delta, Tensor], reentrant: bool) -> None:
    net, delta, x = ground
    with Attachment({"net": net}, delta):
        expected = gradients(delta, net.forward(x).square().sum())
        net.reentrant = reentrant
        first, second = net(x).square().sum(), net(2 * x).square().sum()
        net.reentrant = None
        with torch.no_grad():
            net(x)  # a preview
        assert_same(gradients(delta, first), expected)
        second.backward()


def test_never_stale_nor_left_behind(ground: tuple[Net, Delta, Tensor]) -> None:
    """After values were written, after a forward that failed, and beside another delta."""
    net, delta, x = ground
    own = [layer.weight for layer in net.layers]
    with Attachment({"net": net}, delta):
        before = net(x), net(x)
        assert_close(*before)
        with torch.no_grad():
            for _, parameter in delta.parameters():
                parameter.mul_(-2)
        expected = net.forward(x)
        assert_close(net(x), expected)
        assert not torch.equal(expected, before[0])
        net.fails = True
        with pytest.raises(RuntimeError, match="told to"):
            net(x)
        net.fails = False
        assert all(layer.weight is weight for layer, weight in zip(net.layers, own, strict=True))
        sites = [s for s in find_sites("net", net) if s.op == "norm"]
        with Attachment({"net": net}, draw_of(Delta.fit("any", TABLE["diff"], sites)), 0.3):
            assert_close(net(x), net.forward(x))
            assert not torch.equal(net(x), expected)


def draw_of(delta: Delta) -> Delta:
    draw(delta.to(dtype=torch.float64), 4)
    return delta


def record(*_: object) -> None:
    torch.set_grad_enabled(True)


def test_sums_without_gradients_do_not_serve_where_gradients_are_recorded(ground: tuple[Net, Delta, Tensor]) -> None:
    net, delta, x = ground
    with Attachment({"net": net}, delta):
        expected = gradients(delta, net.forward(x).square().sum())
        with torch.no_grad():
            handle = net.register_forward_pre_hook(record)  # after the sums were placed
            loss = net(x).square().sum()
        handle.remove()
        torch.set_grad_enabled(True)
        assert_same(gradients(delta, loss), expected)


def test_a_trained_base_keeps_its_gradient(ground: tuple[Net, Delta, Tensor], made: list[int]) -> None:
    net, delta, x = ground
    net.requires_grad_(True)
    with Attachment({"net": net}, delta):
        net(x)
        net(x).square().sum().backward()
        assert not made
    assert all(p.grad is not None for p in net.parameters())
