"""(IA)^3 against LyCORIS and peft. peft keeps 1 + v, and scales the bias too where it scales outputs; LyCORIS' v is ours."""

import pytest
import torch
from torch import Tensor, nn

from tests.contract.ground import assert_close, draw
from vgm_peft.delta import Call
from vgm_peft.deltas.ia3 import Ia3, Ia3Options
from vgm_peft.families import family_named
from vgm_peft.site import Site, choose, find_sites

LAYERS = {"linear": lambda: nn.Linear(24, 16), "3x3": lambda: nn.Conv2d(8, 16, 3, padding=1)}


def patched(layer: nn.Module, on_input: bool) -> Ia3:
    patch = Ia3(find_sites("part", nn.ModuleDict({"layer": layer}))[0], Ia3Options(on_input=on_input)).double()
    draw(patch)
    return patch


def sample(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_lycoris(name: str, on_input: bool) -> None:
    ia3 = pytest.importorskip("lycoris.modules.ia3", reason="lycoris-lora is not installed (extra: lycoris)")
    layer = LAYERS[name]().double().requires_grad_(False)
    patch = patched(layer, on_input)
    packed = patch.pack(layer.weight)
    theirs = ia3.IA3Module("theirs", layer, train_on_input=on_input).double()
    assert theirs.weight.shape == packed["weight"].shape and int(theirs.on_input) == int(packed["on_input"])
    theirs.weight.data.copy_(packed["weight"])
    assert_close(patch.change(layer.weight), theirs.get_diff_weight()[0])


@pytest.mark.parametrize("on_input", [False, True])
def test_peft(on_input: bool) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    layer, x = nn.Linear(24, 16).double().requires_grad_(False), sample(2, 5, 24)
    patch = patched(layer, on_input)
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if on_input else [])
    theirs = peft.inject_adapter_in_model(config, nn.Sequential(layer))[0].double()
    theirs.ia3_l["default"].data.copy_((1 + patch.v).view(theirs.ia3_l["default"].shape))
    ours = patch.add_to(layer(x), Call(x, layer, layer.weight), 1.0)
    if not on_input:
        ours = ours + patch.v * layer.bias
    assert_close(ours, theirs(x).detach())


@pytest.mark.parametrize(("family", "count"), [("sd15", 99_840), ("sdxl", 665_600)])
def test_count_of_the_released_choice_of_sites(family: str, count: int) -> None:
    sites = [s for part, root in family_named(family).published().items() for s in find_sites(part, root)]
    outputs, inputs = choose(sites, ["unet.*.to_k", "unet.*.to_v"], {}), choose(sites, ["unet.*.ff.net.2"], {}, {"linear"})

    def size(site: Site, on_input: bool) -> int:
        return Ia3(site, Ia3Options(on_input=on_input)).v.numel()

    assert sum(size(s, False) for s in outputs) + sum(size(s, True) for s in inputs) == count
