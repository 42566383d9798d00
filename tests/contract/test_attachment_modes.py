"""The attachment engine wherever torch allows a forward: modes, checkpointing, keyword arguments, copies."""

import copy
from typing import cast

import pytest
import torch
from torch import Tensor

from tests.contract.ground import Gain, State, assert_close, delta_of, draw, predict, sites_for, tiny_net
from vgm_peft import socket
from vgm_peft.attachment import Attachment, Fusion, attached, attachments
from vgm_peft.delta import Delta
from vgm_peft.deltas import TABLE
from vgm_peft.family import Base

KINDS = list(TABLE)


def test_inference_mode_no_grad_and_autocast() -> None:
    net, x = tiny_net(), torch.randn(3, 8, dtype=torch.float64)
    delta, parts = delta_of(net, TABLE[KINDS[0]]), {"net": net}
    with Attachment(parts, delta):
        expected = net(x).detach()
        with torch.inference_mode():
            assert torch.equal(net(x), expected)
    with torch.inference_mode():
        fusion = Fusion(parts, [(delta, 1.0)])
        assert_close(net(x), expected)
    gain = delta_of(net, Gain)
    with Attachment(parts, gain):
        net(x).sum().backward()
        assert all(p.grad is not None for _, p in gain.parameters())
    fusion.remove()
    with torch.autocast("cpu", torch.bfloat16), Fusion(parts, [(delta, 1.0)]), torch.autocast("cpu", enabled=False):
        assert_close(net(x), expected)
    assert torch.equal(net(x), tiny_net()(x))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(base: Base, kind: str) -> None:
    method = TABLE[kind]
    delta = Delta.fit(base.family.name, method, sites_for(method, base), method.examples[0])
    draw(delta, size=0.05)
    unet = copy.deepcopy(base.denoiser).train()
    parts, pipe_unet = {**base.parts, base.family.denoiser: unet}, base.pipe.unet
    gradients: list[list[Tensor]] = []
    try:
        base.pipe.unet = base.parts[base.family.denoiser] = unet
        for checkpointing in (False, True):
            unet.enable_gradient_checkpointing() if checkpointing else unet.disable_gradient_checkpointing()
            torch.manual_seed(0)  # some methods draw in training; what is computed again must draw the same again
            with Attachment(parts, delta):
                predict(base).square().mean().backward()
            gradients.append([cast(Tensor, p.grad) for _, p in delta.parameters() if p.requires_grad])
            for _, parameter in delta.parameters():
                parameter.grad = None
    finally:
        base.pipe.unet = base.parts[base.family.denoiser] = pipe_unet
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


def test_keyword_arguments_and_hooks_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "SMALL", 0.0)  # joined to the weight, the change is in what the layer itself returns
    net, x = tiny_net(), torch.randn(3, 8, dtype=torch.float64)
    seen: list[Tensor] = []
    handle = net[0].register_forward_hook(lambda _m, _a, output: seen.append(output))
    with Attachment({"net": net}, delta_of(net, TABLE[KINDS[0]])):
        expected = net[0](x)
        assert torch.equal(net[0](input=x), expected)
    net[0](x)
    assert len(seen) == 3 and not torch.equal(seen[0], expected), "a hook that was there before sees the base's own output"
    handle.remove()


def test_a_deep_copy_is_independent() -> None:
    net, x = tiny_net(), torch.randn(3, 8, dtype=torch.float64)
    delta, other = delta_of(net, TABLE[KINDS[0]]), delta_of(net, TABLE[KINDS[-1]], seed=2)
    with Attachment({"net": net}, delta), Fusion({"net": net}, [(other, 0.5)]):
        expected = net(x).detach()
        twin = copy.deepcopy(net)
        draw(delta, seed=9)
        assert not torch.equal(net(x), expected)
    assert torch.equal(net(x), tiny_net()(x))
    assert torch.equal(twin(x), expected)
    on = attachments({"net": twin})
    assert [type(owner) for owner in on] == [Attachment, Fusion]
    for owner in on:
        owner.remove()
    assert State.of({"net": net}).modules == State.of({"net": twin}).modules
    assert torch.equal(twin(x), net(x))


def test_removing_twice_and_attaching_the_same_delta_twice() -> None:
    net, x = tiny_net(), torch.randn(3, 8, dtype=torch.float64)
    delta, parts = delta_of(net, TABLE[KINDS[0]]), {"net": net}
    with Attachment(parts, delta, 2.0):
        expected = net(x)
    first, second = Attachment(parts, delta), Attachment(parts, delta)
    assert_close(net(x), expected.detach())
    first.remove()
    first.remove()
    assert attached(net[0]) == 1
    second.remove()
    assert attached(net[0]) == 0
