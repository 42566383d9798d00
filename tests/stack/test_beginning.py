"""Drawing from a picture, whole or within a mask: what plain diffusers draws, and outside of the mask the picture itself."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.stack_makers import SMALL, make_delta
from vgm_peft.cli import main
from vgm_peft.delta import Delta
from vgm_peft.errors import BaseModelError, ConfigError, DataError, DeltaError
from vgm_peft.families import TABLE as FAMILIES
from vgm_peft.families import family_named
from vgm_peft.family import Base
from vgm_peft.picture import read_stack
from vgm_peft.stack import ControlUse, DeltaUse, Progress, Stack, attach, generate
from vgm_peft.stack.beginning import begin
from vgm_peft.stack.controls import read_picture
from vgm_peft.stack.library import locate
from vgm_peft.stack.sampling import draw, scheduler_for

SIZE = (64, 48)
XL = {"sd15": "", "sdxl": "XL"}
FOUR: dict[str, Any] = {**SMALL, "steps": 4, "prompt": "a red toy", "width": SIZE[0], "height": SIZE[1]}


@pytest.fixture(scope="module", params=list(FAMILIES))
def base(request: pytest.FixtureRequest) -> Base:
    family = family_named(request.param)
    return Base(family.tiny(), family, "tiny").freeze()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a picture of another size and shape than what is drawn, and a mask of it."""
    folder = tmp_path_factory.mktemp("pictures")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (101, 97, 3), "uint8")).save(folder / "photo.png")
    mask = Image.new("L", (97, 101))
    mask.paste(255, (20, 30, 70, 65))
    mask.save(folder / "mask.png")
    return folder


def stack(place: Path, **changes: Any) -> Stack:
    settings: dict[str, Any] = {**FOUR, "image": "photo.png", **changes}
    return Stack(**settings).beginning_at(place)


def halves(mask: Image.Image) -> Image.Image:
    """White where it is at least half white, at the size that is drawn."""
    fitted = np.asarray(ImageOps.fit(mask, SIZE, Image.Resampling.LANCZOS))
    return Image.fromarray(np.where(fitted < 128, 0, 255).astype("uint8"))


def plainly(base: Base, task: str, place: Path, strength: float, **more: Any) -> np.ndarray:
    """The stock pipeline of a task, made by its own name of the base's components, at the size that is drawn."""
    import diffusers

    settings = {"add_watermarker": False} if XL[base.family.name] else {"requires_safety_checker": False}
    pipe: Any = getattr(diffusers, f"StableDiffusion{XL[base.family.name]}{task}Pipeline")(**base.pipe.components, **settings)
    pipe.scheduler = scheduler_for(base, "ddim")
    pipe.set_progress_bar_config(disable=True)
    image = ImageOps.fit(Image.open(place / "photo.png"), SIZE, Image.Resampling.LANCZOS)
    call = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np", "strength": strength, "image": image, **more}
    generator = torch.Generator().manual_seed(0)
    return (pipe("a red toy", generator=generator, **call).images[0] * 255).round().astype("uint8")


def drawn(base: Base, stack: Stack, given: dict[str, Delta] | None = None) -> np.ndarray:
    with stack.on(base, given=given, fuse=False) as applied:
        (picture,) = draw(applied, stack)
    return np.asarray(picture.image)


@pytest.mark.parametrize("change", [0.5, 1.0])
def test_from_a_picture_it_is_what_diffusers_draws(base: Base, place: Path, change: float) -> None:
    ours = drawn(base, stack(place, change=change))
    assert np.array_equal(ours, plainly(base, "Img2Img", place, change))
    assert not np.array_equal(ours, drawn(base, Stack(**FOUR)))


def test_deltas_act_on_it_as_they_do_in_diffusers(base: Base, place: Path) -> None:
    delta = make_delta(base)
    ours = drawn(base, stack(place, deltas=(DeltaUse(file="d", strength=0.8),)), {"d": delta})
    with attach(base.pipe, delta, 0.8):
        theirs = plainly(base, "Img2Img", place, 0.75)
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours, drawn(base, stack(place)))


@pytest.mark.parametrize("change", [0.5, 1.0])
def test_within_a_mask_it_is_what_diffusers_draws_and_outside_the_picture(base: Base, place: Path, change: float) -> None:
    image = ImageOps.fit(Image.open(place / "photo.png"), SIZE, Image.Resampling.LANCZOS)
    mask = halves(Image.open(place / "mask.png"))
    white = np.asarray(mask) == 255
    ours = drawn(base, stack(place, change=change, paint="mask.png"))
    theirs = plainly(base, "Inpaint", place, change, mask_image=mask, width=SIZE[0], height=SIZE[1])
    assert 0.1 < white.mean() < 0.5
    assert np.array_equal(ours[white], theirs[white]) and np.array_equal(ours[~white], np.asarray(image)[~white])
    assert not np.array_equal(theirs[~white], np.asarray(image)[~white]) and (ours != np.asarray(image))[white].mean() > 0.9


def test_it_shares_what_the_base_holds_and_leaves_it_alone(base: Base, place: Path) -> None:
    before, scheduler = dict(base.pipe.components), base.pipe.scheduler
    for paint in ("", "mask.png"):
        pipe = begin(base, stack(place, paint=paint), SIZE).pipe
        assert all(getattr(pipe, name) is part for name, part in before.items()) and pipe is not base.pipe
        drawn(base, stack(place, paint=paint))
    assert dict(base.pipe.components) == before and base.pipe.scheduler is scheduler and base.drawer is base.pipe
    assert begin(base, Stack(**FOUR), SIZE).pipe is base.pipe


def test_progress_counts_the_steps_that_are_done(base: Base, place: Path) -> None:
    seen: list[tuple[int, int, float]] = []

    def watch(progress: Progress) -> None:
        assert progress.preview().size == SIZE
        seen.append((progress.step, progress.steps, progress.fraction))

    for paint in ("", "mask.png"):
        seen.clear()
        generate(base, stack(place, change=0.7, paint=paint, count=2), watch)
        assert seen == [(1, 2, 0.25), (2, 2, 0.5), (1, 2, 0.75), (2, 2, 1.0)]
    assert generate(base, stack(place), lambda progress: False) == []


def test_a_side_network_hears_which_steps_are_done(place: Path, tmp_path: Path) -> None:
    """Its span is a part of the steps that are done, and both halves of guidance are told, as in diffusers."""
    import diffusers

    base = Base(family_named("sd15").tiny(), family_named("sd15"), "tiny").freeze()
    torch.manual_seed(0)
    network = diffusers.ControlNetModel.from_unet(base.pipe.unet, conditioning_embedding_out_channels=(4, 4, 4, 4)).eval()
    for p in network.controlnet_mid_block.parameters():
        torch.nn.init.normal_(p, std=0.5)
    network.save_pretrained(tmp_path / "edges")
    pipe: Any = diffusers.StableDiffusionControlNetImg2ImgPipeline(
        **base.pipe.components, controlnet=network, requires_safety_checker=False
    )
    pipe.scheduler = scheduler_for(base, "ddim")
    pipe.set_progress_bar_config(disable=True)
    image = ImageOps.fit(Image.open(place / "photo.png"), SIZE, Image.Resampling.LANCZOS)
    edges = Image.open(place / "photo.png").resize(SIZE, Image.Resampling.LANCZOS)
    told = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np", "width": SIZE[0], "height": SIZE[1]}
    half = {"control_image": edges, "control_guidance_end": 0.5, "controlnet_conditioning_scale": 20.0, "strength": 0.5}
    theirs = pipe("a red toy", image, generator=torch.Generator().manual_seed(0), **told, **half).images[0]
    for end, same in ((0.5, True), (1.0, False)):
        use = ControlUse(network=str(tmp_path / "edges"), image="photo.png", strength=20.0, end=end)
        ours = drawn(base, stack(place, change=0.5, controls=(use,)))
        assert (np.abs(ours / 255 - theirs).max() <= 0.5 / 255 + 1e-4) == same


def test_a_picture_drawn_from_another_remakes_its_bytes(
    base: Base, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = generate(base, stack(place, paint="mask.png", change=0.6))[0].save(tmp_path / "first.png")
    told = read_stack(first)
    assert (told.image, told.paint, told.change) == ("photo.png", "mask.png", 0.6)
    assert len(told.image_digest) == len(told.paint_digest) == 64
    again = generate(base, locate(told, [place]))[0].save(tmp_path / "again.png")
    assert again.read_bytes() == first.read_bytes()
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (97, 101)).save(other / "photo.png")
    with pytest.raises(DeltaError, match=r"photo\.png"):
        locate(told, [other])


def test_from_the_command_line(place: Path, tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("sd15").pipe.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(place)
    argv = ["--base", str(tmp_path / "base"), "--prompt", "a red toy", "--steps", "4", "--size", "64x48"]
    argv += ["--image", "photo.png:0.5", "--paint", "mask.png", "--output", str(tmp_path / "new.png")]
    assert main("generate", argv) == 0
    photo = ImageOps.fit(Image.open("photo.png"), SIZE, Image.Resampling.LANCZOS)
    with Image.open(tmp_path / "new.png") as new:
        assert new.getpixel((0, 0)) == photo.getpixel((0, 0)) and new.tobytes() != photo.tobytes()


# --- what is refused, and what is read how


def bomb(path: Path) -> None:
    """A PNG that says it is 60,000 pixels wide and high."""
    header = b"IHDR" + struct.pack(">2I5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)))


def test_what_cannot_be_begun_from_is_named(place: Path, tmp_path: Path, tiny: Any) -> None:
    base = tiny("sd15")
    Image.new("L", (97, 100), 255).save(tmp_path / "low.png")
    Image.new("L", (97, 101), 127).save(tmp_path / "dark.png")
    (tmp_path / "text.png").write_text("not a picture")
    bomb(tmp_path / "bomb.png")
    photo = str(place / "photo.png")
    for image, paint, message in (
        (photo, "low.png", r"low\.png: a mask of 97x100 pixels; expected 97x101"),
        (photo, "dark.png", r"dark\.png: nothing in it is white"),
        (photo, "text.png", r"text\.png: not a readable picture"),
        ("bomb.png", "", r"bomb\.png"),
        (photo, "bomb.png", r"bomb\.png"),
        (".", "", "not a readable picture"),
        ("none.png", "", r"none\.png: no such picture"),
    ):
        with pytest.raises(DataError, match=message):
            begin(base, stack(tmp_path, image=image, paint=paint), SIZE)
    with pytest.raises(ConfigError, match=r"change = 0\.24 of 4 steps leaves none"):
        stack(place, change=0.24)
    assert (stack(place, change=0.25).done, Stack(steps=3, change=0.01).done) == (1, 3)


def test_a_pipeline_without_such_a_task_is_named(place: Path, tiny: Any) -> None:
    from diffusers import StableDiffusionPipeline

    class Odd(StableDiffusionPipeline):
        pass

    base = tiny("sd15")
    odd = Base(Odd(**base.pipe.components, requires_safety_checker=False), base.family, "odd")
    with pytest.raises(BaseModelError, match="no Inpainting for a Odd"):
        begin(odd, stack(place, paint="mask.png"), SIZE)


def test_pictures_are_read_upright_in_eight_bits_and_on_paper(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(np.array([[0, 257 * 100, 65535]], "uint16")).save(path)
    assert np.asarray(read_picture(path))[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]
    Image.fromarray(np.array([[[9, 9, 9, 0], [9, 9, 9, 255]]], "uint8")).save(path)
    assert np.asarray(read_picture(path))[0].tolist() == [[255] * 3, [9] * 3]
    assert np.asarray(read_picture(path, "black"))[0].tolist() == [[0] * 3, [9] * 3]
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("1", (3, 2), 1).save(path, exif=turned)
    assert (read_picture(path).size, read_picture(path).getpixel((0, 0))) == ((2, 3), (255, 255, 255))
