"""KronA, LoKr and LoHa against LyCORIS and peft: same tensors, same dW.

Differences of convention: LyCORIS' `get_diff_weight` applies the scale twice, its functional form once (which is compared
here); of two full factors every reader but peft ignores alpha; peft's factors are called alike but w1 begins at zero.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.contract.ground import assert_close, draw
from vgm_peft.delta import Call, Patch
from vgm_peft.deltas import TABLE
from vgm_peft.deltas.divisors import split
from vgm_peft.deltas.krona import Krona, KronaOptions
from vgm_peft.deltas.loha import Loha, LohaOptions
from vgm_peft.deltas.lokr import Lokr, LokrOptions
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.formats.vocabulary import unpack
from vgm_peft.site import Site, find_sites

LAYERS = {"linear": lambda: nn.Linear(32, 48), "3x3": lambda: nn.Conv2d(16, 24, 3), "1x1": lambda: nn.Conv2d(16, 24, 1)}
LOKR = [
    LokrOptions(rank=1, alpha=2.0),
    LokrOptions(rank=1, alpha=0.5, factor=4, tucker=True),
    LokrOptions(rank=1, decompose_both=True, factor=4),
    LokrOptions(alpha=3.0, factor=4, full_matrix=True),
]


def site_of(layer: nn.Module) -> Site:
    return find_sites("part", nn.ModuleDict({"layer": layer}))[0]


def patched(layer: nn.Module, method: type[Patch], options: object) -> Any:
    patch = method(site_of(layer), options).double()
    draw(patch)
    return patch


def unpacked(site: Site, tensors: dict[str, Tensor]) -> list[Any]:
    """What the table reads, in float64 (a method's values are float32, so tensors must be too to be read exactly)."""
    return [p.double() for method in TABLE.values() if (p := method.unpack(site, tensors)) is not None]


def their_lokr(layer: nn.Module, options: LokrOptions) -> Any:
    pytest.importorskip("lycoris", reason="lycoris-lora is not installed")
    from lycoris.modules.lokr import LokrModule

    theirs: Any = LokrModule(
        "layer",
        layer,
        1.0,
        options.rank,
        options.alpha or options.rank,
        use_tucker=options.tucker,
        decompose_both=options.decompose_both,
        full_matrix=options.full_matrix,
        factor=options.factor,
    )
    generator = torch.Generator().manual_seed(4)
    for parameter in theirs.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return theirs


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", LOKR)
def test_lokr_is_that_of_lycoris(name: str, options: LokrOptions) -> None:
    layer = LAYERS[name]()
    theirs = their_lokr(layer, options)
    tensors = {k: v.detach() for k, v in theirs.state_dict().items() if k.startswith("lokr") or k == "alpha"}
    (ours,) = unpacked(site_of(layer), tensors)
    fresh = Lokr(site_of(layer), options)
    if isinstance(ours, Lokr):
        assert {k: v.shape for k, v in fresh.named_parameters()} == {k: v.shape for k, v in ours.named_parameters()}
    else:
        assert isinstance(ours, Krona) and fresh.options.full_matrix
    assert_close(ours.change(layer.weight.double()), theirs.get_weight(layer.weight.shape).detach().double(), torch.float32)
    (again,) = unpacked(site_of(layer), ours.float().pack(layer.weight))
    assert_close(again.change(layer.weight), ours.double().change(layer.weight), torch.float32)


@pytest.mark.parametrize("size", [4, 12, 127, 128, 250, 320, 360, 512, 640, 768, 1024, 1280, 2048])
@pytest.mark.parametrize("factor", [-1, 2, 3, 4, 8, 10, 16])
def test_sides_are_split_as_lycoris_does(size: int, factor: int) -> None:
    pytest.importorskip("lycoris", reason="lycoris-lora is not installed")
    from lycoris.functional.general import factorization

    assert split(size, factor) == factorization(size, factor)


def test_every_odd_lokr_file_is_read_by_its_shapes() -> None:
    """Unsorted factors (ai-toolkit), two low ranks that differ, w1 of low rank beside a full w2."""
    site = Site("unet", "to_q", "linear", (12, 20))
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    large_first = {"lokr_w1": values(6, 10), "lokr_w2_a": values(2, 1), "lokr_w2_b": values(1, 2), "alpha": torch.tensor(0.5)}
    (patch,) = unpacked(site, large_first)
    expected = 0.5 * torch.kron(large_first["lokr_w1"], large_first["lokr_w2_a"] @ large_first["lokr_w2_b"])
    assert_close(patch.change(torch.zeros(12, 20)), expected.double(), torch.float32)
    low = {"lokr_w1_a": values(3, 2), "lokr_w1_b": values(2, 5)}
    differ = {**low, "lokr_w2_a": values(4, 1), "lokr_w2_b": values(1, 4), "alpha": torch.tensor(2.0)}
    (patch,) = unpacked(site, differ)
    expected = 2.0 * torch.kron(low["lokr_w1_a"] @ low["lokr_w1_b"], differ["lokr_w2_a"] @ differ["lokr_w2_b"])
    assert_close(patch.change(torch.zeros(12, 20)), expected.double(), torch.float32)
    beside = {**low, "lokr_w2": values(4, 4), "alpha": torch.tensor(1.0)}
    (patch,) = unpacked(site, beside)
    expected = 0.5 * torch.kron(low["lokr_w1_a"] @ low["lokr_w1_b"], beside["lokr_w2"])
    assert_close(patch.change(torch.zeros(12, 20)), expected.double(), torch.float32)


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_loha_is_that_of_lycoris(name: str, tucker: bool) -> None:
    pytest.importorskip("lycoris", reason="lycoris-lora is not installed")
    from lycoris.modules.loha import LohaModule

    layer = LAYERS[name]()
    theirs: Any = LohaModule("layer", layer, 1.0, 4, 2.0, use_tucker=tucker)
    generator = torch.Generator().manual_seed(4)
    for parameter in theirs.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    tensors = {k: v.detach() for k, v in theirs.state_dict().items() if k.startswith("hada") or k == "alpha"}
    (ours,) = unpacked(site_of(layer), tensors)
    assert isinstance(ours, Loha) and ours.options.scale == 0.5
    expected = theirs.get_weight(layer.weight.shape).detach().double()
    assert_close(ours.change(layer.weight), expected, torch.float32)
    packed = ours.float().pack(layer.weight)
    assert {k: v.shape for k, v in packed.items()} == {k: v.shape for k, v in tensors.items()}


@pytest.mark.parametrize("kind", ["loha", "lokr"])
@pytest.mark.parametrize("name", ["linear", "3x3"])
def test_the_products_are_those_of_peft(kind: str, name: str) -> None:
    peft: Any = pytest.importorskip("peft", reason="peft is not installed")
    layer = LAYERS[name]().double()
    options = LohaOptions(rank=2, alpha=3.0) if kind == "loha" else LokrOptions(rank=1, alpha=3.0)
    patch = patched(layer, TABLE[kind], options)
    config = peft.LoHaConfig if kind == "loha" else peft.LoKrConfig
    model = peft.inject_adapter_in_model(config(r=options.rank, alpha=3, target_modules=["0"]), nn.Sequential(layer))
    theirs: Any = model[0].double()
    packed = patch.pack(layer.weight)
    if kind == "lokr":  # peft has the scale in its configuration, not in w1
        packed["lokr_w1"] = packed["lokr_w1"] / options.scale
    for suffix, tensor in packed.items():
        if suffix != "alpha":
            mine = getattr(theirs, suffix)["default"]
            mine.data.copy_(tensor.reshape(mine.shape))
    assert_close(patch.change(layer.weight), theirs.get_delta_weight("default").detach())


def test_a_loha_acts_thin_or_on_the_weight_by_its_arithmetic() -> None:
    for side, rank, acts in ((640, 8, "output"), (640, 16, "weight"), (1280, 14, "output"), (1280, 16, "weight")):
        assert Loha(Site("unet", "to_q", "linear", (side, side)), LohaOptions(rank=rank)).acts == acts


def test_files_of_diffusekrona_have_their_rows_permuted() -> None:
    """The forward of the code released with the paper, on its tensors (see `test_deltas_parity`)."""
    site = Site("unet", "to_q", "linear", (32, 30))
    generator = torch.Generator().manual_seed(0)
    down, up, x = (torch.randn(n, generator=generator) for n in ((6, 8), (4, 5), (3, 30)))
    released = torch.einsum("pq,ji,njq->npi", up, down, x.view(3, 6, 5)).flatten(1)
    patch: Any = unpack(site, {"lora_down.weight": down, "lora_up.weight": up}, "file").double()
    assert isinstance(patch, Krona) and patch.options == KronaOptions(a1=8, a2=6, layout="released")
    layer = nn.Linear(30, 32).double()
    assert_close(x.double() @ patch.change(layer.weight).T, released.double(), torch.float32)
    assert_close(patch.contribution(Call(x.double(), layer, layer.weight)), released.double(), torch.float32)


def test_what_does_not_fit_is_named() -> None:
    site = Site("unet", "to_q", "linear", (12, 20))
    with pytest.raises(DeltaError, match=r"to_q linear 12x20: o1 = 5 does not divide its 12 outputs; expected one of 1, 2, 3"):
        Lokr(site, LokrOptions(o1=5, i1=2))
    with pytest.raises(DeltaError, match=r"to_q linear 12x20: rank 13; expected 1 \.\. 12"):
        Loha.check(site, LohaOptions(rank=13))
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"factor": 0}, {"o1": 2}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            LokrOptions(**wrong)
