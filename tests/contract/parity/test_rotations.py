"""OFT, BOFT and HRA against LyCORIS (output side) and peft (input side): same values, same dW.

Differences of convention: LyCORIS' constraint is in its alpha, times the outputs; peft rotates by a truncated series unless
told otherwise, and its exact mode takes -Q; LyCORIS stores whole blocks B with Q = B - B^T, we and peft a triangle of Q.
"""

from typing import Any

import pytest
import torch
from torch import nn

from tests.contract.ground import assert_close, draw
from vgm_peft.deltas.boft import Boft, BoftOptions
from vgm_peft.deltas.hra import Hra, HraOptions
from vgm_peft.deltas.oft import Oft, OftOptions
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.site import Site, find_sites

LAYERS = {"linear": lambda: nn.Linear(24, 32), "3x3": lambda: nn.Conv2d(8, 32, 3), "1x1": lambda: nn.Conv2d(8, 24, 1)}


def site_of(layer: nn.Module) -> Site:
    return find_sites("part", nn.ModuleDict({"layer": layer}))[0]


def theirs_of(layer: nn.Module, module: str, **options: Any) -> Any:
    pytest.importorskip("lycoris", reason="lycoris-lora is not installed")
    from lycoris.modules.boft import ButterflyOFTModule
    from lycoris.modules.diag_oft import DiagOFTModule

    theirs: Any = {"oft": DiagOFTModule, "boft": ButterflyOFTModule}[module]("layer", layer, 1.0, 8, **options)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in theirs.named_parameters():
        if name in ("oft_blocks", "rescale"):
            start = 1.0 if name == "rescale" else 0.0
            parameter.data.copy_(start + 0.2 * torch.randn(parameter.shape, generator=generator))
    return theirs


@pytest.mark.parametrize("constraint", [0.0, 1e-2])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", ["oft", "boft"])
def test_the_output_side_is_that_of_lycoris(kind: str, name: str, rescaled: bool, constraint: float) -> None:
    layer = LAYERS[name]()
    if kind == "boft" and layer.weight.shape[0] == 24:
        pytest.skip("24 outputs have no butterfly of the blocks of 8 that it is given")
    theirs = theirs_of(layer, kind, rescaled=rescaled, constraint=constraint)
    tensors = {k: v.detach() for k, v in theirs.state_dict().items() if k in ("oft_blocks", "rescale", "alpha")}
    method = Oft if kind == "oft" else Boft
    ours = method.unpack(site_of(layer), tensors)
    assert ours is not None and (Boft if kind == "oft" else Oft).unpack(site_of(layer), tensors) is None
    weight = layer.weight.detach().double()
    expected = theirs.make_weight(1.0).detach() - layer.weight.detach()
    assert_close(ours.double().change(weight), expected.double(), torch.float32)
    again = method.unpack(site_of(layer), ours.float().pack(layer.weight))
    assert again is not None and again.options.constraint is None
    assert_close(again.double().change(weight), ours.double().change(weight), torch.float32)


@pytest.mark.parametrize("exact", [False, True])
def test_the_input_side_is_that_of_peft(exact: bool) -> None:
    peft: Any = pytest.importorskip("peft", reason="peft is not installed")
    layer = nn.Linear(24, 16).double()
    config = peft.OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=not exact, target_modules=["0"])
    theirs: Any = peft.inject_adapter_in_model(config, nn.Sequential(layer))[0].double()
    weight = theirs.oft_R["default"].weight
    weight.data.copy_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    if exact:
        ours = Oft(site_of(layer), OftOptions(block=4, side="input"))
        with torch.no_grad():
            ours.skew.copy_(-weight)
    else:
        ours = Oft.unpack(site_of(layer), {"oft_R.weight": weight.detach()})
        assert ours is not None
    x = torch.randn(3, 24, dtype=torch.float64)
    change = ours.double().change(layer.weight.detach())
    assert_close(x @ change.T, (theirs(x) - layer(x)).detach(), torch.float32)


@pytest.mark.parametrize("name", ["linear", "3x3"])
def test_hra_is_that_of_peft(name: str) -> None:
    peft: Any = pytest.importorskip("peft", reason="peft is not installed")
    layer = LAYERS[name]().double()
    theirs: Any = peft.inject_adapter_in_model(peft.HRAConfig(r=6, target_modules=["0"]), nn.Sequential(layer))[0].double()
    u = theirs.hra_u["default"]
    u.data.copy_(torch.randn(u.shape, generator=torch.Generator().manual_seed(3)))
    ours = Hra.unpack(site_of(layer), {"hra_u": u.detach()})
    assert ours is not None
    weight = layer.weight.detach()
    expected = weight.flatten(1) @ theirs.get_delta_weight("default").detach() - weight.flatten(1)
    assert_close(ours.double().change(weight).flatten(1), expected, torch.float32)


@pytest.mark.parametrize("method", [Oft, Boft])
def test_a_rotation_keeps_lengths_and_angles(method: type[Oft] | type[Boft]) -> None:
    weight = torch.randn(24, 10, dtype=torch.float64)
    patch = method(Site("unet", "to_q", "linear", (24, 10)), method.Options()).double()
    draw(patch)
    turned = weight + patch.change(weight)
    assert_close(turned.T @ turned, weight.T @ weight)


def test_hra_keeps_lengths_and_angles_and_its_pairs_cancel_to_the_last_bit() -> None:
    weight = torch.randn(24, 10)
    fresh = Hra(Site("unet", "to_q", "linear", (24, 10)), HraOptions(rank=6))
    assert not bool(fresh.change(weight).any()) and not bool(fresh.feed(torch.randn(3, 10), weight).any())
    draw(fresh.double())
    turned = weight.double() + fresh.change(weight.double())
    assert_close(turned @ turned.T, weight.double() @ weight.double().T)


def test_what_does_not_fit_is_named() -> None:
    site, odd = Site("unet", "to_q", "linear", (12, 20)), Site("unet", "to_q", "linear", (15, 20))
    with pytest.raises(DeltaError, match=r"12x20: block = 5 does not divide its 12 outputs; expected one of 1, 2, 3, 4, 6, 12"):
        Oft(site, OftOptions(block=5))
    with pytest.raises(DeltaError, match=r"12x20: block = 3 does not divide its 20 inputs"):
        Oft(site, OftOptions(block=3, side="input"))
    with pytest.raises(DeltaError, match=r"12 outputs has block = 4; expected one of 6, 12"):
        Boft(site, BoftOptions(block=4))
    with pytest.raises(DeltaError, match=r"15x20: no butterfly of its 15 outputs; expected an even number of outputs"):
        Boft(odd, BoftOptions())
    with pytest.raises(DeltaError, match=r"3 butterfly factors of 2 blocks; expected 1 \.\. 2"):
        Boft(site, BoftOptions(factors=3))
    with pytest.raises(ConfigError, match="block = 5; expected an even number"):
        BoftOptions(block=5)
    with pytest.raises(ConfigError, match="rank = 3; expected an even number"):
        HraOptions(rank=3)
    with pytest.raises(DeltaError, match=r"12x20: rank 22"):
        Hra.check(site, HraOptions(rank=22))
