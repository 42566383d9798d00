"""IP-Adapter against diffusers' own, with the very file that ours writes; its counts, its image encoder, and what it meets."""

import logging
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.contract.ground import Gain, base_of, draw, tiny_eye
from tests.contract.test_sides import query
from vgm_peft.attachment import Attachment, Fusion
from vgm_peft.beside import Beside
from vgm_peft.delta import Delta, Patch
from vgm_peft.deltas import TABLE as DELTAS
from vgm_peft.errors import BaseModelError, ConfigError, DeltaError
from vgm_peft.families import TABLE as FAMILIES
from vgm_peft.family import Base
from vgm_peft.sides.image_encoder import Eye, Need, find_eye
from vgm_peft.sides.image_tokens import ImageProjection, Resampler
from vgm_peft.sides.ip_adapter import Adapter, IPAdapter, IPAdapterOptions, cross_attentions
from vgm_peft.stack import Stack
from vgm_peft.stack.uses import ControlUse

SIDE = IPAdapter()
CHOSEN: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("layout", {"down": {"block_2": [0.25, 1.0]}}),
    "sdxl": ("style+layout", {"up": {"block_0": [0.0, 1.0, 0.0]}, "down": {"block_2": [0.0, 1.0]}}),
}
"""A choice of layers, and how diffusers is told of it."""


@lru_cache
@torch.no_grad()
def network(family: str, kind: str = "base") -> Adapter:
    """One that was moved away from where it begins."""
    made = SIDE.create(base_of(family), IPAdapterOptions(network=kind))  # pyright: ignore
    generator = torch.Generator().manual_seed(0)
    for p in made.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return made


def picture(side: int = 32) -> Image.Image:
    pixels = torch.randint(0, 256, (side, side, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def tensor_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("kind", ["base", "plus"])
@torch.no_grad()
def test_draws_what_diffusers_draws_with_the_same_file(base: Base, kind: str, tmp_path: Path) -> None:
    """Guided, three steps: everywhere, in a mask, and in some layers only; diffusers' processors are on a pipe of their own."""
    from diffusers.image_processor import IPAdapterMaskProcessor

    family = base.family.name
    saved = SIDE.save(network(family, kind), tmp_path / "me")
    stock: Any = base.family.tiny()
    stock.register_modules(image_encoder=tiny_eye())
    stock.set_progress_bar_config(disable=True)
    stock.load_ip_adapter(str(tmp_path), subfolder="", weight_name=saved.name)
    call: dict[str, Any] = dict(prompt="a duck", negative_prompt="dark", num_inference_steps=3, output_type="latent")
    call |= dict(height=64, width=64, latents=torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4)))
    marked = Image.new("L", (64, 64))
    marked.paste(255, (0, 0, 30, 50))
    mask = IPAdapterMaskProcessor(vae_scale_factor=8).preprocess([marked], height=64, width=64)[None, :, 0]
    masked = {"cross_attention_kwargs": {"ip_adapter_masks": [mask]}}
    name, layers = CHOSEN[family]
    plain = base.pipe(**call).images  # pyright: ignore
    with Beside(base, SIDE, SIDE.load(saved, base), 0.6) as beside:
        beside.tell(tensor_of(picture()))
        for choice, scale, strength, where in (("", 0.6, 0.6, None), ("", 0.6, 0.6, mask), (name, layers, 1.0, None)):
            stock.set_ip_adapter_scale(scale)
            theirs = stock(ip_adapter_image=picture(), **call, **(masked if where is not None else {})).images
            beside.strength, beside.mask, beside.layers = strength, where, SIDE.layers(base, choice)
            ours = base.pipe(**call).images  # pyright: ignore
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
            assert (plain - theirs).abs().max() > 1e-2


def test_of_full_size_counts_what_was_published() -> None:
    counts = {
        ("sd15", "base"): 22_319_616,
        ("sd15", "plus"): 49_087_488,
        ("sdxl", "base"): 349_188_096,
        ("sdxl", "plus"): 423_748_864,
    }
    for (family, kind), count in counts.items():
        unet = FAMILIES[family].published()["unet"]
        texts = cross_attentions(unet)
        context = next(iter(texts.values())).to_k.weight.shape[1]
        with torch.device("meta"):  # ViT-H: an embedding of 1024, hidden states of 1280
            projection = ImageProjection(1024, context) if kind == "base" else Resampler(1280, context)
            assert sum(p.numel() for p in Adapter(projection, texts).parameters()) == count


def test_files_number_the_layers_with_the_middle_last(base: Base) -> None:
    """`attn_processors` go down, up, middle; a file in another order fits and draws nonsense."""
    made, names = network(base.family.name), list(cross_attentions(base.denoiser))
    assert names[0].startswith("down_blocks") and names[-1].startswith("mid_block")
    assert list(made.ip_adapter) == [str(2 * i + 1) for i in range(len(names))]
    fresh = SIDE.create(base)
    middle: Any = base.denoiser.get_submodule(names[-1])
    assert torch.equal(fresh.state_dict()[f"ip_adapter.{2 * len(names) - 1}.to_v_ip.weight"], middle.to_v.weight)


def test_gradients_are_the_same_with_checkpointing() -> None:
    pipe: Any = FAMILIES["sd15"].tiny()
    pipe.register_modules(image_encoder=tiny_eye())
    base = Base(pipe, FAMILIES["sd15"], "tiny").freeze()
    pipe.unet.train()
    found: list[list[Tensor]] = []
    for checkpointing in (False, True):
        made = SIDE.create(base)
        if checkpointing:
            pipe.unet.enable_gradient_checkpointing()
            assert pipe.unet.is_gradient_checkpointing
        with Beside(base, SIDE, made) as beside:
            beside.tell(tensor_of(picture()))
            base.family.predict(base, query("sd15")).square().mean().backward()
        found.append([p.grad for p in made.parameters() if p.grad is not None])
    assert len(found[0]) == len(list(network("sd15").parameters()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@torch.no_grad()
def test_is_heard_whatever_processor_computes_the_attention(base: Base) -> None:
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    unet: Any = base.denoiser
    with Beside(base, SIDE, network(base.family.name)) as beside:
        beside.tell(tensor_of(picture()))
        usual = base.family.predict(base, query(base.family.name))
        try:
            unet.set_attn_processor(AttnProcessor())
            plain = base.family.predict(base, query(base.family.name))
            unet.set_attention_slice(1)
            sliced = base.family.predict(base, query(base.family.name))
        finally:
            unet.set_attn_processor(AttnProcessor2_0())
    for other in (plain, sliced):
        torch.testing.assert_close(other, usual, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [Gain, DELTAS["ia3"]])
@torch.no_grad()
def test_hears_live_deltas_as_it_hears_fused_ones(base: Base, method: type[Patch]) -> None:
    """On the query and the output projection of every cross-attention, which hooks of both share: acting on what comes out of
    a layer, and on what goes in."""
    family, asked = base.family.name, query(base.family.name)
    sites = [s for s in base.sites if s.module.endswith(("attn2.to_q", "attn2.to_out.0")) and s.op == "linear"]
    delta = Delta.fit(family, method, sites, method.examples[0]).train(False)
    draw(delta)
    found: list[Tensor] = []
    for put_on in (partial(Fusion, base.parts, [(delta, 1.0)]), partial(Attachment, base.parts, delta)):
        with put_on(), Beside(base, SIDE, network(family)) as beside:
            beside.tell(tensor_of(picture()))
            found.append(base.family.predict(base, asked))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


def test_the_image_encoder_is_no_part_of_it(base: Base) -> None:
    made = network(base.family.name)
    assert isinstance(made.eye, Eye) and not any(isinstance(m, type(made.eye.encoder)) for m in made.modules())
    assert {name.split(".")[0] for name, _ in made.named_parameters()} == {"image_proj", "ip_adapter"}
    assert not any(p.requires_grad for p in made.eye.encoder.parameters())


def test_sees_what_transformers_makes_of_a_picture() -> None:
    """The shorter side brought to size, the square in the middle, CLIP's colours; to the rounding of an 8-bit picture."""
    from transformers import CLIPImageProcessorPil

    ramp = Image.linear_gradient("L")
    smooth = Image.merge("RGB", (Image.radial_gradient("L"), ramp, ramp.rotate(90))).resize((90, 60))
    theirs = CLIPImageProcessorPil(size=32, crop_size=32)(smooth, return_tensors="pt").pixel_values
    ours = Eye(tiny_eye().eval(), {}).pixels(tensor_of(smooth))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2 / 255 / 0.26)
    grey = Eye(tiny_eye().eval(), {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}).pixels(torch.ones(1, 3, 32, 32))
    assert torch.equal(grey, torch.full((1, 3, 32, 32), 2.0))


def test_finds_its_image_encoder_by_what_it_needs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blind = Base(FAMILIES["sd15"].tiny(), FAMILIES["sd15"], "tiny").freeze()
    with pytest.raises(BaseModelError, match=r"no image encoder.*task\.encoder"):
        SIDE.create(blind)
    with pytest.raises(BaseModelError, match="no such folder"):
        SIDE.create(blind, IPAdapterOptions(encoder="nowhere at all"))
    tiny_eye().save_pretrained(tmp_path / "eye")
    made = SIDE.create(blind, IPAdapterOptions(encoder=str(tmp_path / "eye")))
    saved = SIDE.save(made, tmp_path / "me")
    with pytest.raises(BaseModelError, match="no image encoder.*an embedding of 20.*image_encoder"):
        SIDE.load(saved, blind)
    (tmp_path / "image_encoder").symlink_to(tmp_path / "eye")
    opened = SIDE.load(saved, blind)
    assert opened.eye is not None and made.eye is not None and opened.eye.need == made.eye.need and not caplog.records
    other = tiny_eye()
    torch.nn.init.ones_(other.visual_projection.weight)
    (tmp_path / "image_encoder").unlink()
    other.save_pretrained(tmp_path / "image_encoder")
    SIDE.load(saved, blind)
    assert [r.levelno for r in caplog.records] == [logging.WARNING] and "another digest" in caplog.text
    with pytest.raises(BaseModelError, match="an embedding of 20.*an embedding of 7"):
        find_eye(blind, need=Need(embeds=7), near=tmp_path)


def test_what_came_from_the_hub_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the id that the file remembers, in what was fetched before; no path of a machine stands in it."""
    place = tmp_path / "models--me--eyes"
    tiny_eye().save_pretrained(place / "snapshots" / "0" / "models" / "eye")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    blind = Base(FAMILIES["sd15"].tiny(), FAMILIES["sd15"], "tiny").freeze()
    made = SIDE.create(blind, IPAdapterOptions(encoder="me/eyes/models/eye"))
    saved = SIDE.save(made, tmp_path / "me")
    opened = SIDE.load(saved, blind)
    assert opened.eye is not None and opened.eye.need.hub == "me/eyes/models/eye"
    assert str(tmp_path).encode() not in saved.read_bytes()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(BaseModelError, match="no image encoder"):
        SIDE.load(saved, blind)


def test_the_bases_folder_may_hold_the_image_encoder(tmp_path: Path) -> None:
    """As diffusers saves it; our own loading leaves it out until an IP-Adapter asks."""
    from vgm_peft.families import load

    pipe = FAMILIES["sd15"].tiny()
    pipe.save_pretrained(tmp_path / "base")
    before = load(str(tmp_path / "base")).digest
    pipe.register_modules(image_encoder=tiny_eye())
    pipe.save_pretrained(tmp_path / "base")
    base = load(str(tmp_path / "base"))
    assert base.pipe.components["image_encoder"] is None and base.digest == before
    assert SIDE.create(base).eye is not None


def test_other_kinds_of_files_are_refused(tmp_path: Path) -> None:
    base, saved = base_of("sd15"), SIDE.save(network("sd15"), tmp_path / "me")
    tensors = load_file(saved)
    for name in ("proj.0.weight", "perceiver_resampler.proj_in.weight", "proj.3.weight", "proj.weight"):
        kept = {k: v for k, v in tensors.items() if not k.startswith("image_proj.proj")}
        save_file({**kept, f"image_proj.{name}": torch.zeros(4)}, saved)
        with pytest.raises(DeltaError, match="FaceID"):
            SIDE.load(saved, base)
    save_file({**tensors, "ip_adapter.1.to_q_lora.down.weight": torch.zeros(4)}, saved)
    with pytest.raises(DeltaError, match="made for"):
        SIDE.load(saved, base)


def test_layers_are_chosen_by_name(base: Base) -> None:
    names = list(cross_attentions(base.denoiser))
    for choice in ("style", "layout"):
        globs = SIDE.layers(base, choice) or {}
        assert all(any(fnmatchcase(name, glob) for name in names) for glob in globs)
    assert SIDE.layers(base, "") is None
    with pytest.raises(ConfigError, match='layers "colour".*style'):
        SIDE.layers(base, "colour")


@torch.no_grad()
def test_a_stack_says_which_layers(base: Base, tmp_path: Path) -> None:
    family, asked = base.family.name, query(base.family.name)
    saved = SIDE.save(network(family), tmp_path / "me")
    picture().save(tmp_path / "me.png")
    found: list[Tensor] = []
    for layers in ("", "style"):
        use = ControlUse(network=str(saved), image=str(tmp_path / "me.png"), layers=layers)
        with Stack(controls=(use,)).on(base) as applied:
            applied.controls.show(64, 64)
            found.append(base.family.predict(base, asked))
    with Beside(base, SIDE, network(family)) as beside:
        beside.tell(tensor_of(picture()))
        assert torch.equal(found[0], base.family.predict(base, asked))
        beside.layers = SIDE.layers(base, "style")
        assert torch.equal(found[1], base.family.predict(base, asked)) and not torch.equal(*found)
