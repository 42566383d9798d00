import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.data.makers import encoded, pixels, save, swapped_profile
from vgm_peft.data.pictures import decode, examine
from vgm_peft.errors import DataError


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_sound_pictures_are_described(tmp_path: Path, format: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(format))
    picture = examine(path)
    assert (picture.width, picture.height, picture.notes) == (40, 32, ())
    assert decode(path.read_bytes()).size == (40, 32)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("keep", [0, 1, 10, 0.5, 0.9])
def test_a_cut_picture_is_named(tmp_path: Path, format: str, keep: float) -> None:
    raw = encoded(format)
    path = tmp_path / "cut.png"
    path.write_bytes(raw[: int(len(raw) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(DataError, match=r"^cut\.png (is empty|cannot be read)"):
        examine(path)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>not found</html>", "web page"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage", "PostScript"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"just text", "no picture in it"),
        (bytes(1000), "no picture in it"),
    ],
)
def test_what_is_no_picture_is_called_by_its_name(tmp_path: Path, raw: bytes, said: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=said):
        examine(path)


@pytest.mark.parametrize("format", ["GIF", "TIFF", "PPM"])
def test_other_formats_under_a_false_name_are_refused(tmp_path: Path, format: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(format))
    with pytest.raises(DataError, match="cannot be read as a picture"):
        examine(path)


@pytest.mark.parametrize("side", [9_000, 13_000, 30_000])
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    import tracemalloc
    import warnings

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    rows = zlib.compress(bytes(1_000_000), 9)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    tracemalloc.start()
    with warnings.catch_warnings(), pytest.raises(DataError, match="more than 80 million pixels"):
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        examine(path)
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()


def test_tiny_and_moving_pictures_are_told(tmp_path: Path) -> None:
    assert examine(save(tmp_path / "a.png", 40, 15)).faults == (("tiny", "has only 40 x 15 pixels"),)
    for name in ("b.png", "b.webp"):
        path = save(tmp_path / name, save_all=True, append_images=[pixels(seed=1), pixels(seed=2)])
        assert examine(path).faults == (("animated", "is an animation of 3 frames"),)
        still = np.asarray(decode(path.read_bytes())).astype(int)  # its first frame
        assert np.abs(still - np.asarray(pixels())).mean() < np.abs(still - np.asarray(pixels(seed=1))).mean()


def test_a_phones_jpeg_with_a_second_frame_is_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "phone.jpg"
    pixels(64, 48).save(path, "MPO", save_all=True, append_images=[pixels(seed=1)])
    assert (examine(path).width, examine(path).height) == (64, 48)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = pixels(40, 32)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that leaves `upright` when the turn is applied
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    stored.save(path, exif=exif)
    picture = examine(path)
    assert (picture.width, picture.height) == (40, 32)
    assert bool(picture.notes) == (orientation != 1)
    assert np.array_equal(np.asarray(decode(path.read_bytes())), np.asarray(upright))


def test_alpha_is_laid_on_white() -> None:
    for mode in ("RGBA", "LA", "P"):
        image = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
        image.paste((0, 0, 0, 255), (0, 0, 10, 20))
        out = io.BytesIO()
        (image.quantize() if mode == "P" else image.convert(mode)).save(out, "PNG")
        colours = np.asarray(decode(out.getvalue()))
        assert (colours[:, :10] == 0).all() and (colours[:, 10:] == 255).all(), mode


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    out = io.BytesIO()
    Image.fromarray(ramp).save(out, "PNG")
    grey = np.asarray(decode(out.getvalue()))[..., 0]
    assert np.array_equal(grey, (ramp >> 8).astype(np.uint8))


def test_an_embedded_profile_is_converted_and_a_broken_one_noted(tmp_path: Path) -> None:
    plain, other = save(tmp_path / "plain.png"), save(tmp_path / "other.png", icc_profile=swapped_profile())
    assert examine(other).notes == ("colour profile converted to sRGB",)
    colours, swapped = (np.asarray(decode(p.read_bytes())).astype(int) for p in (plain, other))
    assert np.abs(colours[..., [1, 0, 2]] - swapped).mean() < 4 < 40 < np.abs(colours - swapped).mean()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    same = save(tmp_path / "same.png", icc_profile=srgb)
    assert examine(same).notes == ()
    assert np.array_equal(np.asarray(decode(plain.read_bytes())), np.asarray(decode(same.read_bytes())))
    broken = save(tmp_path / "broken.png", icc_profile=b"not a profile")
    assert examine(broken).faults == (("profile", "has a colour profile that is damaged or for other colours"),)
    assert np.array_equal(np.asarray(decode(plain.read_bytes())), np.asarray(decode(broken.read_bytes())))


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    pixels().convert("CMYK").save(path)
    assert examine(path).width == 40
    assert decode(path.read_bytes()).mode == "RGB"


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_never_crash(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    raw = bytearray(encoded(["PNG", "JPEG", "WEBP", "BMP"][seed % 4]))
    for place in random.integers(0, len(raw), 8):
        raw[place] = random.integers(0, 256)
    path = tmp_path / "hurt.png"
    path.write_bytes(bytes(raw))
    try:
        examine(path)
    except DataError as error:
        assert str(error).startswith("hurt.png ")
    else:
        decode(bytes(raw))  # what was found sound can be loaded


def photograph(progressive: bool, orientation: int = 1) -> bytes:
    """A JPEG large enough to be read at an eighth of its size."""
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    pixels(20, 17, seed=3).resize((640, 536), Image.Resampling.BICUBIC).save(out, "JPEG", progressive=progressive, exif=exif)
    return out.getvalue()


def seems_sound(path: Path) -> bool:
    try:
        examine(path)
    except DataError:
        return False
    return True


def decodes(raw: bytes) -> bool:
    try:
        decode(raw)
    except Exception:  # whatever a decoder makes of damaged bytes
        return False
    return True


@pytest.mark.parametrize("progressive", [False, True])
def test_a_large_jpeg_read_at_an_eighth_is_judged_as_if_read_in_full(tmp_path: Path, progressive: bool) -> None:
    raw, path, random = photograph(progressive), tmp_path / "a.jpg", np.random.default_rng(0)
    cut = [raw[: int(len(raw) * share)] for share in (0.02, 0.3, 0.6, 0.9, 0.99)]
    hurt = [bytearray(raw) for _ in range(30)]
    for number, copy in enumerate(hurt):
        for place in random.integers(0, 700 if number % 2 else len(raw), 4):  # among the tables, or anywhere
            copy[place] = random.integers(0, 256)
    verdicts: list[bool] = []
    for damaged in (raw, *cut, *map(bytes, hurt)):
        path.write_bytes(damaged)
        verdicts.append(seems_sound(path))
        assert verdicts[-1] == decodes(damaged)
    assert verdicts[:6] == [True] + [False] * 5 and len(set(verdicts[6:])) == 2


def test_a_large_jpeg_read_at_an_eighth_has_its_size_and_its_look(tmp_path: Path) -> None:
    path, still = tmp_path / "a.jpg", tmp_path / "a.png"
    for orientation, size in ((1, (640, 536)), (3, (640, 536)), (6, (536, 640)), (8, (536, 640))):
        path.write_bytes(photograph(False, orientation))
        decode(path.read_bytes()).save(still)
        small, whole = examine(path), examine(still)
        assert (small.width, small.height) == (whole.width, whole.height) == size
        apart = np.abs(np.frombuffer(small.look, np.uint8).astype(int) - np.frombuffer(whole.look, np.uint8))
        assert apart.mean() < 1 and apart.max() <= 4
