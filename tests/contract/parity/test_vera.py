"""VeRA against peft, which draws other frozen matrices (for its largest layer, scaled by that one's size): it is lent ours."""

import pytest
import torch
from torch import nn

from tests.contract.ground import assert_close, draw
from vgm_peft.delta import Call
from vgm_peft.deltas.vera import Vera, VeraOptions
from vgm_peft.site import Site, find_sites


def test_peft() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    layer = nn.Linear(24, 16).double().requires_grad_(False)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    patch = Vera(find_sites("part", nn.ModuleDict({"layer": layer}))[0], VeraOptions(rank=6)).double()
    assert bool((patch.d == torch.tensor(0.1)).all()) and not bool(patch.b.any())  # as peft begins
    draw(patch)
    theirs = peft.get_peft_model(nn.Sequential(layer), peft.VeraConfig(r=6, target_modules=["0"])).base_model.model[0].double()
    down, up = patch.frozen(torch.float64, torch.device("cpu"))
    theirs.vera_A["default"], theirs.vera_B["default"] = down, up
    theirs.vera_lambda_b["default"].data.copy_(patch.b)
    theirs.vera_lambda_d["default"].data.copy_(patch.d)
    assert_close(patch.change(layer.weight), theirs.get_delta_weight("default").detach())
    assert_close(patch.add_to(layer(x), Call(x, layer, layer.weight), 1.0), theirs(x).detach())


def test_layers_share_their_matrices_whatever_their_sizes() -> None:
    """Rows of one stream, up to the scale of the fan-in; another seed is another stream."""
    small, large, other = (
        Vera(Site("part", "layer", "linear", shape), VeraOptions(rank=300, seed=seed))
        for shape, seed in (((40, 20), 0), ((640, 1280), 0), ((40, 20), 1))
    )
    (a, b), (c, d), (e, f) = (p.frozen(torch.float32, torch.device("cpu")) for p in (small, large, other))
    assert_close(a, c[:, :20] * (1280 / 20) ** 0.5)
    assert torch.equal(b, d[:40])
    assert not torch.equal(a, e) and not torch.equal(b, f)
    for tensor, fan_in in ((c, 1280), (d, 300)):
        assert abs(float(tensor.var()) * fan_in / 2 - 1) < 0.02
