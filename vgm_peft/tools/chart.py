"""One value for every layer, as a picture: how the values spread, and where in the base the large ones are."""

import re
from collections.abc import Mapping, Sequence
from math import floor, log10
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from vgm_peft.errors import ConfigError
from vgm_peft.picture import INK, MUTED, PAPER, write_image

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

WIDE, EDGE, LINE, BARS, SPREAD = 1180, 36, 22, 30, 360
COLOURS = ("#3b6ea8", "#c8792a", "#4c8c5a", "#9a5b9e")
"""Of the parts of a base, in order."""
BLOCK = re.compile(r"((?:down|up)_blocks\.\d+|mid_block|encoder\.layers\.\d+|[a-z]+_blocks\.\d+)")


def save(values: Mapping[str, float], title: str, unit: str, path: Path) -> Path:
    """Draw values by site and write the PNG. Raises `ConfigError` for another ending, `SaveError` when the disk refuses."""
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--output {path}", expected="a name that ends in .png")
    return write_image(draw(values, title, unit), path)


def draw(values: Mapping[str, float], title: str, unit: str) -> "Image.Image":
    """A histogram over the powers of ten on the left, the mean of every block of the base on the right."""
    from PIL import Image, ImageDraw

    blocks: dict[tuple[str, str], list[float]] = {}
    for name, value in values.items():
        blocks.setdefault(_block(name), []).append(value)
    parts = list(dict.fromkeys(part for part, _ in blocks))
    high = 2 * EDGE + 3 * LINE + max(SPREAD, LINE * len(blocks))
    sheet = Image.new("RGB", (WIDE, high), PAPER)
    pen = ImageDraw.Draw(sheet)
    _text(pen, (EDGE, EDGE - 8), title, 17, INK)
    for n, part in enumerate(parts):
        left = EDGE + 150 * n
        pen.rectangle((left, EDGE + LINE, left + 11, EDGE + LINE + 11), fill=_colour(parts, part))
        _text(pen, (left + 17, EDGE + LINE - 2), part, 13, MUTED)
    _spread(pen, values, parts, unit)
    _bars(pen, {block: fmean(found) for block, found in blocks.items()}, parts, unit)
    return sheet


def _spread(pen: "ImageDraw.ImageDraw", values: Mapping[str, float], parts: Sequence[str], unit: str) -> None:
    """Bars stacked by part, of equal width on a logarithmic axis; what is zero is counted in words."""
    left, right, top, foot = EDGE, EDGE + 500, EDGE + 3 * LINE, EDGE + 2 * LINE + SPREAD
    logs = {name: log10(value) for name, value in values.items() if value > 0}
    zero = len(values) - len(logs)
    if logs:
        low, high = min(logs.values()), max(logs.values())
        low, high = (low - 0.5, high + 0.5) if high - low < 0.1 else (low, high)
        step = (high - low) / BARS
        counts = [dict.fromkeys(parts, 0) for _ in range(BARS)]
        for name, value in logs.items():
            counts[min(int((value - low) / step), BARS - 1)][_block(name)[0]] += 1
        most, width = max(sum(c.values()) for c in counts), (right - left) / BARS
        for n, count in enumerate(counts):
            below = foot
            for part in parts:
                height = count[part] / most * (foot - top - LINE)
                if height:
                    pen.rectangle(
                        (left + n * width + 1, below - height, left + (n + 1) * width - 1, below), fill=_colour(parts, part)
                    )
                below -= height
        for n in range(6):
            at = low + n * (high - low) / 5
            _text(pen, (left + n * (right - left) / 5, foot + 6), f"{10**at:.2g}", 12, MUTED, "ma")
        _text(pen, (left, top - 4), f"{most} layers", 12, MUTED)
    pen.line((left, foot, right, foot), fill=MUTED)
    more = f", and {zero} that are zero" if zero else ""
    _text(pen, ((left + right) / 2, foot + 6 + LINE), f"{unit}, {len(logs)} layers{more}", 13, INK, "ma")


def _bars(pen: "ImageDraw.ImageDraw", means: Mapping[tuple[str, str], float], parts: Sequence[str], unit: str) -> None:
    left, right, top = 780, WIDE - EDGE - 70, EDGE + 3 * LINE
    most = max(means.values(), default=0.0) or 1.0
    _text(pen, (left, top - LINE - 4), f"mean by block, {unit}", 13, INK)
    for n, ((part, block), mean) in enumerate(means.items()):
        above = top + n * LINE
        _text(pen, (left - 10, above + 2), block, 13, MUTED, "ra")
        pen.rectangle(
            (left, above + 3, left + max(1.0, mean / most * (right - left)), above + LINE - 4), fill=_colour(parts, part)
        )
        _text(pen, (left + mean / most * (right - left) + 7, above + 2), _short(mean), 12, INK)


def _block(name: str) -> tuple[str, str]:
    """The part of a site, and the block of the base that it is in."""
    part, _, module = name.partition(".")
    match = BLOCK.match(module)
    return part, match[1].replace("encoder.layers", "layer") if match else module.partition(".")[0]


def _colour(parts: Sequence[str], part: str) -> str:
    return COLOURS[parts.index(part) % len(COLOURS)]


def _short(value: float) -> str:
    return f"{value:.3g}" if value == 0 or floor(log10(value)) > -4 else f"{value:.1e}"


def _text(pen: "ImageDraw.ImageDraw", at: tuple[float, float], text: str, size: int, ink: str, anchor: str = "la") -> None:
    from PIL import ImageFont

    pen.text(at, text, font=ImageFont.load_default(size), fill=ink, anchor=anchor)
