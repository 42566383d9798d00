"""T2I-Adapters against diffusers' own pipelines, the authors' names of tensors, and the published counts."""

import inspect
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.contract.ground import base_of
from tests.contract.test_sides import control, query, trained
from vgm_peft.beside import Beside
from vgm_peft.errors import DataError, DeltaError
from vgm_peft.families import TABLE as FAMILIES
from vgm_peft.families.latent import tiny_vae
from vgm_peft.family import Base
from vgm_peft.sides import TABLE, open_side
from vgm_peft.sides.t2i_adapter import T2IAdapterOptions

SIDE = TABLE["t2i-adapter"]
STOCK = {"sd15": "StableDiffusionAdapterPipeline", "sdxl": "StableDiffusionXLAdapterPipeline"}
CALL: dict[str, Any] = dict(prompt="a duck", negative_prompt="dark", num_inference_steps=3, output_type="latent")


def latents(height: int = 8, width: int = 8) -> Tensor:
    return torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(4))


@cache
def full_size(family: str) -> Base:
    """A base whose denoiser has the published size, on the meta device."""
    pipe: Any = FAMILIES[family].tiny()
    pipe.register_modules(unet=FAMILIES[family].published()["unet"])
    return Base(pipe, FAMILIES[family], "full size")


def stock_of(base: Base, adapter: Any) -> Any:
    """The stock adapter pipeline on the base's own parts."""
    import diffusers

    kind: Any = getattr(diffusers, STOCK[base.family.name])
    parts = {**base.pipe.components, "adapter": adapter, "requires_safety_checker": False}
    stock = kind(**{name: part for name, part in parts.items() if name in inspect.signature(kind.__init__).parameters})
    stock.set_progress_bar_config(disable=True)
    return stock


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_draws_what_the_stock_pipeline_draws(family: str, tmp_path: Path) -> None:
    from diffusers import T2IAdapter

    base = base_of(family)
    SIDE.save(trained("t2i-adapter", family), tmp_path / "me")
    network: Any = T2IAdapter.from_pretrained(tmp_path / "me", use_safetensors=True)
    call = {**CALL, "height": 64, "width": 64, "latents": latents()}
    theirs = stock_of(base, network)(image=control(1), adapter_conditioning_scale=0.7, **call).images
    with Beside(base, SIDE, network, 0.7) as beside:
        beside.tell(control(1))
        ours = base.pipe(**call).images  # pyright: ignore
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (base.pipe(**call).images - theirs).abs().max() > 1e-2  # pyright: ignore


@torch.no_grad()
def test_two_draw_what_a_stock_multi_adapter_draws() -> None:
    from diffusers import MultiAdapter

    base, pictures, strengths = base_of("sd15"), [control(1), 1 - control(1)], [0.5, 0.8]
    networks = [SIDE.create(base, T2IAdapterOptions(network=kind), seed=3) for kind in ("full", "light")]
    call = {**CALL, "height": 64, "width": 64, "latents": latents()}
    stock = stock_of(base, MultiAdapter(networks))  # pyright: ignore[reportArgumentType]
    theirs = stock(image=pictures, adapter_conditioning_scale=strengths, **call).images
    besides = [Beside(base, SIDE, n, s) for n, s in zip(networks, strengths, strict=True)]
    for beside, picture in zip(besides, pictures, strict=True):
        beside.tell(picture)
    ours = base.pipe(**call).images  # pyright: ignore
    for beside in besides:
        beside.remove()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_beside_a_controlnet_the_u_net_is_told_both(family: str) -> None:
    """The U-Net called with the residuals of both by their names, as a pipeline of both would."""
    base, asked = base_of(family), query(family)
    adapter, other = trained("t2i-adapter", family), trained("controlnet", family)
    unet: Any = base.denoiser
    told: dict[str, Any] = dict(added_cond_kwargs=base.family.extra(base, asked), return_dict=False)
    told["encoder_hidden_states"] = asked.condition.hidden
    down, mid = other(asked.noisy, asked.t, controlnet_cond=control(), **told)
    told["down_intrablock_additional_residuals"] = [0.6 * feature for feature in adapter(control())]
    told |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    expected = unet(asked.noisy, asked.t, **told)[0]
    with Beside(base, SIDE, adapter, 0.6) as first, Beside(base, TABLE["controlnet"], other) as second:
        first.tell(control())
        second.tell(control())
        found = base.family.predict(base, asked)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_features_are_computed_once_for_a_picture() -> None:
    base, network, calls = base_of("sd15"), trained("t2i-adapter", "sd15"), list[int]()
    hook = network.register_forward_pre_hook(lambda *_: calls.append(1))  # pyright: ignore
    with Beside(base, SIDE, network) as beside:
        beside.tell(control(1))
        base.pipe(**CALL, height=64, width=64, latents=latents())  # pyright: ignore
    hook.remove()
    assert len(calls) == 1


@pytest.mark.parametrize(("family", "side"), [("sd15", 72), ("sdxl", 80)])
@torch.no_grad()
def test_a_picture_need_only_be_a_multiple_of_the_first_factor(family: str, side: int) -> None:
    """Of 64 or 32 pixels as older versions asked, it need not; what does not fit is refused before the network fails."""
    base, network = base_of(family), trained("t2i-adapter", family)
    pictures = control(1, side)
    call = {**CALL, "height": side, "width": side, "latents": latents(side // 8, side // 8)}
    plain = base.pipe(**call).images  # pyright: ignore
    with Beside(base, SIDE, network) as beside:
        beside.tell(pictures)
        assert (base.pipe(**call).images - plain).abs().max() > 1e-2  # pyright: ignore
        with pytest.raises(DataError, match=f"{side}x{side - 4} pixels; expected sides that are multiples of"):
            beside.tell(pictures[:, :, 4:])


@torch.no_grad()
def test_one_channel_is_the_mean_of_the_colours() -> None:
    base = base_of("sd15")
    network = SIDE.create(base, T2IAdapterOptions(channels=1))
    pictures, grey = control(), control().mean(1, keepdim=True)
    for found, expected in zip(SIDE.read(base, network, pictures), network(grey), strict=True):
        assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("network", ["full", "light"])
def test_it_fits_a_base_of_four_pixels_to_a_latent(network: str, tmp_path: Path) -> None:
    """As Toybox has them; it is refused where there are eight."""
    pipe: Any = FAMILIES["sd15"].tiny()
    pipe.register_modules(vae=tiny_vae(4))
    pipe.vae_scale_factor = 4
    base = Base(pipe, FAMILIES["sd15"], "four").freeze()
    adapter = SIDE.create(base, SIDE.Options(network=network))
    with Beside(base, SIDE, adapter) as beside:
        beside.tell(control(side=32))
        found = base.family.predict(base, query("sd15"))
        assert not torch.equal(found, base_of("sd15").family.predict(base_of("sd15"), query("sd15")))
    SIDE.save(adapter, tmp_path / "me")
    open_side(tmp_path / "me", base)
    with pytest.raises(DeltaError, match="made for 8 channels at 4 pixels.*expected 8 channels at 8 pixels"):
        open_side(tmp_path / "me", base_of("sd15"))


def test_a_light_one_is_refused_where_none_fits() -> None:
    with pytest.raises(DeltaError, match="no light t2i-adapter fits.*task.network=full"):
        SIDE.create(base_of("sdxl"), T2IAdapterOptions(network="light"))


@pytest.mark.parametrize(
    ("family", "options", "count"),
    [
        ("sd15", T2IAdapterOptions(), 77_369_280),
        ("sd15", T2IAdapterOptions(channels=1), 77_000_640),
        ("sd15", T2IAdapterOptions(network="light"), 18_689_200),
        ("sdxl", T2IAdapterOptions(), 79_028_160),
        ("sdxl", T2IAdapterOptions(channels=1), 77_553_600),
    ],
)
def test_full_size_counts_are_the_published_ones(family: str, options: T2IAdapterOptions, count: int) -> None:
    base = full_size(family)
    with torch.device("meta"):
        network = SIDE.create(base, options)
    assert sum(p.numel() for p in network.parameters()) == count


def original(name: str, light: bool) -> str:
    """The authors' name of a tensor by diffusers': blocks of stages numbered through, two to a stage."""
    name = name.removeprefix("adapter.")
    parts = name.split(".")
    if light or parts[0] == "conv_in":
        return name.replace(".resnets.", ".body.")
    block = int(parts[3]) if parts[2] == "resnets" else 0
    return ".".join(["body", str(2 * int(parts[1]) + block), *parts[-2:]])


@pytest.mark.parametrize(
    ("family", "options"),
    [("sd15", {}), ("sd15", {"channels": 1}), ("sd15", {"network": "light"}), ("sdxl", {})],
)
@pytest.mark.parametrize("wrapped", ["", "adapter."])
def test_single_files_in_the_authors_names_are_read(family: str, options: dict[str, Any], wrapped: str, tmp_path: Path) -> None:
    base, light = base_of(family), options.get("network") == "light"
    network = SIDE.create(base, SIDE.Options(**options))
    tensors = {wrapped + original(name, light): t for name, t in network.state_dict().items()}
    save_file(tensors, tmp_path / "theirs.safetensors")
    side, opened = open_side(tmp_path / "theirs.safetensors", base)
    assert side is SIDE and opened.state_dict().keys() == network.state_dict().keys()
    assert all(torch.equal(t, opened.state_dict()[name]) for name, t in network.state_dict().items())


def test_single_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base = base_of("sd15")
    SIDE.save(trained("t2i-adapter", "sd15"), tmp_path / "me")
    tensors = load_file(tmp_path / "me" / "diffusion_pytorch_model.safetensors")
    path = tmp_path / "one.safetensors"
    save_file(tensors, path)
    assert open_side(path, base)[0] is SIDE
    for changed in ({"adapter.more": torch.zeros(1)}, {"adapter.conv_in.bias": torch.zeros(9)}):
        save_file({**tensors, **changed}, path)
        with pytest.raises(DeltaError, match=f"1 tensors are missing, left over.*{next(iter(changed))}"):
            open_side(path, base)
    with pytest.raises(DeltaError, match="made for tiny \\(sdxl\\)"):
        save_file(tensors, path)
        open_side(path, base_of("sdxl"))
