"""A place of a picture shown by hand in the page, as a dragged box or as strokes of a brush."""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import gradio as gr

from vgm_peft.errors import ConfigError, DataError
from vgm_peft.stack.uses import Box
from vgm_peft.studio.rows import WEB

if TYPE_CHECKING:
    from PIL import Image

Tool = Literal["box", "brush"]
PREFIX = "data:image/png;base64,"
MAX_URL = 2_000_000
"""Characters of a mask; one of 512x512 takes a hundredth."""
MAX_SIDE = 1024


def canvas(*tools: Tool, elem_id: str) -> gr.HTML:
    """A canvas over a picture, with some tools, the first of them chosen.

    Its value is what was shown, for `read_shape`.
    """
    return gr.HTML(
        value=EMPTY,
        html_template=(WEB / "sketch.html").read_text(encoding="utf-8"),
        css_template=(WEB / "sketch.css").read_text(encoding="utf-8"),
        js_on_load=(WEB / "sketch.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id=elem_id,
        scene=scene(*tools),
    )


def scene(*tools: Tool, backdrop: str = "") -> dict[str, Any]:
    """What the page is told of a sketch: its tools, and the URL of the picture; its property `scene`, always as a whole."""
    return {"tools": list(tools), "backdrop": backdrop}


EMPTY: Any = {"box": None, "mask": ""}
"""Nothing shown."""


@dataclass(frozen=True)
class Shape:
    """A place of a picture: a box or a mask, white where it is; neither where nothing was shown."""

    box: Box | None = None
    mask: "Image.Image | None" = None


def painted(mask: "Image.Image") -> dict[str, Any]:
    """The value of a sketch that shows a mask as if it had been painted."""
    import io

    buffer = io.BytesIO()
    mask.convert("L").save(buffer, "PNG")
    return {"box": None, "mask": PREFIX + base64.b64encode(buffer.getvalue()).decode("ascii")}


def read_shape(value: object) -> Shape:
    """Read what a `canvas` says. Raises `ConfigError` or `DataError` for what no sketch can have said."""
    said = cast("Mapping[str, object]", value) if isinstance(value, dict) else {}
    box, mask = said.get("box"), said.get("mask")
    if isinstance(mask, str) and mask:
        return Shape(mask=_decoded(mask))
    if box is None:
        return Shape()
    corners = cast("list[object]", box) if isinstance(box, list) else []
    numbers = [float(corner) for corner in corners if isinstance(corner, (int, float)) and not isinstance(corner, bool)]
    if len(numbers) != 4 or len(corners) != 4:
        raise ConfigError(f"the box {str(box)[:80]}", expected="left, top, right, bottom")
    return Shape(box=(numbers[0], numbers[1], numbers[2], numbers[3]))


def _decoded(url: str) -> "Image.Image":
    import io

    from PIL import Image

    if not url.startswith(PREFIX) or len(url) > MAX_URL:
        raise DataError("the mask that was painted", expected=f"a PNG of at most {MAX_URL:,} characters")
    try:
        with Image.open(io.BytesIO(base64.b64decode(url.removeprefix(PREFIX), validate=True)), formats=("PNG",)) as image:
            if max(image.size) > MAX_SIDE:
                raise DataError(f"the mask: {image.width}x{image.height} pixels", expected=f"at most {MAX_SIDE} a side")
            return image.convert("L").point([0] * 128 + [255] * 128)
    except (binascii.Error, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise DataError("the mask that was painted is not a readable PNG", fix="paint it again") from None
