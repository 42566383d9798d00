"""BOFT on the input side against peft: same `boft_R` and `boft_s`, same output.

peft makes more than one factor only with a CUDA kernel at hand, which builds block-diagonal matrices; torch's own does so here.
Differences of convention: peft's Cayley map takes -Q, and in a block it counts the bit that a factor mixes before the rest.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.contract.ground import assert_close
from vgm_peft.attachment import Attachment
from vgm_peft.delta import Call, Delta
from vgm_peft.deltas.boft import Boft, BoftOptions
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.site import Site, find_sites


class BlockDiagonal(torch.autograd.Function):
    """What peft's kernel computes: (N, D, H, H) -> (N, D * H, D * H)."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor) -> Tensor:
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


def theirs_on(layer: nn.Module, block: int, factors: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    peft: Any = pytest.importorskip("peft", reason="peft is not installed")
    from peft.tuners.boft import layer as module

    monkeypatch.setattr(module, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(module, "FastBlockDiag", BlockDiagonal)
    config = peft.BOFTConfig(boft_block_size=block, boft_n_butterfly_factor=factors, target_modules=["0"])
    theirs: Any = peft.inject_adapter_in_model(config, nn.Sequential(layer))[0].double().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    theirs.boft_R["default"].copy_(0.3 * torch.randn(theirs.boft_R["default"].shape, generator=generator))
    theirs.boft_s["default"].copy_(1 + 0.2 * torch.randn(theirs.boft_s["default"].shape, generator=generator))
    return theirs


@pytest.mark.parametrize(("block", "factors"), [(4, 1), (4, 2), (4, 4), (8, 3), (2, 5), (16, 1)])
@pytest.mark.parametrize("op", ["linear", "1x1"])
def test_the_input_side_is_that_of_peft(op: str, block: int, factors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(32, 12).double() if op == "linear" else nn.Conv2d(32, 12, 1).double()
    root = nn.ModuleDict({"layer": layer})
    theirs = theirs_on(layer, block, factors, monkeypatch)
    tensors = {name: getattr(theirs, name)["default"].float() for name in ("boft_R", "boft_s")}
    ours = Boft.unpack(find_sites("part", root)[0], tensors)
    assert ours is not None and (ours.options.block, ours.options.factors) == (block, factors)
    x = torch.randn(3, 32, dtype=torch.float64) if op == "linear" else torch.randn(2, 32, 3, 3, dtype=torch.float64)
    with Attachment({"part": root}, Delta("any", {ours.site.name: ours.double()})), torch.no_grad():
        assert_close(layer(x), theirs_alone(theirs, x), torch.float32)


def theirs_alone(theirs: Any, x: Tensor) -> Tensor:
    """Their output from the merged weight: its layer is the one that ours is live on."""
    rotation, scale = theirs.get_delta_weight("default")
    layer = theirs.get_base_layer()
    flat = layer.weight.flatten(1)
    merged = ((rotation @ flat.T).T * scale.view(-1, 1)).view(layer.weight.shape)
    function = nn.functional.linear if layer.weight.dim() == 2 else nn.functional.conv2d
    return function(x, merged, layer.bias)


def test_blocks_need_not_be_a_power_of_two_where_fewer_factors_mix_them() -> None:
    patch = Boft(Site("unet", "to_q", "linear", (24, 8)), BoftOptions(block=4, factors=2)).double()
    nn.init.normal_(patch.skew, std=0.3, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(24, 8, dtype=torch.float64)
    turned = weight + patch.change(weight)
    assert_close((turned.T @ turned).detach(), weight.T @ weight)
    with pytest.raises(DeltaError, match=r"its 24 outputs has block = 4; expected one of 2, 6"):
        Boft(patch.site, BoftOptions(block=4, factors=3))


@pytest.mark.parametrize("side", ["output", "input"])
def test_it_acts_as_its_dense_change_on_either_side(side: Any) -> None:
    layer = nn.Linear(16, 24).double()
    patch = Boft(find_sites("part", nn.ModuleDict({"layer": layer}))[0], BoftOptions(side=side, rescale=True)).double()
    for parameter in patch.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    x, weight = torch.randn(5, 16, dtype=torch.float64), layer.weight.detach()
    assert_close(patch.contribution(Call(x, layer, weight)).detach(), (x @ patch.change(weight).T).detach())
    assert (patch.pack(weight).keys() == {"diff"}) == (side == "input")


def test_what_does_not_fit_is_named() -> None:
    conv, linear = Site("unet", "conv", "conv", (12, 8, 3, 3)), Site("unet", "to_q", "linear", (12, 16))
    for site, shape in ((conv, (1, 18, 4, 4)), (linear, (1, 4, 3, 3)), (linear, (4, 4, 4, 4)), (linear, (16,))):
        with pytest.raises(DeltaError, match=r"unet\.(conv|to_q) .*boft_R [0-9x]+ does not rotate its weight; .*1x1"):
            Boft.unpack(site, {"boft_R": torch.zeros(shape), "boft_s": torch.ones(12, 1)})
    with pytest.raises(DeltaError, match="boft_s 11x1"):
        Boft.unpack(linear, {"boft_R": torch.zeros(1, 4, 4, 4), "boft_s": torch.ones(11, 1)})
    with pytest.raises(ConfigError, match='side = "both"; expected output or input'):
        BoftOptions(side="both")  # pyright: ignore[reportArgumentType]
