"""Control-LoRAs against diffusers' reader and pipelines, the published count, and files as others write them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.contract.ground import base_of
from tests.contract.parity.test_t2i_adapter import CALL, full_size, latents
from tests.contract.test_sides import PIPELINES, control, predict, query, trained
from vgm_peft.beside import Beside
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.families import TABLE as FAMILIES
from vgm_peft.families.latent import tiny_vae
from vgm_peft.family import Base
from vgm_peft.sides import TABLE, open_side
from vgm_peft.sides.control_lora import MARKER, ControlLoraOptions

SIDE = TABLE["control-lora"]


def moved(base: Base, rank: int = 32) -> Any:
    """A network of which every trained tensor has been moved, the zeros and the others."""
    network = SIDE.create(base, ControlLoraOptions(rank=rank))
    generator = torch.Generator().manual_seed(5)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


def layers(network: Any) -> dict[str, Any]:
    return {name: layer for name, layer in network.named_modules() if isinstance(getattr(layer, "down", None), Tensor)}


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")  # diffusers' reader asks peft for names in two ways
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_draws_what_the_stock_pipeline_draws(family: str, tmp_path: Path) -> None:
    import diffusers

    base = base_of(family)
    network = moved(base, rank=6)
    saved = SIDE.save(network, tmp_path / "me")
    stock: Any = diffusers.ControlNetModel.from_unet(base.denoiser)  # pyright: ignore[reportArgumentType]
    stock.load_lora_adapter(str(saved.parent), weight_name=saved.name, prefix=None)
    assert len([m for m in stock.modules() if hasattr(m, "lora_A")]) == len(layers(network)) > 50
    parts = {**base.pipe.components, "controlnet": stock}
    if family == "sd15":
        parts["requires_safety_checker"] = False
    pipe = getattr(diffusers, PIPELINES[family])(**parts)
    pipe.set_progress_bar_config(disable=True)
    call = {**CALL, "height": 64, "width": 64, "latents": latents()}
    theirs = pipe(image=control(1), controlnet_conditioning_scale=0.7, **call).images
    with Beside(base, *open_side(saved, base), 0.7) as beside:
        beside.tell(control(1))
        ours = base.pipe(**call).images  # pyright: ignore
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (base.pipe(**call).images - theirs).abs().max() > 1e-2  # pyright: ignore


def test_one_of_full_size_has_as_many_values_as_the_published() -> None:
    """197.78 million of SDXL at rank 128; some hundred thousand of them are biases, which are not trained here."""
    base = full_size("sdxl")
    with torch.device("meta"):
        network = SIDE.create(base, ControlLoraOptions(rank=128))
    held, learnt = (sum(t.numel() for t in ts) for ts in (network.state_dict().values(), network.parameters()))
    assert (held, learnt) == (197_779_104, 197_288_864)
    assert held - learnt == sum(layer.bias.numel() for layer in layers(network).values() if layer.bias is not None)


def test_the_file_has_the_authors_names_and_shapes(tmp_path: Path) -> None:
    held = load_file(SIDE.save(moved(base_of("sd15"), rank=6), tmp_path / "me"))
    shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
    assert shapes.pop(MARKER) == (0,)
    expected = {
        "time_embed.2.up": (32, 6),
        "input_blocks.0.0.down": (4, 4, 3, 3),  # as many as there are channels
        "input_blocks.3.0.op.up": (8, 6, 1, 1),
        "input_blocks.4.1.transformer_blocks.0.ff.net.0.proj.down": (6, 16),
        "input_blocks.4.0.skip_connection.down": (6, 8, 1, 1),
        "input_hint_block.0.weight": (16, 3, 3, 3),
        "input_hint_block.14.bias": (8,),
        "zero_convs.11.0.weight": (16, 16, 1, 1),
        "middle_block.2.in_layers.0.weight": (16,),
        "middle_block_out.0.bias": (16,),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    whole = {n.split(".")[0] for n in shapes if n.endswith(".weight") and len(shapes[n]) > 1}
    assert whole == {"input_hint_block", "zero_convs", "middle_block_out"}


@torch.no_grad()
def test_files_of_others_are_read(tmp_path: Path) -> None:
    """Factors of convolutions stored flat, as ComfyUI takes them too; biases that were trained; half precision."""
    base = base_of("sd15")
    saved = SIDE.save(trained("control-lora", "sd15"), tmp_path / "me")
    held = load_file(saved)
    flat = {name: t.flatten(1) if name.endswith((".up", ".down")) else t for name, t in held.items()}
    save_file(flat, saved)
    expected = predict(base, SIDE)
    with Beside(base, *open_side(saved, base)) as beside:
        beside.tell(control())
        assert torch.equal(base.family.predict(base, query("sd15")), expected)
    theirs: dict[str, Tensor] = {name: tensor.half() for name, tensor in held.items()}
    theirs["time_embed.0.bias"] += 1.0
    save_file(theirs, saved)
    opened: Any = open_side(saved, base)[1]
    assert torch.equal(opened.time_embedding.linear_1.bias, theirs["time_embed.0.bias"].float())


@torch.no_grad()
def test_it_is_a_change_of_the_base_in_use(tmp_path: Path) -> None:
    """Opened beside another base of the family its copy is of that one, and stays as it was when that one changes."""
    saved = SIDE.save(moved(base_of("sd15")), tmp_path / "me")
    other = Base(FAMILIES["sd15"].tiny(seed=1), FAMILIES["sd15"], "other").freeze()
    opened: Any = open_side(saved, other)[1]
    theirs: Any = other.denoiser.get_submodule("mid_block.resnets.0.conv1")
    assert torch.equal(opened.mid_block.resnets[0].conv1.weight, theirs.weight)
    assert not torch.equal(theirs.weight, base_of("sd15").denoiser.get_submodule("mid_block.resnets.0.conv1").weight)  # pyright: ignore
    before = theirs.weight.clone()
    theirs.weight += 1.0
    assert torch.equal(opened.mid_block.resnets[0].conv1.weight, before)


@torch.no_grad()
def test_it_reads_pictures_at_the_bases_own_factor(tmp_path: Path) -> None:
    pipe: Any = FAMILIES["sd15"].tiny()
    pipe.register_modules(vae=tiny_vae(4))
    pipe.vae_scale_factor = 4
    base = Base(pipe, FAMILIES["sd15"], "four").freeze()
    network = moved(base)
    saved = SIDE.save(network, tmp_path / "me")
    _, opened = open_side(saved, base)
    assert all(torch.equal(v, opened.state_dict()[k]) for k, v in network.state_dict().items())
    with pytest.raises(DeltaError, match=r"input_hint_block.*made for"):
        open_side(saved, base_of("sd15"))


def test_a_rank_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank = 0"):
        ControlLoraOptions(rank=0)
    assert SIDE.facts(moved(base_of("sd15"), rank=3)) == {"rank": 3}
