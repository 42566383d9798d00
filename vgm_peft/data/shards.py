"""Webdataset shards: tar files of pictures, their captions and companions, read where they lie.

Each shard is to the rest of this room a folder of its own: what belongs together has one key (`0001.jpg`, `0001.txt`,
`0001.control.png`) in one shard. Its headers are read once, its members when they are needed. A shard is nobody's friend: only
plain members count, their names are never paths of this machine, and what it says of sizes is held against its own length.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from vgm_peft.data.faults import Faults
from vgm_peft.data.faults import names as listed
from vgm_peft.data.folder import Listing, walk, why_ignored
from vgm_peft.data.member import Member
from vgm_peft.data.pictures import shown

SUFFIX = ".tar"
MAX_MEMBERS = 1_000_000
_BLOCK = 512
_MAX_EXTENDED = 64 * 2**10
"""Bytes of what a header may say of the next one: a long name."""
_FOLDER, _LONG_NAME, _LONG_LINK, _EXTENDED, _GLOBAL = b"5", b"L", b"K", b"x", b"g"
_PLAIN = (b"0", b"\0", b"7")
_STRANGE = {b"1": "a link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a pipe", b"S": "a file with holes"}
_EMPTY = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Kinds that no bytes follow, whatever size they name."""


def listings(folder: Path, faults: Faults) -> list[tuple[str, Listing]]:
    """List a folder's own files, under the empty name, and then the members of each shard in it, under the shard's.

    Raises `DataError` when it is not a folder or cannot be listed; a shard that is broken anywhere is a fault as a whole.
    """
    own = walk(folder, faults)
    out = [("", own)]
    for name, place in [(name, place) for name, place in own.files.items() if name.lower().endswith(SUFFIX)]:
        del own.files[name]
        try:
            out.append((name, index(cast(Path, place), faults.within(shown(name)))))
            own.shards.append(name)
        except (OSError, ValueError) as error:
            what = f"{shown(name)} cannot be read to its end as a tar file ({error})"
            faults.add(what, "copy it again", kind="unreadable", expected="a whole, uncompressed one")
            own.left_out[name] = "cannot be read"
    return out


def index(shard: Path, faults: Faults) -> Listing:
    """List the members of a shard; what is no plain file with a name of its own is a fault.

    Raises `OSError` or `ValueError` where it is broken.
    """
    listing, strange = Listing(faults), dict[str, list[str]]()
    with shard.open("rb") as file:
        for header in _headers(file, shard.stat().st_size):
            name = _inside(header.name)
            if header.kind in _STRANGE:
                strange.setdefault(_STRANGE[header.kind], []).append(shown(header.name))
            elif not name:
                strange.setdefault("not named as a file within it", []).append(shown(header.name))
            elif reason := why_ignored(name):
                listing.ignored[name] = reason
            elif name in listing.files:
                strange.setdefault("there twice", []).append(shown(header.name))
            else:
                listing.files[name] = Member(shard, name, header.offset, header.size)
    for why, names in strange.items():
        what = f"{listed(names, 5)} {'is' if len(names) == 1 else 'are'} {why}"
        faults.add(what, "write the shard anew without", kind="unreadable")
        listing.left_out |= dict.fromkeys(names, why)
    listing.files = dict(sorted(listing.files.items()))
    return listing


@dataclass(frozen=True)
class _Header:
    name: str
    kind: bytes
    offset: int
    size: int


def _headers(file: BinaryIO, end: int) -> Iterator[_Header]:
    """The headers of a tar file in their order, folders left out. Raises `ValueError` where it is broken."""
    told: dict[str, str] = {}
    for count in range(2 * MAX_MEMBERS):
        block = file.read(_BLOCK)
        if not block.strip(b"\0") and (count or len(block) == _BLOCK):
            return
        header = _parse(block, file.tell(), told)
        after = header.offset + (0 if header.kind in _EMPTY else -(-header.size // _BLOCK) * _BLOCK)
        if header.offset + (header.size if header.kind not in _EMPTY else 0) > end:
            raise ValueError(f"it ends within {shown(header.name)}")
        if header.kind in (_LONG_NAME, _EXTENDED):
            if header.size > _MAX_EXTENDED:
                raise ValueError(f"a name of {header.size} bytes")
            raw = file.read(header.size)
            told = {"path": _text(raw)} if header.kind == _LONG_NAME else _extended(raw)
        elif header.kind not in (_LONG_LINK, _GLOBAL):
            told = {}
            if header.kind != _FOLDER:
                yield header
        file.seek(after)
    raise ValueError(f"more than {MAX_MEMBERS:,} members")


def _parse(block: bytes, offset: int, told: dict[str, str]) -> _Header:
    """Read one header; `told` is what an extended one before it says instead."""
    if len(block) < _BLOCK:
        raise ValueError("it ends within a header")
    if _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        raise ValueError("a header whose sum is wrong")
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and (folder := _text(block[345:500])):
        name = f"{folder}/{name}"
    size = int(told["size"]) if told.get("size", "").isdecimal() else _number(block[124:136])
    kind = b"S" if any(key.startswith("GNU.sparse") for key in told) else block[156:157]
    if kind not in (*_PLAIN, *_STRANGE, _FOLDER, _LONG_NAME, _LONG_LINK, _EXTENDED, _GLOBAL):
        raise ValueError(f"a member of kind {kind!r}")
    return _Header(told.get("path", name), kind, offset, size)


def _number(field: bytes) -> int:
    """A number of a header, in octal digits or, for the largest, in bytes."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ")
    if digits.strip(b"01234567"):
        raise ValueError("a header that is none")
    return int(digits or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _extended(raw: bytes) -> dict[str, str]:
    """The records of an extended header, `LENGTH KEY=VALUE` and a line's end each."""
    found: dict[str, str] = {}
    while raw:
        length, blank, _ = raw.partition(b" ")
        count = int(length) if blank and length.isdigit() and len(length) < 8 else 0
        key, equals, value = raw[len(length) + 1 : count - 1].partition(b"=")
        if not equals or count > len(raw):
            raise ValueError("an extended header that is none")
        found[_text(key)] = value.decode("utf-8", "surrogateescape")
        raw = raw[count:]
    return found


def _inside(name: str) -> str:
    """A member's path in one spelling; empty for one that is no text, or would lead out of the shard, were it unpacked."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or any("\ud800" <= c <= "\udfff" for c in name):
        return ""
    return path.as_posix() if path.parts else ""
