"""What is derived for many patches at once is what each would derive alone, and never older than its parameters."""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.contract.ground import State, assert_close, draw
from vgm_peft import socket
from vgm_peft.attachment import Attachment, attachments
from vgm_peft.delta import Delta
from vgm_peft.deltas import TABLE
from vgm_peft.shares import Deriving
from vgm_peft.site import find_sites

METHODS = {kind: method for kind, method in TABLE.items() if issubclass(method, Deriving)}
KINDS = list(METHODS)
WAYS = [0.0, float("inf")]


class Net(nn.Module):
    """Layers of two sizes, the middle ones under activation checkpointing when asked for; may fail after the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in ((8, 16), (16, 16), (16, 16), (16, 8)))
        self.double().requires_grad_(False)
        self.reentrant: bool | None = None
        self.fails = False

    def middle(self, x: Tensor) -> Tensor:
        return self.layers[2](torch.tanh(self.layers[1](x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        if self.fails:
            raise RuntimeError("told to")
        again = self.reentrant
        x = self.middle(x) if again is None else checkpoint(self.middle, x, use_reentrant=again)
        return self.layers[3](x)


@pytest.fixture(params=WAYS, ids=["acts", "joins"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both ways: as the kinds act on large layers, and with dW joined to the weight."""
    monkeypatch.setattr(socket, "SMALL", request.param)
    yield


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def ground(kind: str) -> tuple[Net, Delta, Tensor]:
    """A net, a delta with values on all of it, and an input."""
    net, method = Net(), TABLE[kind]
    delta = Delta.fit("any", method, [s for s in find_sites("net", net) if s.op == "linear"], method.examples[0])
    delta.to(dtype=torch.float64)
    draw(delta)
    return net, delta, torch.randn(3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def alone(net: Net) -> Callable[[Tensor], Tensor]:
    """The net's forward without its hooks, so that every patch derives its own."""
    return net.forward


def gradients(delta: Delta, loss: Tensor) -> list[Tensor]:
    """Gradients of all parameters, and none left behind."""
    loss.backward()
    found = [p.grad.clone() for _, p in delta.parameters() if p.grad is not None]
    for _, p in delta.parameters():
        p.grad = None
    return found


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


def served(delta: Delta) -> list[bool]:
    """Which patches would use a share now."""
    patches = [patch for patch in delta if isinstance(patch, Deriving)]
    return [any(share.serves(patch) for share in patch.shares.values()) for patch in patches]


def test_output_and_gradients_are_those_of_each_alone(kind: str) -> None:
    net, delta, x = ground(kind)
    state, calls = State.of({"net": net}), list[int]()

    def count(*_: object) -> None:
        calls.append(sum(served(delta)))

    with Attachment({"net": net}, delta, 0.7) as attachment:
        handle = net.layers[1].register_forward_hook(count)
        shared, lone = net(x), alone(net)(x)
        assert calls == [4, 0]  # within the net's forward all patches are served, outside none
        handle.remove()
        assert_close(shared, lone)
        assert_same(gradients(delta, shared.square().sum()), gradients(delta, lone.square().sum()))
        attachment.strengths = {next(iter(delta)).site.name: 0.0}
        assert_close(net(x), alone(net)(x))
    state.check({"net": net})


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(kind: str, reentrant: bool) -> None:
    """Also with several forwards before one backward pass, in which the first forward's layers run again last."""
    net, delta, x = ground(kind)
    x.requires_grad_(True)  # without it the reentrant form records nothing
    with Attachment({"net": net}, delta):
        expected = gradients(delta, alone(net)(x).square().sum() + alone(net)(2 * x).square().sum())
        net.reentrant = reentrant
        assert_same(gradients(delta, net(x).square().sum() + net(2 * x).square().sum()), expected)
        first, second = net(x).square().sum(), net(2 * x).square().sum()
        net.reentrant = None
        with torch.no_grad():
            net(x)  # a preview
        net.layers[1](net.layers[0](x))
        first.backward()
        assert_same(gradients(delta, second), expected)


def test_nothing_is_stale(kind: str) -> None:
    """After a step of an optimiser, values loaded, or another dtype: as a net attached to just then."""
    net, delta, x = ground(kind)
    with Attachment({"net": net}, delta):
        optimiser = torch.optim.AdamW([p for _, p in delta.parameters()], lr=0.1, fused=True)

        def check() -> None:
            assert_close(net(x), alone(net)(x))

        before = net(x)
        before.square().sum().backward()
        optimiser.step()
        check()
        assert not torch.equal(net(x), before)
        for patch in delta:
            patch.load_state_dict({k: 0.5 * v for k, v in patch.state_dict().items()})
        check()
        with torch.no_grad():
            check()
        check()


def test_a_share_is_not_used_once_its_parameters_were_written_to(kind: str) -> None:
    """Even within the forward: here by the first layer, for the second."""
    net, delta, x = ground(kind)
    second = list(delta)[1]

    def write(*_: object) -> None:
        with torch.no_grad():
            for parameter in second.parameters():
                parameter.mul_(0.5)

    with Attachment({"net": net}, delta):
        handle = net.layers[0].register_forward_hook(write)
        found = net(x)
        handle.remove()
        assert_close(found, alone(net)(x))


@pytest.mark.parametrize("kind", [kind for kind, method in METHODS.items() if method.makes_changes], indirect=True)
def test_changes_of_one_shape_are_made_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where dW joins the weight: on the second forward, when it is known where that runs; the result is that of each alone."""
    net, delta, x = ground(kind)
    method, counts = METHODS[kind], list[int]()
    inner = method.changes

    def counted(patches: Sequence[Deriving], derived: tuple[Tensor, ...], bases: Sequence[Tensor]) -> Sequence[Tensor]:
        counts.append(len(patches))
        return inner(patches, derived, bases)

    with Attachment({"net": net}, delta, 0.7):
        expected = alone(net)(x)
        monkeypatch.setattr(method, "changes", staticmethod(counted))
        found = net(x)
        assert_close(found, expected)
        assert sorted(counts) == ([1, 1, 2] if socket.SMALL else [])
        assert_same(gradients(delta, found.square().sum()), gradients(delta, expected.square().sum()))


def record(*_: object) -> None:
    torch.set_grad_enabled(True)


def test_no_gradients_then_gradients_within_one_forward(kind: str) -> None:
    net, delta, x = ground(kind)
    with Attachment({"net": net}, delta):
        expected = gradients(delta, alone(net)(x).square().sum())
        with torch.no_grad():
            handle = net.register_forward_pre_hook(record)  # after the shares were dealt
            loss = net(x).square().sum()
        handle.remove()
        torch.set_grad_enabled(True)
        assert_same(gradients(delta, loss), expected)


def test_a_forward_that_fails_ends_its_shares(kind: str) -> None:
    net, delta, x = ground(kind)
    with Attachment({"net": net}, delta):
        expected = gradients(delta, alone(net)(x).square().sum())
        net.fails = True
        with pytest.raises(RuntimeError, match="told to"):
            net(x)
        net.fails = False
        assert not any(served(delta))
        assert_same(gradients(delta, net(x).square().sum()), expected)


def test_deep_copies_and_two_deltas_on_one_part(kind: str) -> None:
    net, delta, x = ground(kind)
    other = deepcopy(delta)
    draw(other, 5)
    with Attachment({"net": net}, delta, 0.5), Attachment({"net": net}, other, -0.3):
        expected = alone(net)(x)
        assert_close(net(x), expected)
        twin = deepcopy(net)
        assert_close(alone(twin)(x), expected)
        draw(delta, 7)
        assert_close(twin(x), expected)
        assert_close(net(x), alone(net)(x))
        for owner in attachments({"net": twin}):
            owner.remove()
        assert State.of({"net": twin}).modules == State.of({"net": Net()}).modules
