"""The LoRA family against what was not written here: LyCORIS' Tucker form and ranks by timestep, peft's PiSSA, kohya's rules.

Differences of convention: peft's PiSSA takes the start out of the base's weights, ours out of the delta; LyCORIS' DyLoRA has
another scale than kohya's, which is ours; LyCORIS keeps T-LoRA's start out of its files, so that those cannot be read.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.contract.ground import assert_close, base_of, difference, draw, predict
from vgm_peft.attachment import Attachment
from vgm_peft.delta import Call, Delta
from vgm_peft.deltas.dylora import Dylora, DyloraOptions
from vgm_peft.deltas.lora import Lora, LoraOptions
from vgm_peft.deltas.pissa import Pissa, PissaOptions
from vgm_peft.deltas.tlora import Tlora, TloraOptions
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.formats import write
from vgm_peft.site import Site

LINEAR, CONV = Site("unet", "to_q", "linear", (12, 20)), Site("unet", "conv", "conv", (12, 8, 3, 3))


def forward(patch: Any, x: Tensor, layer: nn.Module) -> Tensor:
    return patch.contribution(Call(x, layer, layer.weight))  # pyright: ignore[reportArgumentType]


# --- options of LoRA ---------------------------------------------------------------------------------------------------


def test_tucker_files_are_read_exactly() -> None:
    pytest.importorskip("lycoris", reason="lycoris-lora is not installed")
    from lycoris.modules.locon import LoConModule

    torch.manual_seed(0)
    layer = nn.Conv2d(8, 12, 3)
    theirs: Any = LoConModule("layer", layer, 1.0, 4, 2, use_tucker=True)
    nn.init.normal_(theirs.lora_up.weight)
    tensors = {f"{n}.weight": getattr(theirs, n).weight.detach() for n in ("lora_down", "lora_mid", "lora_up")}
    ours = Lora.unpack(CONV, {**tensors, "alpha": theirs.alpha})
    assert ours is not None and ours.options == LoraOptions(rank=4, alpha=2.0)
    assert_close(ours.change(layer.weight).detach(), theirs.get_diff_weight()[0].detach())
    for damaged in (tensors["lora_mid.weight"][:, :3], tensors["lora_mid.weight"][:3], torch.zeros(4), torch.zeros(())):
        with pytest.raises(DeltaError, match=r"unet\.conv conv 12x8x3x3: .*lora_mid"):
            Lora.unpack(CONV, {**tensors, "lora_mid.weight": damaged})


def test_lora_plus_and_lora_fa() -> None:
    assert Lora(LINEAR, LoraOptions(plus=16.0)).extra_groups() == {"up": 16.0}
    assert Lora(LINEAR, LoraOptions()).extra_groups() == {}
    frozen = Delta.fit("any", Lora, [LINEAR], LoraOptions(rank=4, freeze_down=True))
    assert frozen.count() == 12 * 4 and [n for n, p in frozen.parameters() if p.requires_grad] == [f"{LINEAR.name}/up"]
    for wrong in ({"plus": 0.0}, {"init": "zeros"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            LoraOptions(**wrong)  # pyright: ignore[reportArgumentType]


def test_starts_have_the_deviations_of_their_makers() -> None:
    """diffusers' scripts (peft "gaussian") and cloneofsimo draw N(0, 1/r), kohya's LoRA-FA N(0, sqrt(2 / (in + r)))."""
    site = Site("unet", "to_q", "linear", (640, 640))
    for init, expected in (("gaussian", 1 / 16), ("xavier", (2 / 656) ** 0.5), ("kaiming", 640**-0.5 / 3**0.5)):
        down = Lora(site, LoraOptions(rank=16, init=init)).down  # pyright: ignore[reportArgumentType]
        assert abs(float(down.detach().std()) / expected - 1) < 0.02


def test_the_weights_of_ed_lora_are_a_lora_at_alpha_equal_to_rank() -> None:
    """Mix-of-Show's forward is Wx + alpha up(down(x)) at alpha 1, whatever the rank."""
    torch.manual_seed(0)
    layer, patch, x = nn.Linear(20, 12), Lora(LINEAR, LoraOptions(rank=4)), torch.randn(3, 20)
    draw(patch)
    assert_close(
        patch.add_to(layer(x), Call(x, layer, layer.weight), 0.7), layer(x) + 0.7 * 1.0 * (x @ patch.down.T @ patch.up.T)
    )


# --- PiSSA -------------------------------------------------------------------------------------------------------------


def test_pissa_is_that_of_peft_on_the_whole_base() -> None:
    """Same start (up to signs), same trained weights, and what peft changes in the base is what ours has as its start."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    layer = nn.Linear(20, 12)
    weight, x = layer.weight.detach().clone(), torch.randn(7, 20)
    ours = Pissa(LINEAR, PissaOptions(rank=4, alpha=6.0))
    ours.start(weight)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=["0"])
    theirs: Any = peft.inject_adapter_in_model(config, nn.Sequential(layer))[0]
    down, up = theirs.lora_A["default"].weight.detach(), theirs.lora_B["default"].weight.detach()
    assert_close(1.5 * ours.start_up @ ours.start_down, 1.5 * up @ down)
    ours.start_down.copy_(down)  # signs are free
    ours.start_up.copy_(up)
    step = torch.randn(4, 20), torch.randn(12, 4)
    theirs.lora_A["default"].weight.data.add_(step[0])
    theirs.lora_B["default"].weight.data.add_(step[1])
    with torch.no_grad():
        ours.down.copy_(step[0])
        ours.up.copy_(step[1])
        now = nn.functional.linear(x, weight + ours.change(weight), theirs.base_layer.bias)
        assert difference(now, theirs(x)) < 1e-5
    packed = ours.pack(weight)
    again = Lora.unpack(LINEAR, packed)
    assert again is not None and again.options.rank == 8
    assert_close(again.change(weight), ours.change(weight))


def test_pissa_starts_from_the_base_and_changes_nothing() -> None:
    base = base_of("sd15")
    sites = [s for s in base.sites if s.op == "conv"][:3] + [s for s in base.sites if s.op == "linear"][:3]
    delta = Delta.fit("sd15", Pissa, sites, PissaOptions(rank=2))
    assert not any(bool(patch.start_up.any()) for patch in delta)  # pyright: ignore
    count = delta.count()
    delta.start(base.parts)
    assert delta.count() == count == sum(2 * (s.rows + s.columns) for s in sites)
    assert all(bool(patch.start_up.any()) for patch in delta)  # pyright: ignore
    with torch.no_grad():
        expected = predict(base)
        with Attachment(base.parts, delta):
            assert torch.equal(predict(base), expected)


def test_a_quick_start_is_near_the_exact_one() -> None:
    torch.manual_seed(0)
    site, state = Site("unet", "to_q", "linear", (96, 120)), torch.get_rng_state()
    spectrum = torch.diag(0.9 ** torch.arange(96.0)) @ torch.linalg.qr(torch.randn(120, 96)).Q.T
    weight, state = torch.linalg.qr(torch.randn(96, 96)).Q @ spectrum, torch.get_rng_state()
    starts: list[Tensor] = []
    for iterations in (None, 8, 8):
        patch = Pissa(site, PissaOptions(rank=8, iterations=iterations))
        patch.start(weight)
        starts.append(patch.start_up.detach() @ patch.start_down.detach())
    assert difference(starts[1], starts[0]) < 1e-4 and torch.equal(starts[1], starts[2])
    assert torch.equal(torch.get_rng_state(), state)


# --- DyLoRA ------------------------------------------------------------------------------------------------------------


def test_dylora_trains_one_unit_of_the_first_ranks_by_kohyas_scale() -> None:
    layer, x = nn.Linear(20, 12).double(), torch.randn(3, 20, dtype=torch.float64)
    patch = Dylora(LINEAR, DyloraOptions(rank=8, alpha=4.0, unit=2)).double()
    draw(patch)
    patch.train()
    seen: set[int] = set()
    for seed in range(40):
        torch.manual_seed(seed)
        found = forward(patch, x, layer)
        torch.manual_seed(seed)
        assert torch.equal(forward(patch, x, layer), found)
        up, down = torch.autograd.grad(found.square().sum(), [patch.up, patch.down])
        learning = down.any(1).nonzero().flatten().tolist()
        assert len(learning) == 2 and up.any(0).nonzero().flatten().tolist() == learning
        n = learning[-1] + 1
        assert_close(found, 0.5 * (8 / n) ** 0.5 * (x @ patch.down[:n].T @ patch.up[:, :n].T))
        assert_close(forward(patch.truncated(n).eval(), x, layer), found)
        seen.add(n)
    assert seen == {2, 4, 6, 8}
    patch.eval()
    assert_close(forward(patch, x, layer), 0.5 * (x @ patch.down.T @ patch.up.T))


def test_dylora_cut_is_an_ordinary_lora() -> None:
    patch = Dylora(CONV, DyloraOptions(rank=8, unit=4))
    draw(patch)
    cut = patch.truncated(6)
    assert (cut.options.rank, cut.options.unit, cut.down.shape) == (6, 2, (6, 8, 3, 3))
    again = Lora.unpack(CONV, cut.pack(torch.zeros(CONV.shape)))
    assert again is not None
    assert_close(
        again.change(torch.zeros(CONV.shape)), (8 / 6) ** 0.5 * torch.einsum("or,rikl->oikl", patch.up[:, :6], patch.down[:6])
    )
    with pytest.raises(DeltaError, match=r"conv.*cut to rank 9; expected 1 \.\. 8"):
        patch.truncated(9)
    with pytest.raises(ConfigError, match=r"unit = 3 does not divide the rank 8; expected one of 1, 2, 4, 8"):
        DyloraOptions(rank=8, unit=3)


# --- T-LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "least", "power"), [(64, 32, 1.0), (32, 1, 1.0), (8, 2, 2.0), (4, 4, 1.0), (4, 0, 0.5)])
def test_ranks_by_timestep_are_those_of_lycoris(rank: int, least: int, power: float) -> None:
    pytest.importorskip("lycoris", reason="lycoris-lora is not installed")
    from lycoris.modules.tlora import compute_timestep_mask

    patch = Tlora(Site("unet", "to_q", "linear", (64, 64)), TloraOptions(rank=rank, min_rank=least, power=power))
    steps = range(0, 1000)
    patch.at(torch.tensor(list(steps)))
    assert patch.mask is not None
    expected = torch.cat([compute_timestep_mask(t, 1000, rank, least, power) for t in steps])
    odd = [t for t in steps if not torch.equal(patch.mask[t].float(), expected[t])]
    # int() of a quotient that is whole but for rounding is one too low there.
    assert all(abs(((1000 - t) / 1000) ** power * (rank - least) % 1 - 1) < 1e-9 for t in odd) and len(odd) < 20


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("site", [LINEAR, CONV], ids=["linear", "conv"])
def test_every_picture_has_the_ranks_of_its_timestep(site: Site, orthogonal: bool) -> None:
    torch.manual_seed(0)
    layer: nn.Module = (nn.Linear(20, 12) if site is LINEAR else nn.Conv2d(8, 12, 3, padding=1)).double()
    x = torch.randn(*((4, 5, 20) if site is LINEAR else (4, 8, 6, 6)), dtype=torch.float64)
    patch = Tlora(site, TloraOptions(rank=4, min_rank=1, orthogonal=orthogonal)).double()
    draw(patch)
    alone: list[Tensor] = []
    for picture, t in zip(x, (999, 500, 250, 0), strict=True):
        patch.at(torch.tensor(t))
        alone.append(forward(patch, picture[None], layer))
        assert int(torch.linalg.matrix_rank(patch.change(torch.zeros(site.shape)).flatten(1).detach())) in (
            (mask := int(patch.mask.sum())),  # pyright: ignore[reportOptionalMemberAccess]
            2 * mask,
        )
    assert difference(alone[0], alone[3]) > 0.1
    patch.at(torch.tensor([999, 500, 250, 0]))
    assert_close(forward(patch, x, layer), torch.cat(alone).detach())
    with pytest.raises(DeltaError, match="different timesteps"):
        patch.change(torch.zeros(site.shape))
    patch.at(torch.tensor([250, 250]))  # guidance: twice as many pictures at one timestep each
    assert_close(forward(patch, x, layer)[2:3], alone[2].detach())


def test_an_orthogonal_start_is_orthonormal_with_the_last_values_and_zero() -> None:
    """P diag(w) Q - P0 diag(w0) Q0, as the paper writes it, from the differences that we keep."""
    site = Site("unet", "to_q", "linear", (48, 64))
    patch = Tlora(site, TloraOptions(rank=4, orthogonal=True))
    eye = torch.eye(4)
    assert_close(patch.start_up.T @ patch.start_up, eye)
    assert_close(patch.start_down @ patch.start_down.T, eye)
    values = [torch.linalg.svdvals(torch.randn(48, 64) / 4)[-4:] for _ in range(200)]
    assert abs(float(patch.start_sigma.mean() / torch.stack(values).mean()) - 1) < 0.2
    assert not bool(patch.change(torch.zeros(48, 64)).any())
    with torch.no_grad():
        for parameter in (patch.up, patch.down, patch.sigma):
            parameter.normal_(generator=torch.Generator().manual_seed(1))
        now = (patch.start_up + patch.up) * (patch.start_sigma + patch.sigma) @ (patch.start_down + patch.down)
        assert_close(patch.change(torch.zeros(48, 64)), now - patch.start_up * patch.start_sigma @ patch.start_down)


def test_a_timed_delta_acts_in_sampling_keeps_text_encoders_whole_and_is_not_exported(tmp_path: Any) -> None:
    base = base_of("sd15")
    sites = [s for s in base.sites if s.op == "linear"]
    delta = Delta.fit("sd15", Tlora, sites, TloraOptions(rank=4, min_rank=1)).train(False)
    draw(delta, size=0.05)
    with torch.no_grad(), Attachment(base.parts, delta):
        predict(base)
    told = {patch.site.part: patch.mask for patch in delta if isinstance(patch, Tlora)}
    assert told["text_encoder"] is None and (mask := told["unet"]) is not None and mask.tolist() == [[True, True, False, False]]
    with pytest.raises(DeltaError, match="tlora changes with the timestep"):
        write(delta, tmp_path / "delta.safetensors", format="kohya")
    for wrong in ({"min_rank": 9}, {"power": 0.0}, {"steps": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            TloraOptions(rank=8, **wrong)  # pyright: ignore[reportArgumentType]
