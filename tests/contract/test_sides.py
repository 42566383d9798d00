"""What every side network promises, beside the tiny base of every family: parametrised over both tables."""

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.contract.ground import State, base_of
from vgm_peft.beside import Beside
from vgm_peft.errors import BaseModelError, ConfigError, DataError, DeltaError, SaveError, VgmError
from vgm_peft.families import TABLE as FAMILIES
from vgm_peft.family import Base, Query
from vgm_peft.side import Side
from vgm_peft.sides import TABLE, open_side, side_named


@pytest.fixture(params=sorted(TABLE))
def side(request: pytest.FixtureRequest) -> Side:
    return TABLE[request.param]


@pytest.fixture(params=sorted(FAMILIES))
def base(request: pytest.FixtureRequest) -> Base:
    return base_of(request.param)


@lru_cache
@torch.no_grad()
def trained(side: str, family: str) -> nn.Module:
    """A network that says something: every zero weight is moved."""
    network = TABLE[side].create(base_of(family), TABLE[side].Options())
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        if not p.any():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return network.eval()  # without dropout


def weights_of(saved: Path) -> Path:
    """The file of a saved network that holds its tensors: itself, or the one in its folder."""
    return saved if saved.is_file() else next(saved.glob("*.safetensors"))


def bytes_of(saved: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in ([saved] if saved.is_file() else saved.iterdir())}


@lru_cache
@torch.no_grad()
def query(family: str, rows: int = 2, side: int = 8) -> Query:
    base = base_of(family)
    noisy = torch.randn(rows, 4, side, side, generator=torch.Generator().manual_seed(1))
    prompts = ["a photo of a duck", "", "a robot"][:rows]
    return Query(noisy, torch.tensor([3, 900, 400])[:rows], base.family.encode_prompt(base, prompts))


def control(rows: int = 2, side: int = 64) -> Tensor:
    return torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(2))


def predict(base: Base, side: Side | None = None, picture: Tensor | None = None, strength: float = 1.0) -> Tensor:
    """What the denoiser predicts, with the trained network of a side beside it that sees a picture, or with none."""
    if side is None:
        return base.family.predict(base, query(base.family.name))
    with Beside(base, side, trained(side.name, base.family.name), strength) as beside:
        beside.tell(control() if picture is None else picture)
        return base.family.predict(base, query(base.family.name))


@torch.no_grad()
def test_a_fresh_network_changes_nothing_where_it_begins_at_zero(side: Side, base: Base) -> None:
    network, asked = side.create(base, side.Options()), query(base.family.name)
    assert network.training and all(p.requires_grad and p.dtype == torch.float32 for p in network.parameters())
    with Beside(base, side, network) as beside:
        beside.tell(control())
        found = base.family.predict(base, asked)
    assert torch.equal(found, base.family.predict(base, asked)) == side.zero


@torch.no_grad()
def test_a_silent_network_is_as_if_it_were_not_there(side: Side, base: Base) -> None:
    """Before it is told a picture, at strength 0, and when it was taken away."""
    network, asked = trained(side.name, base.family.name), query(base.family.name)
    before = State.of(base.parts)
    plain = base.family.predict(base, asked)
    with Beside(base, side, network) as beside:
        assert torch.equal(base.family.predict(base, asked), plain)
        beside.tell(control())
        assert not torch.equal(base.family.predict(base, asked), plain)
        beside.strength = 0.0
        assert torch.equal(base.family.predict(base, asked), plain)
    assert torch.equal(base.family.predict(base, asked), plain)
    before.check(base.parts)


def test_the_seed_decides(side: Side, base: Base) -> None:
    before = torch.random.get_rng_state()
    first, again, other = (side.create(base, side.Options(), seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[k], again[k]) for k in first) and any(not torch.equal(first[k], other[k]) for k in first)


def test_gradients_reach_the_network_and_not_the_base(side: Side, base: Base) -> None:
    network, asked = side.create(base, side.Options()), query(base.family.name, 1, 16)  # one place has nothing to attend to
    with torch.enable_grad(), Beside(base, side, network) as beside:
        for _ in range(3):  # What is behind a zero layer learns a step later, and some is behind two.
            beside.tell(control(1, 128))
            base.family.predict(base, asked).square().mean().backward()
            with torch.no_grad():
                for p in network.parameters():
                    p -= 0.1 * p.grad if p.grad is not None else 0
    without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
    assert not any(p.grad is not None for p in base.denoiser.parameters())


@torch.no_grad()
def test_it_reads_the_picture_and_its_strength_counts(side: Side, base: Base) -> None:
    found = predict(base, side, control())
    for other in (predict(base), predict(base, side, 1 - control()), predict(base, side, control(), 0.5)):
        assert (found - other).abs().max() > 1e-4


@torch.no_grad()
def test_several_are_heard_together_in_any_order(side: Side, base: Base) -> None:
    """Two of a kind, and one of each kind: the same picture whichever hook came first, and another than one alone."""
    network = trained(side.name, base.family.name)
    others = [(s, trained(s.name, base.family.name)) for s in TABLE.values()]
    all_of_them = [(side, network), *others]
    found: list[Tensor] = []
    for order in (all_of_them, all_of_them[::-1]):
        besides = [Beside(base, s, n, 0.5) for s, n in order]
        for beside in besides:
            beside.tell(control())
        found.append(base.family.predict(base, query(base.family.name)))
        for beside in besides:
            beside.remove()
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    assert (found[0] - predict(base, side, control(), 0.5)).abs().max() > 1e-4


@torch.no_grad()
def test_saved_and_opened_again(side: Side, base: Base, tmp_path: Path) -> None:
    network = trained(side.name, base.family.name)
    side.save(network, tmp_path / "me")
    saved = side.save(network, tmp_path / "me")
    assert list(tmp_path.iterdir()) == [saved] and saved.stem == "me", "nothing is left beside it"
    found, opened = open_side(saved, base)
    assert found is side and not opened.training and not any(p.requires_grad for p in opened.parameters())
    assert all(torch.equal(v, opened.state_dict()[k]) for k, v in network.state_dict().items())
    ours = predict(base, side)
    opened.requires_grad_(True)  # as those of `trained`: where weights learn, products may be folded otherwise, to the last bit
    with Beside(base, side, opened) as beside:
        beside.tell(control())
        assert torch.equal(base.family.predict(base, query(base.family.name)), ours)


def test_what_is_saved_is_plain_and_readable(side: Side, tmp_path: Path) -> None:
    saved = side.save(trained(side.name, "sd15"), tmp_path / "me")
    if saved.is_dir():
        assert {p.suffix for p in saved.iterdir()} == {".json", ".safetensors"}
    (tmp_path / "probe").touch()
    assert weights_of(saved).stat().st_mode == (tmp_path / "probe").stat().st_mode
    with safe_open(weights_of(saved), "pt") as file:
        assert file.keys()
    _, opened = open_side(saved, base_of("sd15", torch.bfloat16))
    assert {p.dtype for p in opened.parameters()} == {torch.bfloat16}


def test_a_network_of_another_family_is_refused(side: Side, base: Base, tmp_path: Path) -> None:
    saved = side.save(trained(side.name, base.family.name), tmp_path / "me")
    for name in FAMILIES:
        if name != base.family.name:
            with pytest.raises(DeltaError, match="made for"):
                open_side(saved, base_of(name))


def test_a_control_picture_of_another_size_is_refused(side: Side, base: Base) -> None:
    if not side.paired:
        pytest.skip("it reads pictures of any size")
    with pytest.raises(DataError, match=r"32x32.*64x64"):
        predict(base, side, control(side=32))


def test_what_is_no_side_network_is_refused(tmp_path: Path) -> None:
    base = base_of("sd15")
    with pytest.raises(DeltaError, match="no side network"):
        open_side(tmp_path, base)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(DeltaError, match="UNet2DModel"):
        open_side(tmp_path, base)
    (tmp_path / "config.json").write_text("not JSON")
    with pytest.raises(BaseModelError, match="JSON"):
        open_side(tmp_path, base)
    with pytest.raises(ConfigError, match='did you mean "controlnet"'):
        side_named("control-net")


def test_code_and_pickle_are_refused(side: Side, tmp_path: Path) -> None:
    base = base_of("sd15")
    saved = side.save(trained(side.name, "sd15"), tmp_path / "me")
    if saved.is_file():
        torch.save({"image_proj": {}}, saved)
        with pytest.raises(DeltaError, match=r"pickle.*never opened"):
            open_side(saved, base)
        return
    (saved / "extra.py").write_text("raise SystemExit")
    with pytest.raises(BaseModelError, match="never run"):
        open_side(saved, base)
    (saved / "extra.py").unlink()
    for weights in saved.glob("*.safetensors"):
        weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(BaseModelError, match="never read"):
        open_side(saved, base)


def test_a_cut_file_is_refused(side: Side, tmp_path: Path) -> None:
    saved = side.save(trained(side.name, "sd15"), tmp_path / "me")
    weights_of(saved).write_bytes(weights_of(saved).read_bytes()[:-100])
    with pytest.raises(DeltaError, match="cannot be loaded|cut short"):
        open_side(saved, base_of("sd15"))


def test_a_part_of_a_network_is_refused(side: Side, tmp_path: Path) -> None:
    saved = side.save(trained(side.name, "sd15"), tmp_path / "me")
    tensors = load_file(weights_of(saved))
    for gone in (min(tensors), max(tensors)):
        save_file({k: v for k, v in tensors.items() if k != gone}, weights_of(saved), {"format": "pt"})
        with pytest.raises(VgmError, match="missing|cannot be loaded"):
            open_side(saved, base_of("sd15"))


def test_saving_replaces_nothing_that_is_not_its_own(side: Side, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    mine = tmp_path / "photos" / "me.txt", tmp_path / "photos.safetensors"
    for path in mine:
        path.write_text("mine")
    with pytest.raises(SaveError, match="holds something else"):
        side.save(trained(side.name, "sd15"), tmp_path / "photos")
    assert [path.read_text() for path in mine] == ["mine", "mine"]


def test_a_failed_save_leaves_the_old_one(side: Side, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = trained(side.name, "sd15")
    saved = side.save(network, tmp_path / "me")
    before = bytes_of(saved)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for calls in (["fsync"], ["rename", "replace"]):
        with monkeypatch.context() as patch:
            for call in calls:
                patch.setattr(os, call, full)
            with pytest.raises(SaveError, match="No space left"):
                side.save(network, tmp_path / "me")
        assert bytes_of(saved) == before and list(tmp_path.iterdir()) == [saved]


PIPELINES = {"sd15": "StableDiffusionControlNetPipeline", "sdxl": "StableDiffusionXLControlNetPipeline"}


@torch.no_grad()
def test_controlnet_draws_what_the_stock_pipeline_draws(base: Base, tmp_path: Path) -> None:
    """The stock ControlNet pipeline with what `from_pretrained` reads, against the stock plain one with our residuals."""
    import diffusers

    side = TABLE["controlnet"]
    side.save(trained("controlnet", base.family.name), tmp_path / "me")
    network: Any = diffusers.ControlNetModel.from_pretrained(tmp_path / "me", use_safetensors=True)
    parts = {**base.pipe.components, "controlnet": network}
    if "XL" not in type(base.pipe).__name__:
        parts["requires_safety_checker"] = False
    stock = getattr(diffusers, PIPELINES[base.family.name])(**parts)
    stock.set_progress_bar_config(disable=True)
    picture = control(1)
    call: dict[str, Any] = dict(prompt="a duck", negative_prompt="dark", num_inference_steps=3, output_type="latent")
    call |= dict(height=64, width=64, latents=torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4)))
    theirs = stock(image=picture, controlnet_conditioning_scale=0.7, **call).images

    with Beside(base, side, network, 0.7) as beside:
        beside.tell(picture)
        ours = base.pipe(**call).images  # pyright: ignore
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (base.pipe(**call).images - theirs).abs().max() > 1e-2  # pyright: ignore


def test_controlnet_reads_pictures_at_the_bases_own_factor(tmp_path: Path) -> None:
    """Toybox has 4 pixels to a latent: the control picture's encoder must be one level shorter than the usual one."""
    from vgm_peft.families.latent import tiny_vae

    pipe: Any = FAMILIES["sd15"].tiny()
    pipe.register_modules(vae=tiny_vae(4))
    pipe.vae_scale_factor = 4
    base, side = Base(pipe, FAMILIES["sd15"], "four").freeze(), TABLE["controlnet"]
    network = side.create(base, side.Options())
    with torch.no_grad(), Beside(base, side, network) as beside:
        beside.tell(control(side=32))
        assert torch.equal(base.family.predict(base, query("sd15")), base.family.predict(base_of("sd15"), query("sd15")))
    side.save(network, tmp_path / "me")
    with pytest.raises(DeltaError, match="4 pixels to a latent"):
        open_side(tmp_path / "me", base_of("sd15"))
    open_side(tmp_path / "me", base)


def test_controlnet_of_full_size_counts_what_was_published() -> None:
    from diffusers import ControlNetModel

    unet: Any = FAMILIES["sd15"].published()["unet"]
    with torch.device("meta"):
        network = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    assert sum(p.numel() for p in network.parameters()) == 361_279_120


def test_config_says_what_it_is(tmp_path: Path) -> None:
    TABLE["controlnet"].save(trained("controlnet", "sd15"), tmp_path / "me")
    config = json.loads((tmp_path / "me" / "config.json").read_text())
    assert TABLE["controlnet"].recognises(tmp_path / "me") and str(tmp_path) not in json.dumps(config)
