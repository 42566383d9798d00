"""Captions: the text that belongs to a picture, from a file beside it or from a row of `metadata.jsonl`.

A caption file is named after its picture, `a.txt`, `a.caption` or `a.json` for `a.png`; `a.png.txt` is understood too and
settles which of `a.png` and `a.jpg` is meant. A `.json` holds the text alone or as the value of `text`, `caption` or
`prompt`. Rows of `metadata.jsonl` are those of Hugging Face image folders: `file_name`, `text`, and optionally `control`
(or `conditioning_image`), a picture that steers, `mask`, a picture that is white where it counts, and `repeats`.
"""

import json
import random
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import cast

from vgm_peft.data.member import Place, size_of
from vgm_peft.data.pictures import shown
from vgm_peft.errors import DataError, nearest

SUFFIXES = frozenset({".txt", ".caption", ".json"})
METADATA = "metadata.jsonl"
MAX_CHARACTERS = 10_000

_CONTROL = ("control", "conditioning_image", "control_file_name", "conditioning_image_file_name")
_KNOWN = ("file_name", "text", "mask", "repeats", *_CONTROL)
_TEXT = ("text", "caption", "prompt")
_MAX_REPEATS = 10_000
# Overrides that make a text read otherwise than it is written (CVE-2021-42574).
_BIDI = frozenset(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))


@dataclass(frozen=True)
class Row:
    """One line of `metadata.jsonl`: paths are relative to the folder, with forward slashes."""

    line: int
    file_name: str
    text: str | None
    control: str | None
    mask: str | None
    repeats: int


def read_caption(path: Place) -> str:
    """Return the caption in a file, its lines joined by blanks: empty where it holds none.

    Raises `DataError` (its text begins with the file's name).
    """
    name = shown(path.name)
    try:
        if size_of(path) > 4 * MAX_CHARACTERS:
            raise DataError(f"{name} is too long", expected=f"a caption of at most {MAX_CHARACTERS} characters")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text (byte {error.start})", fix="save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{name} cannot be opened ({error.strerror})", fix="check the file and its permissions") from None
    return clean(_of_json(text, name) if path.suffix.lower() == ".json" else text, name)


def _of_json(text: str, where: str) -> str:
    """Return the caption in a `.json` file."""
    expected = '{"text": "..."}'
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error})", expected=expected) from None
    if isinstance(value, dict):
        table = cast(Mapping[str, object], value)
        given = [key for key in _TEXT if key in table]
        if len(given) != 1:
            what = f"names {' and '.join(given)}" if given else f"has none of {', '.join(_TEXT)}"
            raise DataError(f"{where} {what}", expected=expected)
        value = table[given[0]]
    if not isinstance(value, str):
        raise DataError(f"{where} holds no text", expected=expected)
    return value


def clean(text: str, where: str) -> str:
    """Return a caption on one line, with nothing hidden in it; `where` begins the text of the `DataError` otherwise."""
    caption = " ".join(line.strip() for line in text.splitlines() if line.strip())
    bad = next((c for c in caption if c in _BIDI or unicodedata.category(c) == "Cc" and c != "\t"), None)
    if bad is not None:
        raise DataError(f"{where} holds the invisible character U+{ord(bad):04X}", fix="remove it from the caption")
    if len(caption) > MAX_CHARACTERS:
        raise DataError(f"{where} is too long", expected=f"a caption of at most {MAX_CHARACTERS} characters")
    return caption


def read_metadata(path: Place) -> tuple[list[Row], list[DataError], set[str]]:
    """Read `metadata.jsonl`: its good rows, what is wrong with the others, and the columns that mean nothing to us."""
    rows: list[Row] = []
    faults: list[DataError] = []
    unused: set[str] = set()
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        return (
            [],
            [DataError(f"{path.name} cannot be read ({error})", fix="save it as UTF-8 text, one JSON object a line")],
            set(),
        )
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            table = _table(line, f"{path.name} line {number}")
            rows.append(_row(table, number, f"{path.name} line {number}"))
            unused |= table.keys() - set(_KNOWN)
        except DataError as fault:
            faults.append(fault)
    return rows, faults, unused


def _table(line: str, where: str) -> Mapping[str, object]:
    try:
        table: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where} is not JSON ({error})", expected='one object a line, {"file_name": "a.png", "text": "..."}'
        ) from None
    if not isinstance(table, dict):
        raise DataError(f"{where} is not an object", expected='{"file_name": "a.png", "text": "..."}')
    return cast(Mapping[str, object], table)


def _row(table: Mapping[str, object], number: int, where: str) -> Row:
    name = _path(table, "file_name", where)
    if name is None:
        raise DataError(f'{where} has no "file_name"', expected='{"file_name": "a.png", "text": "..."}')
    text = table.get("text")
    if text is not None and not isinstance(text, str):
        raise DataError(f'{where}: "text" is {json.dumps(text)}', expected="a text")
    if text is None:
        # A caption under a name that we do not read would be lost without a word.
        near = [key for key in table if key.lower() in ("caption", "captions", "prompt", "texts", "description")]
        if near:
            raise DataError(f'{where} has "{near[0]}" but no "text"', fix=f'rename the key "{near[0]}" to "text"')
    given = [key for key in _CONTROL if table.get(key) is not None]
    if len(given) > 1:
        raise DataError(f"{where} names two controls: {given[0]} and {given[1]}", fix="keep one of them")
    repeats = table.get("repeats", 1)
    if type(repeats) is not int or not 1 <= repeats <= _MAX_REPEATS:
        raise DataError(f'{where}: "repeats" is {json.dumps(repeats)}', expected=f"a whole number, 1 to {_MAX_REPEATS}")
    caption = None if text is None else clean(text, f'{where}, "text"')
    control = _path(table, given[0], where) if given else None
    return Row(number, name, caption, control, _path(table, "mask", where), repeats)


def _path(table: Mapping[str, object], key: str, where: str) -> str | None:
    value = table.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise DataError(f'{where}: "{key}" is {json.dumps(value)}', expected="a file name")
    path = PurePosixPath(value.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise DataError(f'{where}: "{key}" is {json.dumps(value)}', expected="a file inside the image folder")
    return path.as_posix()


def names_word(caption: str, word: str) -> bool:
    """Say whether a word stands in a caption, by itself."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption) is not None


def triggered(caption: str, trigger: str) -> str:
    """Return a caption that begins with the trigger word, unless that stands in it somewhere."""
    if names_word(caption, trigger):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def orders(caption: str, count: int, kept: int) -> tuple[str, ...]:
    """Return a caption with its tags (what stands between commas) in up to `count` orders, as written first.

    The first `kept` tags stay where they are. The orders depend on the caption alone, so the cache can keep them all.
    """
    tags = [tag.strip() for tag in caption.split(",")]
    head, tail = tags[:kept], tags[kept:]
    out = [caption]
    for number in range(1, count):
        mixed = list(tail)
        random.Random(f"{caption}/{number}").shuffle(mixed)
        out.append(", ".join((*head, *mixed)))
    return tuple(dict.fromkeys(out))


def suggestion(name: str, known: list[str]) -> str:
    """Return the near-name hint for a file that is not there, or nothing when no name is near."""
    hint = nearest(name, known)
    return hint if hint.startswith("did you mean") else ""
