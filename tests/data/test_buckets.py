from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.makers import save
from vgm_peft.data import Crop, bucket_ids, load_control, load_pixels, plan_crops, scan
from vgm_peft.errors import ConfigError, DataError
from vgm_peft.families import size_of

side = st.integers(16, 6000)


@settings(max_examples=150)
@given(st.lists(st.tuples(side, side), max_size=8), st.sampled_from([(64, 32), (512, 64), (1024, 64), (256, 8)]), st.booleans())
def test_no_picture_is_dropped_and_every_crop_lies_inside(
    sizes: list[tuple[int, int]], scale: tuple[int, int], square: bool
) -> None:
    resolution, step = scale
    crops = plan_crops(sizes, resolution, step, square=square)
    assert [crop.original for crop in crops] == sizes
    for crop in crops:
        (wide, high), scaled = crop.target, crop.scaled
        assert wide % step == high % step == 0 and wide * high <= resolution**2 and max(wide, high) <= 4 * min(wide, high)
        assert 0 <= crop.left <= scaled[0] - wide and 0 <= crop.top <= scaled[1] - high
        assert not square or crop.target == (resolution, resolution)
        # Scaled by one factor, to within the rounding to whole pixels.
        factor = max(wide / crop.original[0], high / crop.original[1])
        assert abs(scaled[0] - crop.original[0] * factor) <= 0.5 and abs(scaled[1] - crop.original[1] * factor) <= 0.5
        assert crop.upscaled == (factor > 1) or abs(factor - 1) * max(crop.original) < 1
    assert len(bucket_ids(crops)) == len(crops)


def test_buckets_follow_the_proportions() -> None:
    crops = plan_crops([(512, 512), (3000, 2000), (2000, 3000), (100, 100), (10_000, 500)], 512, 64)
    assert [crop.target for crop in crops] == [(512, 512), (640, 384), (384, 640), (512, 512), (1024, 256)]
    assert bucket_ids(crops) == [1, 2, 0, 1, 3]
    assert [crop.upscaled for crop in crops] == [False, False, False, True, False]
    assert crops[0].lost == 0 and crops[4].lost == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(("resolution", "step", "hint"), [(500, 64, "448"), (16, 32, "32"), (0, 8, "8"), (64, 0, "0")])
def test_impossible_resolutions_are_refused(resolution: int, step: int, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"for example {hint}"):
        plan_crops([(64, 64)], resolution, step)


def test_sdxl_is_told_of_the_crop_also_when_mirrored() -> None:
    crop = Crop((300, 200), (96, 64), 10, 0, (64, 64))
    assert crop.sizes() == (200, 300, 0, 10, 64, 64)
    assert crop.sizes(flip=True) == (200, 300, 0, 22, 64, 64)


def test_pixels_are_in_range_and_flip_mirrors_them(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 90, 70)
    example = scan(tmp_path).examples[0]
    crop = plan_crops([(example.width, example.height)], 64, 16)[0]
    pixels = load_pixels(example, crop)
    assert pixels.shape == (3, crop.target[1], crop.target[0]) and pixels.dtype == torch.float32
    assert -1 <= pixels.min() < -0.5 and 0.5 < pixels.max() <= 1
    assert torch.equal(load_pixels(example, crop, flip=True), pixels.flip(-1))


def test_an_uncropped_picture_keeps_every_value(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", 64, 64)
    example = scan(tmp_path).examples[0]
    pixels = load_pixels(example, plan_crops([(64, 64)], 64, 32)[0])
    assert np.array_equal(((pixels + 1) * 127.5).round().permute(1, 2, 0).numpy(), np.asarray(Image.open(path)))


def test_the_crop_is_of_the_upright_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (64, 256), "black")
    image.paste("white", (0, 0, 64, 128))  # upright, after a quarter turn to the right, the white half is at the right
    image.save(tmp_path / "a.png", exif=exif)
    example = scan(tmp_path).examples[0]
    assert (example.width, example.height) == (256, 64)
    pixels = load_pixels(example, plan_crops([(256, 64)], 64, 32)[0])
    assert pixels.shape == (3, 32, 128)
    assert pixels[..., :60].max() == -1 and pixels[..., 68:].min() == 1


def test_a_control_is_cut_like_its_picture(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 96, 64)
    save(tmp_path / "control" / "a.png", 96, 64)
    example = scan(tmp_path).examples[0]
    crop = plan_crops([(96, 64)], 64, 32, square=True)[0]
    expected = (load_pixels(example, crop) + 1) / 2
    torch.testing.assert_close(load_control(example, crop), expected)
    with pytest.raises(DataError, match="has no control picture"):
        (tmp_path / "control" / "a.png").unlink()
        load_control(scan(tmp_path).examples[0], crop)


def test_a_picture_edited_after_the_scan_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    example = scan(tmp_path).examples[0]
    save(tmp_path / "a.png", seed=1)
    with pytest.raises(DataError, match=r"a\.png has changed"):
        load_pixels(example, plan_crops([(40, 32)], 32, 32)[0])


@pytest.mark.parametrize(("family", "step"), [("sd15", 64), ("sdxl", 32)])
def test_the_step_is_what_the_network_halves(tiny: "object", family: str, step: int) -> None:
    assert size_of(tiny(family)).step == step
