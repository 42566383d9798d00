"""Pictures that say how they were made, and labelled grids of them.

A PNG written here carries two texts: `parameters`, the lines that most programs of this trade read and show, and
`vgm_peft`, the whole `Stack` as JSON, from which `read_stack` gives the stack back. Neither holds a path of this machine:
files are named by their last part and their SHA-256. What is read back is checked like any stranger's input.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from vgm_peft import __version__
from vgm_peft.errors import ConfigError, DataError, SaveError
from vgm_peft.stack.files import FileKind
from vgm_peft.stack.recipe import SCHEDULERS, Stack

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

KEY = "vgm_peft"
MAX_METADATA = 200_000
"""Characters of JSON; a stack of a hundred deltas needs a tenth of it."""


@dataclass(frozen=True)
class Picture:
    """A drawn picture and the stack that draws exactly it (count 1, its own seed, every digest filled in)."""

    image: "Image.Image"
    stack: Stack

    def save(self, path: Path) -> Path:
        """Write a PNG that carries its stack: aside first, then renamed. Raises `SaveError`; what stood there is unharmed."""
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_text("parameters", parameters(self.stack))
        info.add_text(KEY, json.dumps({"version": __version__, "stack": portable(self.stack).table()}, ensure_ascii=True))
        return write_image(self.image, path, info)


def read_stack(path: Path) -> Stack:
    """Read back the stack that a PNG carries; its file names are plain names, to be found with `stack.library.locate`.

    Raises `DataError` when the file is no PNG of ours, and `ConfigError` when what it carries is unknown, out of range or
    names a file by anything but a plain name.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=("PNG",)) as image:  # opening reads the texts before the pixels and decodes nothing
            text = image.info.get(KEY)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file", fix="check the path") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        why = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise DataError(f"{path.name}: not a readable PNG{why}") from None
    if not isinstance(text, str):
        raise DataError(
            f"{path.name} carries no stack", expected=f'a PNG with a text "{KEY}"', fix="only pictures made here have one"
        )
    if len(text) > MAX_METADATA:
        raise ConfigError(f"{path.name} carries {len(text):,} characters of metadata", expected=f"at most {MAX_METADATA:,}")
    try:
        loaded = json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError(f"{path.name}: its metadata is not JSON") from None
    record = cast("dict[str, object]", loaded) if isinstance(loaded, dict) else {}
    table = record.get("stack")
    if not isinstance(table, dict):
        raise ConfigError(f"{path.name}: its metadata holds no stack")
    stack = Stack.of_table(cast("dict[str, object]", table), f"{path.name}: ")
    return stack.renamed(lambda kind, name, digest: (_plain(name, path.name), digest))


def _plain(name: str, where: str) -> str:
    parts = name.split("/")
    if len(parts) > 2 or any(
        p in ("", ".", "..") or p.startswith("~") or set(p) & set('\\:*?"<>|') or not p.isprintable() for p in parts
    ):
        raise ConfigError(f"{where} names the file {name[:80]!r}", expected="a plain file name without a path")
    return name


def portable(stack: Stack) -> Stack:
    """Return the stack with plain names for paths; files of the same name are told apart by their digest."""
    names: dict[str, str] = {}

    def shorten(kind: FileKind, name: str, digest: str) -> tuple[str, str]:
        if kind != "delta":
            return _last(name), digest
        if name not in names:  # one that stands in the stack twice keeps one name
            short = _short(name)
            taken = short in names.values()
            names[name] = f"{Path(short).stem}-{digest[:8] or len(names)}{Path(short).suffix}" if taken else short
        return names[name], digest

    local = Path(stack.base).is_absolute() or stack.path(stack.base).exists()
    base = _last(stack.base) if local else stack.base
    return replace(stack.renamed(shorten), base=base)


def _last(name: str) -> str:
    return Path(name.replace("\\", "/")).name or "unnamed"


def _short(file: str) -> str:
    """A run's `delta.safetensors` is known by its run; every other file by its own name."""
    path = Path(file.replace("\\", "/"))
    return f"{path.parent.name}/{path.name}" if path.stem == "delta" and path.parent.name else _last(file)


def label(file: str) -> str:
    """What to call a delta file where there is room for one word."""
    path = Path(file.replace("\\", "/"))
    return path.parent.name if path.stem == "delta" and path.parent.name else path.stem


def parameters(stack: Stack) -> str:
    """The picture's description in the lines that A1111, Forge, SD.Next, Civitai and others read."""
    used = [d for d in stack.deltas if d.strength != 0.0]
    prompt = " ".join([stack.prompt, *(f"<lora:{label(d.file)}:{d.strength:g}>" for d in used)]).strip()
    facts = {
        "Steps": str(stack.steps),
        "Sampler": SCHEDULERS[stack.scheduler][1],
        "CFG scale": "" if stack.guidance is None else f"{stack.guidance:g}",
        "Seed": str(stack.seed),
        "Size": f"{stack.width}x{stack.height}" if stack.width and stack.height else "",
        "Model hash": stack.base_digest[:10],
        "Model": label(stack.base),
        "Lora hashes": ", ".join(f"{label(d.file)}: {_short_hash(stack.path(d.file))}" for d in used),
        "Version": f"vgm_peft {__version__}",
    }
    line = ", ".join(f"{k}: {_quoted(v)}" for k, v in facts.items() if v)
    return "\n".join([prompt, *([f"Negative prompt: {stack.negative}"] if stack.negative else []), line])


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:\n"') else value


def _short_hash(path: Path) -> str:
    """The hash by which others know a safetensors file: SHA-256 of what follows the header, twelve digits."""
    try:
        with path.open("rb") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]
    except (OSError, OverflowError, ValueError):
        return "unknown"


def write_image(image: "Image.Image", path: Path, info: object = None) -> Path:
    """Write a PNG aside, with `info` (Pillow's PngInfo) in it, and rename it. Raises `SaveError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                image.save(file, format="PNG", pnginfo=info)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(aside, 0o644)
            os.replace(aside, path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise SaveError(
            f"{path}: cannot be written ({error.strerror or error})", fix="free some space or choose another folder"
        ) from None
    return path


# --- grids


INK, MUTED, PAPER = "#1f2328", "#59636e", "#ffffff"


def grid(
    rows: "Sequence[Sequence[Image.Image | None]]",
    columns: Sequence[str],
    labels: Sequence[str] = (),
    caption: str = "",
) -> "Image.Image":
    """Draw pictures in a labelled table: a label over every column, one beside every row, a caption below.

    Small pictures are enlarged by a whole factor to about 192 pixels; `None` leaves a cell empty. All pictures are drawn
    at the size of the first. Raises `ConfigError` when the rows and labels do not match.
    """
    from PIL import Image, ImageDraw

    pictures = [p for row in rows for p in row if p is not None]
    if not pictures or any(len(row) != len(columns) for row in rows) or labels and len(labels) != len(rows):
        raise ConfigError(
            f"a grid of {[len(r) for r in rows]} pictures with {len(columns)} column and {len(labels)} row labels",
            expected="one label a column and one a row",
        )
    factor = max(1, round(192 / pictures[0].width))
    cell = (pictures[0].width * factor, pictures[0].height * factor)
    gap, margin, left = 10, 28, 150 if any(labels) else 0
    heads = [_wrap(text, cell[0], 15) for text in columns]
    top = max(len(h) for h in heads) * 20 + 12
    width = 2 * margin + left + len(columns) * (cell[0] + gap) - gap
    foot = _wrap(caption, width - 2 * margin, 14) if caption else []
    height = 2 * margin + top + len(rows) * (cell[1] + gap) - gap + (len(foot) * 20 + 16 if foot else 0)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    across = [margin + left + x * (cell[0] + gap) for x in range(len(columns))]
    for x, head in zip(across, heads, strict=True):
        _lines(draw, head, (x + cell[0] / 2, margin + top - 12 - len(head) * 20), 15, INK, "ma")
    for y, row in enumerate(rows):
        above = margin + top + y * (cell[1] + gap)
        if left:
            text = _wrap(labels[y], left - 20, 15)
            _lines(draw, text, (margin, above + cell[1] / 2 - len(text) * 10), 15, INK, "la")
        for x, picture in zip(across, row, strict=True):
            if picture is not None:
                sheet.paste(*_cell(picture, cell, (x, above)))
    _lines(draw, foot, (margin, height - margin - len(foot) * 20 + 4), 14, MUTED, "la")
    return sheet


def _cell(
    picture: "Image.Image", size: tuple[int, int], at: tuple[int, int]
) -> "tuple[Image.Image, tuple[int, int], Image.Image]":
    """Enlarge a picture and round its corners: what to paste, where, through which mask."""
    from PIL import Image, ImageDraw

    large = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    mask = Image.new("L", (size[0] * 4, size[1] * 4), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, size[0] * 4 - 1, size[1] * 4 - 1), radius=32, fill=255)
    return large, at, mask.resize(size, Image.Resampling.BOX)


def _wrap(text: str, width: float, size: int) -> list[str]:
    """Break a text into lines no wider than `width` pixels, at spaces where there are any."""
    from PIL import ImageFont

    font, lines = ImageFont.load_default(size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _lines(
    draw: "ImageDraw.ImageDraw", lines: Sequence[str], at: tuple[float, float], size: int, ink: str, anchor: str
) -> None:
    from PIL import ImageFont

    for i, line in enumerate(lines):
        draw.text((at[0], at[1] + i * 20), line, font=ImageFont.load_default(size), fill=ink, anchor=anchor)
