"""FourierFT against peft: the same places from the same seed, the same dW; only peft begins at a random spectrum."""

import pytest
import torch
from torch import nn

from tests.contract.ground import assert_close, draw
from vgm_peft.delta import Call, Delta
from vgm_peft.deltas.fourierft import FourierFt, FourierFtOptions
from vgm_peft.errors import DeltaError
from vgm_peft.site import Site, find_sites


@pytest.mark.parametrize(("columns", "rows"), [(24, 16), (15, 7), (8, 9)])
def test_peft(columns: int, rows: int) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    layer = nn.Linear(columns, rows).requires_grad_(False)
    x = torch.randn(2, 5, columns)
    patch = FourierFt(
        find_sites("part", nn.ModuleDict({"layer": layer}))[0], FourierFtOptions(frequencies=50, scale=20.0, seed=5)
    )
    draw(patch)
    config = peft.FourierFTConfig(n_frequency=50, scaling=20.0, random_loc_seed=5, target_modules=["0"])
    theirs = peft.inject_adapter_in_model(config, nn.Sequential(layer))[0]
    theirs.fourierft_spectrum["default"].data.copy_(patch.spectrum)
    assert_close(patch.change(layer.weight), theirs.get_delta_weight("default").detach())
    assert_close(patch.add_to(layer(x), Call(x, layer, layer.weight), 1.0), theirs(x).detach())


def test_all_frequencies_and_too_many() -> None:
    """A full spectrum is the transform itself."""
    site = Site("unet", "to_q", "linear", (6, 5))
    patch = FourierFt(site, FourierFtOptions(frequencies=30, scale=1.0)).double()
    draw(patch)
    drawn = torch.randperm(30, generator=torch.Generator().manual_seed(777))
    full = torch.zeros(30, dtype=torch.float64).index_copy(0, drawn, patch.spectrum.detach()).view(6, 5)
    assert_close(patch.change(torch.zeros(6, 5)), torch.fft.ifft2(full).real)
    with pytest.raises(DeltaError, match=r"unet\.to_q linear 6x5: frequencies = 31; expected 1 \.\. 30"):
        Delta.fit("any", FourierFt, [site], FourierFtOptions(frequencies=31))
    assert bool(FourierFt(site, FourierFtOptions(frequencies=9, std=1.0)).spectrum.any())
