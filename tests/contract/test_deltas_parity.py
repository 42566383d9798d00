"""Against what was not written here: peft, torch.kron, LyCORIS where it is installed, and the counts that papers report."""

import ast
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vgm_peft
from tests.contract.ground import assert_close, base_of, draw
from vgm_peft.attachment import Attachment
from vgm_peft.delta import Call, Delta, Patch
from vgm_peft.deltas import TABLE
from vgm_peft.deltas.krona import Krona, KronaOptions
from vgm_peft.deltas.lora import Lora, LoraOptions
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.families import family_named
from vgm_peft.site import Site, choose, find_sites


def patched(layer: nn.Module, method: type[Patch], options: object) -> Patch:
    site = find_sites("part", nn.ModuleDict({"layer": layer}))[0]
    patch = method(site, options).double()
    draw(patch)
    return patch


def sample(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


# --- peft --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(24, 16), sample(2, 5, 24)),
        (nn.Conv2d(8, 16, 3, stride=2, padding=1), sample(2, 8, 7, 6)),
        (nn.Conv2d(8, 12, 1), sample(2, 8, 5, 5)),
    ],
    ids=["linear", "3x3", "1x1"],
)
def test_lora_is_that_of_peft(layer: nn.Module, x: Tensor, rslora: bool) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    layer = layer.double()
    patch = patched(layer, Lora, LoraOptions(rank=4, alpha=6.0, rslora=rslora))
    model = peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules=["0"]), nn.Sequential(layer)
    )
    theirs = model[0].double()
    packed = patch.pack(layer.weight)
    theirs.lora_A["default"].weight.data.copy_(packed["lora_down.weight"])
    theirs.lora_B["default"].weight.data.copy_(packed["lora_up.weight"])
    assert_close(patch.change(layer.weight), theirs.get_delta_weight("default").detach())
    assert_close(patch.add_to(layer(x), Call(x, layer, layer.weight), 1.0), theirs(x).detach())


def test_lora_begins_as_peft_begins() -> None:
    """The same generator state gives the same `down`, bit for bit."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(11)
    config = peft.LoraConfig(r=4, target_modules=["0"])
    theirs = peft.inject_adapter_in_model(config, nn.Sequential(torch.nn.utils.skip_init(nn.Linear, 24, 16)))[0]
    torch.manual_seed(11)
    nn.Linear(24, 4, bias=False), nn.Linear(4, 16, bias=False)  # what peft draws before its own initialisation
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    ours = Lora(Site("part", "layer", "linear", (16, 24)), LoraOptions(rank=4), generator)
    assert torch.equal(ours.down, theirs.lora_A["default"].weight) and not bool(ours.up.any())


def test_lora_beside_an_adapter_of_diffusers() -> None:
    """On a U-Net that diffusers has wrapped for a LoRA of its own, ours is added to it, and comes off again."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    unet = family_named("sd15").tiny().unet.eval()
    sites = choose(find_sites("unet", unet), ["attention"], family_named("sd15").presets)
    delta = Delta.fit("sd15", Lora, sites, LoraOptions(rank=2)).train(False)
    draw(delta, size=0.1)
    inputs = sample(1, 4, 16, 16).float(), torch.tensor([500]), sample(1, 7, unet.config.cross_attention_dim).float()
    with torch.no_grad():
        plain = unet(*inputs).sample
        with Attachment({"unet": unet}, delta):
            expected = unet(*inputs).sample
        unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        assert torch.equal(unet(*inputs).sample, plain)
        with Attachment({"unet": unet}, delta):
            assert_close(unet(*inputs).sample, expected)
        assert torch.equal(unet(*inputs).sample, plain)


def test_a_whole_unet_agrees_with_diffusers_and_peft() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = base_of("sd15", torch.float64)
    unet = family_named("sd15").tiny().unet.double().eval()
    sites = choose(base.sites, ["attention", "conv"], base.family.presets)
    delta = Delta.fit("sd15", Lora, sites, LoraOptions(rank=3, alpha=4.5)).to(dtype=torch.float64).train(False)
    draw(delta, size=0.1)
    unet.add_adapter(peft.LoraConfig(r=3, lora_alpha=4.5, target_modules=[s.module for s in sites]))
    for patch in delta:
        theirs, packed = unet.get_submodule(patch.site.module).double(), patch.pack(torch.zeros(patch.site.shape))
        theirs.lora_A["default"].weight.data.copy_(packed["lora_down.weight"])
        theirs.lora_B["default"].weight.data.copy_(packed["lora_up.weight"])
    inputs = sample(1, 4, 16, 16), torch.tensor([500]), sample(1, 7, unet.config.cross_attention_dim)
    with torch.no_grad(), Attachment(base.parts, delta):
        assert_close(base.denoiser(*inputs).sample, unet(*inputs).sample)


# --- Kronecker ---------------------------------------------------------------------------------------------------------


def test_krona_is_the_kronecker_product() -> None:
    layer = nn.Linear(24, 32).double()
    patch = patched(layer, Krona, KronaOptions(a1=8, a2=6))
    assert isinstance(patch, Krona) and patch.A.shape == (8, 6) and patch.B.shape == (4, 4)
    assert_close(patch.change(layer.weight), torch.kron(patch.A, patch.B).detach())
    conv = nn.Conv2d(12, 32, 3).double()
    patch = patched(conv, Krona, KronaOptions(a1=8, a2=6))
    assert isinstance(patch, Krona)
    flat = torch.kron(patch.A, patch.B.flatten(1)).detach()
    assert_close(patch.change(conv.weight).flatten(1), flat)


@pytest.mark.parametrize("layer", [nn.Linear(24, 32), nn.Conv2d(12, 32, 3)], ids=["linear", "3x3"])
def test_krona_is_a_full_lokr_of_lycoris(layer: nn.Module) -> None:
    pytest.importorskip("lycoris", reason="lycoris-lora is not installed (extra: lycoris)")
    from lycoris.functional import lokr

    patch = patched(layer.double(), Krona, KronaOptions(a1=8, a2=6))
    packed = patch.pack(layer.weight)
    theirs = lokr.diff_weight(packed["lokr_w1"], None, None, packed["lokr_w2"], None, None, None)
    assert_close(patch.change(layer.weight), theirs)


def test_the_released_code_permutes_the_rows() -> None:
    """What the note in the module says of the paper's own code, which returns (b1, a1) where the product has (a1, b1)."""
    down, up, x = sample(6, 8), sample(4, 5), sample(3, 6 * 5)
    released = torch.einsum("pq,ji,njq->npi", up, down, x.view(3, 6, 5)).flatten(1)
    dense = torch.einsum("pq,ji->pijq", up, down).reshape(4 * 8, 6 * 5)
    assert_close(x @ dense.T, released)
    rows = torch.arange(32).view(8, 4).T.flatten()
    assert_close(dense, torch.kron(down.T.contiguous(), up)[rows])


# --- options -----------------------------------------------------------------------------------------------------------


def test_sizes_that_do_not_fit_are_named_with_what_would() -> None:
    linear, conv = Site("unet", "to_q", "linear", (12, 8)), Site("unet", "conv_out", "conv", (4, 320, 3, 3))
    with pytest.raises(DeltaError, match=r"unet\.to_q linear 12x8: rank 9; expected 1 \.\. 8"):
        Delta.fit("any", Lora, [linear], LoraOptions(rank=9))
    with pytest.raises(DeltaError, match=r"unet\.conv_out conv 4x320x3x3: rank 8; expected 1 \.\. 4"):
        Delta.fit("any", Lora, [conv])
    with pytest.raises(DeltaError, match=r"a1 = 5 does not divide its 12 outputs; expected one of 1, 2, 3, 4, 6, 12;"):
        Krona(linear, KronaOptions(a1=5))
    with pytest.raises(DeltaError, match=r"conv_out conv 4x320x3x3: a2 = 3 does not divide its 320 inputs"):
        Krona(conv, KronaOptions(a2=3))
    high = Lora(conv, LoraOptions(rank=6))  # as files of other tools may well hold
    assert (again := Lora.unpack(conv, high.pack(torch.zeros(conv.shape)))) is not None and again.options.rank == 6
    for damaged in ({"lora_up.weight": torch.zeros(4)}, {"lora_down.weight": torch.zeros(())}, {"alpha": torch.zeros(2)}):
        with pytest.raises(DeltaError, match="conv_out"):
            Lora.unpack(conv, {**high.pack(torch.zeros(conv.shape)), **damaged})
    assert Krona(linear, KronaOptions()).options == KronaOptions(a1=12, a2=8)
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"module_dropout": -0.1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            LoraOptions(**wrong)
    with pytest.raises(ConfigError, match="a1 = 0"):
        KronaOptions(a1=0)


def test_alpha_survives_packing() -> None:
    site = Site("unet", "to_q", "linear", (8, 8))
    for options, scale in (
        (LoraOptions(rank=4), 1.0),
        (LoraOptions(rank=4, alpha=1.0), 0.25),
        (LoraOptions(rank=4, alpha=6.0, rslora=True), 3.0),
    ):
        packed = Lora(site, options).pack(torch.zeros(8, 8))
        assert options.scale == scale and float(packed["alpha"]) == scale * 4
        again = Lora.unpack(site, packed)
        assert again is not None and again.options.scale == scale
        del packed["alpha"]
        assert (again := Lora.unpack(site, packed)) is not None and again.options.scale == 1.0


# --- counts ------------------------------------------------------------------------------------------------------------


@cache
def published_sites(family: str) -> tuple[Site, ...]:
    return tuple(s for part, root in family_named(family).published().items() for s in find_sites(part, root))


ATTENTION_MLP_PROJ = ["attention+mlp", "unet.*.proj_in", "unet.*.proj_out"]


@pytest.mark.parametrize(
    ("family", "targets", "method", "options", "count"),
    [
        ("sd15", ["attention"], Lora, LoraOptions(rank=4), 797_184),
        ("sd15", ["attention", "text"], Lora, LoraOptions(rank=4), 1_092_096),
        ("sd15", ATTENTION_MLP_PROJ, Lora, LoraOptions(rank=4), 1_695_744),
        ("sd15", ["all"], Lora, LoraOptions(rank=4), 4_232_864),
        ("sdxl", ["attention"], Lora, LoraOptions(rank=4), 5_806_080),
        ("sd15", ["attention"], Krona, KronaOptions(), 248_176),
        ("sd15", ["attention", "text"], Krona, KronaOptions(a1=16, a2=16), 520_928),
        ("sdxl", ["attention"], Krona, KronaOptions(), 2_152_320),
        ("sdxl", ["attention"], Krona, KronaOptions(a1=4, a2=64), 3_874_560),
        ("sdxl", ["attention"], Krona, KronaOptions(a1=16, a2=64), 1_506_240),
    ],
)
def test_published_counts(family: str, targets: Sequence[str], method: type[Patch], options: object, count: int) -> None:
    sites = choose(published_sites(family), targets, family_named(family).presets)
    shapes = Counter((s.op, s.shape) for s in sites)  # one patch for each is enough to count them all
    sizes = {key: sum(p.numel() for p in method(Site("any", "any", *key), options).parameters()) for key in shapes}
    assert sum(sizes[key] * many for key, many in shapes.items()) == count


# --- the rule of the house ---------------------------------------------------------------------------------------------


PARDONED = {
    "train/config.py": "the default of `[delta] kind`, a recipe in code",
    "families/original.py": "looks for names of tensors in foreign files",
    "formats/diffusers.py": "looks for the initialisations of peft in foreign metadata",
    "formats/kohya.py": "says the kind in metadata by LyCORIS' words, as the file's tensors tell it",
    "formats/forms.py": "names forms of tensors in other tools' files, which many kinds are spelled in",
    "formats/targets.py": "says which of those forms a tool loads",
    "formats/settings.py": "reads peft's words for ways to begin",
    "formats/plan.py": "has a LoRA as the form in which a change of low rank is written",
    "formats/stamps.py": "tells UIs the network by sd-scripts' and LyCORIS' words",
    "tools/extract.py": "decompositions of a difference, each called as the kind that it ends in",
    "cli/verbs/extract.py": "the default of --kind",
}


HOMONYMS = {"diff": "what other tools call a difference", "norm": "what a site is"}
"""Kinds whose names are words of the house too: only the use of their classes can be told."""


@pytest.mark.parametrize("kind", list(TABLE))
def test_a_method_is_named_in_its_own_file_and_the_table_only(kind: str) -> None:
    """No other code spells a kind (as a whole text) or uses its classes; recipes are TOML, prose is free."""
    package = Path(vgm_peft.__file__).parent
    home = Path(*TABLE[kind].__module__.split(".")[1:]).with_suffix(".py")
    classes = {TABLE[kind].__name__, TABLE[kind].Options.__name__}
    words = classes if kind in HOMONYMS else {kind, *classes}
    guilty: list[str] = []
    for path in package.rglob("*.py"):
        if path.relative_to(package) in (home, Path("deltas/__init__.py"), *map(Path, PARDONED)):
            continue
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if any(name in text for name in words) else ():
            names = {node.value} if isinstance(node, ast.Constant) else {node.id} if isinstance(node, ast.Name) else set()
            if isinstance(node, ast.ImportFrom):
                names = {alias.name for alias in node.names} | {(node.module or "").rpartition(".")[2]}
            if names & words:
                guilty.append(f"{path.relative_to(package)}:{getattr(node, 'lineno', 0)}")
    assert guilty == []
