"""LoHa and LoKr decomposed as DoRA against LyCORIS (both axes): same tensors, same merged weight.

Differences of convention: LyCORIS adds an epsilon to the norm and lets gradients through it, and its merge applies the scale
twice (so alpha is the rank here); with no strength left it keeps W + dW, we W.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.contract.ground import assert_close, base_of, draw
from vgm_peft.delta import Delta
from vgm_peft.deltas.loha import Loha, LohaOptions
from vgm_peft.deltas.lokr import Lokr, LokrOptions
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.formats import read, write
from vgm_peft.site import Site, find_sites

LAYERS = {"linear": lambda: nn.Linear(32, 48), "square": lambda: nn.Linear(32, 32), "3x3": lambda: nn.Conv2d(16, 24, 3)}


def theirs_on(layer: nn.Module, algo: str, by_output: bool) -> Any:
    pytest.importorskip("lycoris", reason="lycoris-lora is not installed")
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    more: dict[str, Any] = {"factor": 4, "full_matrix": algo == "lokr full"} if algo.startswith("lokr") else {}
    module: Any = LohaModule if algo == "loha" else LokrModule
    theirs = module("layer", layer, 1.0, 2, 2.0, weight_decompose=True, wd_on_out=by_output, **more)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in theirs.named_parameters():
        if not name.startswith("org"):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(parameter * (1 + 0.2 * noise) if name == "dora_scale" else 0.3 * noise)
    return theirs


@pytest.mark.parametrize("by_output", [True, False])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("algo", ["loha", "lokr", "lokr full"])
def test_it_is_that_of_lycoris(algo: str, name: str, by_output: bool) -> None:
    layer: Any = LAYERS[name]()
    site = find_sites("part", nn.ModuleDict({"layer": layer}))[0]
    theirs = theirs_on(layer, algo, by_output)
    names = ("hada", "lokr", "alpha", "dora_scale")
    tensors: dict[str, Tensor] = {k: v.detach() for k, v in theirs.state_dict().items() if k.startswith(names)}
    method = Loha if algo == "loha" else Lokr
    ours = method.unpack(site, tensors)
    assert ours is not None and ours.options.decompose == ("output" if by_output else "input") and ours.options.absolute
    weight = layer.weight.detach()
    merged = theirs.get_merged_weight(shape=weight.shape)[0].detach()
    assert_close(weight + ours.change(weight).detach(), merged)
    packed = ours.pack(torch.zeros(weight.shape))  # g is in the file: no base is needed to write it
    assert ours.packs_alone and packed["dora_scale"].shape == tensors["dora_scale"].shape
    again = method.unpack(site, packed)
    assert again is not None
    assert_close(weight + again.change(weight).detach(), merged)


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize(("method", "options"), [(Loha, LohaOptions), (Lokr, LokrOptions)])
def test_a_file_trained_here_says_the_same_to_others(method: Any, options: Any, axis: str, tmp_path: Path) -> None:
    base = base_of("sd15")
    sites = [s for s in base.sites if s.op == "linear"][:2] + [s for s in base.sites if s.op == "conv"][:2]
    delta = Delta.fit("sd15", method, sites, options(rank=2, decompose=axis)).train(False)
    draw(delta)
    again = read(write(delta, tmp_path / "delta.safetensors", "kohya", base), base)
    for patch in delta:
        weight = base.parts[patch.site.part].get_submodule(patch.site.module).weight.detach()
        assert_close(again.patches[patch.site.name].change(weight).detach(), patch.change(weight).detach())  # pyright: ignore
    with pytest.raises(DeltaError, match="name the base"):
        write(delta, tmp_path / "alone.safetensors", "kohya")


def test_what_does_not_fit_is_named() -> None:
    site = Site("unet", "to_q", "linear", (12, 8))
    packed = Loha(site, LohaOptions(rank=2, decompose="output")).pack(torch.ones(12, 8))
    for wrong in (torch.zeros(8), torch.zeros(1, 12)):
        with pytest.raises(DeltaError, match=r"to_q linear 12x8: dora_scale .*expected 12x1 .* or 1x8"):
            Loha.unpack(site, {**packed, "dora_scale": wrong})
    for options in (LohaOptions, LokrOptions):
        with pytest.raises(ConfigError, match='decompose = "both"; expected output or input'):
            options(decompose="both")  # pyright: ignore[reportArgumentType]
