"""One picture file: examined without trust, and decoded to upright 8-bit sRGB.

A file is read once, hashed, and opened only by the decoders named here (pillow by itself knows over forty, some of which
start other programs); its size is checked before the first pixel is decoded, and it is then decoded to its last byte, since
a picture cut in half opens without complaint. What would change the picture's looks silently is either done properly
(EXIF rotation, colour profile, 16 bits) or a fault that the user may allow (transparency, animation).
"""

import hashlib
import io
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from vgm_peft.data.member import Place, size_of
from vgm_peft.errors import DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
"""File names that are taken for pictures, lower case."""
OTHER_PICTURES = frozenset(".gif .tif .tiff .heic .heif .avif .jxl .jp2 .psd .svg .tga .raw .dng .cr2 .nef .ico .ppm".split())
"""Pictures that we do not read and therefore name as such."""
MAX_PIXELS = 80_000_000
"""Width times height; below pillow's own limits, so that pillow never warns about what we accept."""
MAX_BYTES = 256 * 2**20
MIN_SIDE = 16
LOOK = 16
"""Side in pixels of the thumbnail by which pictures are compared."""

_SCALED = 8 * LOOK
"""Pixels a side that are enough for a thumbnail: a JPEG is decoded at down to an eighth of its size while it has as many."""
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_ORIENTATION = 0x0112
_TOO_LARGE = f"has more than {MAX_PIXELS // 10**6} million pixels, which is more than we decode"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Picture:
    """What is known of a readable picture."""

    width: int
    height: int
    """Its size in pixels once upright."""
    digest: str
    """SHA-256 of the file's bytes."""
    look: bytes
    """Its thumbnail, `LOOK` x `LOOK` RGB, by which near duplicates are found."""
    notes: tuple[str, ...] = ()
    """What was done to it and deserves saying."""
    faults: tuple[tuple[str, str], ...] = ()
    """What the user may allow: the kind of fault (see `faults.KINDS`), and what is so."""

    @property
    def transparent(self) -> bool:
        """Whether any of it can be seen through."""
        return any(kind == "transparent" for kind, _ in self.faults)


def examine(path: Place) -> Picture:
    """Read a picture file, decode it to its last byte and describe it.

    Raises `DataError` (its text begins with the file's name).
    """
    raw = read_bytes(path)
    if not raw:
        raise DataError(f"{shown(path.name)} is empty (0 bytes)", fix="copy the picture again, or delete the file")
    try:
        image = _open(raw)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        size = image.size
        # Of a large JPEG only the means of its 8 x 8 blocks are computed; for that, too, every byte of it must be there.
        image.draft(None, (_SCALED, _SCALED))
        image.load()
        notes, faults = _traits(image)
        upright = _upright(image)
        look = _thumbnail(_on_white(_eight_bits(upright)))
    except Image.DecompressionBombError:
        raise DataError(f"{shown(path.name)} {_TOO_LARGE}", fix="save it smaller") from None
    except Exception as error:  # whatever a decoder makes of a hostile file, the file is what is wrong
        raise DataError(
            f"{shown(path.name)} cannot be read as a picture ({_reason(error, raw)})",
            expected="a whole PNG, JPEG, WebP or BMP file",
            fix="copy or convert it again, or take it out of the folder",
        ) from None
    width, height = size if _orientation(image) < 5 else size[::-1]
    return Picture(width, height, hashlib.sha256(raw).hexdigest(), look, notes, faults)


def read_bytes(path: Place) -> bytes:
    """Return the bytes of a file of at most `MAX_BYTES`. Raises `DataError`."""
    try:
        if (size := size_of(path)) > MAX_BYTES:
            raise DataError(
                f"{shown(path.name)} has {size / 2**20:.0f} MiB",
                expected=f"at most {MAX_BYTES // 2**20}",
                fix="save it smaller",
            )
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{shown(path.name)} cannot be opened ({error.strerror})", fix="check the file and its permissions"
        ) from None


def decode(raw: bytes) -> Image.Image:
    """Decode a file's bytes to an upright RGB picture: EXIF turned, alpha laid on white, colour profile brought to sRGB."""
    image = _open(raw)
    image.load()
    return _on_white(_eight_bits(_upright(image)), image.info.get("icc_profile"))


def decode_mask(raw: bytes, alpha: bool) -> Image.Image:
    """Decode a file's bytes to an upright mask, 8-bit grey: its transparency if `alpha` (255 throughout where it has none),
    else how bright it is, with what can be seen through as black.
    """
    image = _open(raw)
    image.load()
    image = _eight_bits(_upright(image))
    if image.mode != "RGBA":
        return Image.new("L", image.size, 255) if alpha else image.convert("L")
    if alpha:
        return image.getchannel("A")
    paper = Image.new("RGBA", image.size, "black")
    return Image.alpha_composite(paper, image).convert("L")


def shown(name: str) -> str:
    """Return a file's name as it may be printed: escaped when it holds line breaks, control characters or broken bytes."""
    return name if name.isprintable() else ascii(name)


def _open(raw: bytes) -> Image.Image:
    return Image.open(io.BytesIO(raw), formats=_FORMATS)


def _traits(image: Image.Image) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """What is noted of a picture, and what is wrong with it."""
    notes: list[str] = []
    faults: list[tuple[str, str]] = []
    if min(image.size) < MIN_SIDE:
        faults.append(("tiny", f"has only {image.width} x {image.height} pixels"))
    # A phone's JPEG may carry a depth or gain map as a second frame (MPO); its first frame is the picture.
    frames = 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))
    if frames > 1:
        faults.append(("animated", f"is an animation of {frames} frames"))
    if image.has_transparency_data and (image.convert("RGBA").getchannel("A").getextrema()[0] != 255):
        faults.append(("transparent", "has transparent parts"))
    if _orientation(image) != 1:
        notes.append("turned upright as its EXIF data say")
    profile = image.info.get("icc_profile")
    if profile and not _is_srgb(profile):
        if _transform(image, profile):
            notes.append("colour profile converted to sRGB")
        else:
            faults.append(("profile", "has a colour profile that is damaged or for other colours"))
    return tuple(notes), tuple(faults)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return the picture with 8 bits a value, and with an alpha channel where any way of transparency is in it."""
    if image.mode.startswith("I;16"):  # pillow's own conversion clips 16 bits instead of scaling them
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("PA", "LA", "La", "RGBa", "P") or "transparency" in image.info:
        return image.convert("RGBA")
    return image


def _on_white(image: Image.Image, profile: bytes | None = None) -> Image.Image:
    """Return a picture of `_eight_bits` as sRGB, what can be seen through on white."""
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    colour = _to_srgb(image.convert("RGB") if alpha is not None else image, profile)
    if alpha is None:
        return colour
    paper = Image.new("RGB", colour.size, "white")
    paper.paste(colour, mask=alpha)
    return paper


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # EXIF is written by anything that has a lens; damage there leaves the pixels as they lie
        return 1
    return value if value in _TURNS else 1


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _is_srgb(profile: bytes) -> bool:
    try:
        return "srgb" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).lower()
    except (ImageCms.PyCMSError, OSError):
        return False


def _thumbnail(image: Image.Image) -> bytes:
    """The mean colours of `LOOK` x `LOOK` equal parts. (Pillow's box filter gives pixels that lie in two parts to one.)"""
    small = np.asarray(image.reduce((max(1, image.width // _SCALED), max(1, image.height // _SCALED))), np.float32)
    height, width = small.shape[:2]
    rows = (_shares(height) @ small.reshape(height, width * 3)).reshape(LOOK, width, 3)
    parts = _shares(width) @ rows
    return np.rint(parts).astype(np.uint8).tobytes()


@cache
def _shares(count: int) -> npt.NDArray[np.float32]:
    """What each of so many pixels in a row weighs in the mean of each of `LOOK` equal parts of it, (LOOK, count)."""
    edges = np.arange(count + 1) * (LOOK / count)
    covered = np.clip(edges[None] - np.arange(LOOK)[:, None], 0.0, 1.0)
    return np.diff(covered, axis=1).astype(np.float32)


def _transform(image: Image.Image, profile: bytes) -> ImageCms.ImageCmsTransform | None:
    """Return what brings the picture's colours to sRGB, or `None` when its profile is damaged or of another colour space."""
    mode = "RGB" if image.mode in ("RGBA", "P", "PA") else image.mode
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    transform = None if not profile or _is_srgb(profile) else _transform(image, profile)
    if transform is None:
        return image if image.mode == "RGB" else image.convert("RGB")  # a copy costs half as much as decoding
    return cast(Image.Image, ImageCms.applyTransform(image, transform))


def _reason(error: Exception, raw: bytes) -> str:
    """Say what the bytes are, when they are known for something else, or else what the decoder said."""
    starts: dict[bytes, str] = {
        b"version https://git-lfs": "it is a Git LFS pointer, not the file itself",
        b"<!DOCTYPE": "it is a web page",
        b"<html": "it is a web page",
        b"<svg": "it is an SVG drawing",
        b"GIF8": "it is a GIF",
        b"II*\0": "it is a TIFF",
        b"MM\0*": "it is a TIFF",
        b"%PDF": "it is a PDF",
        b"%!PS": "it is PostScript",
        b"8BPS": "it is a Photoshop file",
        b"PK\x03\x04": "it is a zip archive",
    }
    known: Any = next((text for start, text in starts.items() if raw.lstrip()[:40].startswith(start)), None)
    if known:
        return known
    if isinstance(error, Image.UnidentifiedImageError):
        return "no picture in it"
    return " ".join(str(error).split())[:100] or type(error).__name__
