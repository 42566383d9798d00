"""C3A against peft: the same kernels, the same dW; only peft begins at (small) random ones, and knows linear layers only."""

import pytest
import torch
from torch import nn

from tests.contract.ground import assert_close, draw
from vgm_peft.delta import Call
from vgm_peft.deltas.c3a import C3a, C3aOptions
from vgm_peft.errors import DeltaError
from vgm_peft.site import Site, find_sites


@pytest.mark.parametrize("block", [8, 4, 2, 1])
def test_peft(block: int) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    layer = nn.Linear(24, 16).requires_grad_(False)
    x = torch.randn(2, 5, 24)
    patch = C3a(find_sites("part", nn.ModuleDict({"layer": layer}))[0], C3aOptions(block=block))
    draw(patch)
    config = peft.C3AConfig(block_size=block, target_modules=["0"])
    theirs = peft.inject_adapter_in_model(config, nn.Sequential(layer))[0]
    theirs.c3a_kernel["default"].data.copy_(patch.kernel)
    assert_close(patch.change(layer.weight), theirs.get_delta_weight("default").detach())
    assert_close(patch.add_to(layer(x), Call(x, layer, layer.weight), 1.0), theirs(x).detach())


def test_blocks_that_fit() -> None:
    for shape, side in (((320, 768), 64), ((640, 640), 160), ((1280, 1280), 256), ((320, 4, 3, 3), 4)):
        site = Site("unet", "layer", "linear" if len(shape) == 2 else "conv", shape)
        patch = C3a(site, C3aOptions())
        assert patch.options.block == side
        assert patch.kernel.numel() == site.rows * site.columns // side
    with pytest.raises(DeltaError, match=r"linear 320x768: block = 256 does not divide .*; expected one of 1, 2, 4, .*, 64;"):
        C3a(Site("unet", "layer", "linear", (320, 768)), C3aOptions(block=256))
