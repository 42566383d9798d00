"""DoRA against peft (output axis) and LyCORIS (both axes): same tensors, same weights, outputs and gradients.

Differences of convention: our `magnitude` is added to the base's norm, theirs is the norm; LyCORIS adds an epsilon to n and
lets gradients through it; strength is interpolation here, while peft scales the low-rank product alone and LyCORIS g / n - 1.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.contract.ground import assert_close, draw
from vgm_peft.delta import Call
from vgm_peft.deltas.decomposed import Axis
from vgm_peft.deltas.dora import Dora, DoraOptions
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.site import Site, find_sites

MAKERS = {
    "linear": (lambda: nn.Linear(24, 16), (2, 5, 24)),
    "1x1": (lambda: nn.Conv2d(8, 12, 1), (2, 8, 5, 5)),
    "3x3": (lambda: nn.Conv2d(8, 16, 3, stride=2, padding=1), (2, 8, 7, 6)),
}


def make(name: str, axis: Axis = "output", dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Dora, Tensor]:
    """A layer, a DoRA on it that is near to a trained one, and an input."""
    torch.manual_seed(0)
    maker, shape = MAKERS[name]
    layer = maker().to(dtype).requires_grad_(False)
    patch = Dora(find_sites("part", nn.ModuleDict({"layer": layer}))[0], DoraOptions(rank=4, alpha=6.0, axis=axis)).to(dtype)
    draw(patch, size=0.1)
    return layer, patch, torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", MAKERS)
def test_it_is_that_of_peft(name: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    layer, patch, x = make(name)
    config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["0"])
    theirs: Any = peft.inject_adapter_in_model(config, nn.Sequential(layer))[0].double()
    packed = patch.pack(layer.weight)  # pyright: ignore[reportArgumentType]
    theirs.lora_A["default"].weight.data.copy_(packed["lora_down.weight"])
    theirs.lora_B["default"].weight.data.copy_(packed["lora_up.weight"])
    magnitude = theirs.lora_magnitude_vector["default"].weight
    magnitude.data.copy_(packed["dora_scale"].reshape(magnitude.shape))
    ours, expected = patch.add_to(layer(x), Call(x, layer, layer.weight), 1.0), theirs(x)  # pyright: ignore[reportArgumentType]
    assert_close(ours, expected.detach())
    ours.square().sum().backward()
    expected.square().sum().backward()
    pairs = (
        (patch.down, theirs.lora_A["default"].weight),
        (patch.up, theirs.lora_B["default"].weight),
        (patch.magnitude, magnitude),
    )
    for mine, other in pairs:
        assert mine.grad is not None
        assert_close(mine.grad.reshape(other.shape), other.grad)
    theirs.merge()
    assert_close(layer.weight.detach(), theirs.get_base_layer().weight.detach())  # pyright: ignore
    again = Dora.unpack(patch.site, {**packed, "dora_scale": magnitude.detach().reshape(-1)})
    assert again is not None and again.options.axis == "output" and again.options.absolute


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("name", MAKERS)
def test_it_is_that_of_lycoris(name: str, axis: Axis) -> None:
    pytest.importorskip("lycoris", reason="lycoris-lora is not installed")
    from lycoris.modules.locon import LoConModule

    layer, patch, x = make(name, axis, torch.float32)
    packed = patch.pack(layer.weight)  # pyright: ignore[reportArgumentType]
    theirs: Any = LoConModule("layer", layer, 1.0, 4, 6, weight_decompose=True, wd_on_out=axis == "output")
    assert theirs.dora_scale.shape == packed["dora_scale"].shape
    theirs.lora_down.weight.data.copy_(packed["lora_down.weight"])
    theirs.lora_up.weight.data.copy_(packed["lora_up.weight"])
    theirs.dora_scale.data.copy_(packed["dora_scale"])
    merged = theirs.get_merged_weight()[0].detach()
    weight: Any = layer.weight
    assert_close(weight + patch.change(weight).detach(), merged)
    again = Dora.unpack(patch.site, packed)
    assert again is not None and again.options.axis == axis
    assert_close(weight + again.change(weight).detach(), merged)
    assert_close(again.add_to(layer(x), Call(x, layer, weight), 1.0).detach(), theirs.forward(x).detach())


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("name", MAKERS)
def test_nothing_learned_is_nothing_changed_to_the_last_bit(name: str, axis: Axis) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer, patch, x = make(name, axis, dtype)
        fresh: Any = Dora(patch.site, patch.options)
        if axis == "output":
            layer.weight.data[1] = 0  # pyright: ignore - an output that is silent, as in a zero convolution
        assert torch.equal(fresh.add_to(layer(x), Call(x, layer, layer.weight), 1.0), layer(x))  # pyright: ignore
        assert float(fresh.change(layer.weight).detach().abs().max()) < 1e-7


def test_weight_and_strength_interpolate() -> None:
    """At half the strength the weight is half way between the base's and the trained one, whose row norms are g."""
    layer, patch, x = make("linear")
    weight: Any = layer.weight
    trained = weight + patch.change(weight).detach()
    assert_close(trained.norm(dim=1), (weight.norm(dim=1) + patch.magnitude).abs().detach())
    half = patch.add_to(layer(x), Call(x, layer, weight), 0.5).detach()
    assert_close(half, nn.functional.linear(x, (weight + trained) / 2, layer.bias))  # pyright: ignore


def test_what_does_not_fit_is_named() -> None:
    site = Site("unet", "to_q", "linear", (12, 8))
    packed = Dora(site, DoraOptions(rank=2)).pack(torch.ones(12, 8))
    for wrong in (torch.zeros(8), torch.zeros(12, 8), torch.zeros(1, 12), torch.zeros(())):
        with pytest.raises(DeltaError, match=r"unet\.to_q linear 12x8: dora_scale .*expected 12x1 .* or 1x8"):
            Dora.unpack(site, {**packed, "dora_scale": wrong})
    with pytest.raises(DeltaError, match="rank 9"):
        Dora.check(site, DoraOptions(rank=9))
    with pytest.raises(ConfigError, match='axis = "both"'):
        DoraOptions(axis="both")  # pyright: ignore[reportArgumentType]
    square = Site("unet", "to_q", "linear", (8, 8))
    for shape, axis in (((8, 1), "output"), ((1, 8), "input")):
        packed = Dora(square, DoraOptions(rank=2)).pack(torch.ones(8, 8)) | {"dora_scale": torch.ones(shape)}
        again = Dora.unpack(square, packed)
        assert again is not None and again.options.axis == axis
