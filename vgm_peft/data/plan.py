"""What each file of an image folder is for, judged by names and texts: picture, caption, control, mask, or a fault."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from vgm_peft.data import captions, pictures
from vgm_peft.data.captions import METADATA, Row, suggestion
from vgm_peft.data.companions import CONTROL, INSIDE, MASKS, Companions, bare_names, is_beside, root_of, stem
from vgm_peft.data.faults import names as listed
from vgm_peft.data.folder import Listing
from vgm_peft.data.member import Place
from vgm_peft.data.pictures import Picture, shown
from vgm_peft.errors import DataError

Masks = Literal["off", "files", "alpha"]
"""Where masks come from: nowhere, pictures of their own, or the transparency of the pictures."""
_TABLES = frozenset({".json", ".jsonl", ".csv", ".yaml", ".yml", ".toml"})
_PACKED = {
    ".parquet": "unpack it into picture files with metadata.jsonl (docs/data.md shows how)",
    ".arrow": "unpack it into picture files with metadata.jsonl (docs/data.md shows how)",
    ".gz": "if it is a shard, unpack it to a .tar: gunzip",
    ".tgz": "if it is a shard, unpack it to a .tar: gunzip",
    ".zip": "unpack it here",
}
"""Files that may hold the whole data set and are not read as they are."""
_MASK_ENDS = ("-masklabel", "_mask", "-mask")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder of pictures, and what is asked of it."""

    folder: Path
    caption: str | None = None
    """For pictures that have none of their own; without it captions are for all or for none."""
    require_captions: bool = False
    require_controls: bool = False
    conditions: int = 1
    """How many control pictures lie side by side in one."""
    masks: Masks = "off"
    annotator: str = ""
    """What computes the control pictures; pictures that have some of their own are then a fault."""
    trigger: str = ""
    """A word that every caption begins with, put there where it is not in it."""
    repeats: int = 1


class Plan:
    """What each file of one folder is for; what is wrong goes to the listing's faults."""

    def __init__(self, listing: Listing, source: Source) -> None:
        self.listing, self.source, self.faults = listing, source, listing.faults
        self.notes = list[str]()
        names = [name for name in listing.files if _suffix(name) in pictures.SUFFIXES]
        self.pictures = {_key(name): name for name in names}
        self.rows = self._rows()
        self._taken = {name for row in self.rows.values() for name in (row.control, row.mask) if name}
        own = self._own(names)
        self.controls = self._controls(names, own)
        self.masks = self._masks(names, own)
        beside = {*self.controls.values(), *self.masks.values()}
        self.examples = [name for name in own if name in self.rows or name not in beside]
        self._used = {*self.examples, *beside, METADATA}
        self._used_folders = {n.partition("/")[0] for n in self._used if "/" in n}
        self.parts: dict[str, str] = {METADATA: "metadata"} if METADATA in listing.files else {}
        """File -> what it is, for all that play a part."""
        self.parts |= dict.fromkeys(self.examples, "picture") | dict.fromkeys(self.controls.values(), "control")
        self.parts |= dict.fromkeys(self.masks.values(), "mask")
        self.texts = self._texts()
        self._strangers()

    def _rows(self) -> dict[str, Row]:
        """Picture -> its row, for the rows whose picture is there."""
        path = self.listing.files.get(METADATA)
        if path is None:
            return {}
        rows, faults, unused = captions.read_metadata(path)
        for fault in faults:
            self.faults.take(fault)
        if unused:
            self.notes.append(f"{METADATA}: columns not used: {', '.join(map(shown, sorted(unused)))}")
        out: dict[str, Row] = {}
        for row in rows:
            name = self._find(row.file_name, row.line)
            control = self._find(row.control, row.line) if row.control else None
            mask = self._find(row.mask, row.line) if row.mask else None
            if name in out:
                lines = f"{METADATA} lines {out[name].line} and {row.line}"
                self.faults.add(f"{lines} are both for {shown(name)}", "keep one of them")
            elif name:
                out[name] = replace(row, file_name=name, control=control, mask=mask)
        return out

    def _find(self, name: str, line: int) -> str | None:
        """Return the picture of a name (in any Unicode form); that there is none is a fault."""
        found = self.pictures.get(_key(name))
        if found is None:
            kind = "is no picture that we read" if name in self.listing.files else "is not in the folder"
            fix = suggestion(name, list(self.pictures.values())) or "correct the line, or delete it"
            self.faults.add(f"{METADATA} line {line}: {shown(name)} {kind}", fix, kind="orphan")
        return found

    def _own(self, names: Sequence[str]) -> list[str]:
        """The pictures that are there for themselves: those that rows name, and those in the folder (or its `images/`)."""
        root, stems = root_of(names, bool(self.rows)), bare_names(names)
        here = (n for n in names if n.startswith(root) and "/" not in n.removeprefix(root))
        free = {n for n in here if n not in self._taken and not is_beside(n, stems)}
        return [name for name in names if name in self.rows or name in free]

    def _controls(self, names: Sequence[str], own: Sequence[str]) -> dict[str, str]:
        """Picture -> its control picture; where they are to be computed, that there are any is a fault."""
        named = {n: r.control for n, r in self.rows.items() if r.control}
        out = Companions(CONTROL, names, self._taken, self.faults).match(own, named, self.source.require_controls)
        if (annotator := self.source.annotator) and out:
            what = (
                f"there are control pictures for {listed([shown(name) for name in out], 3)}, and {annotator} is to make others"
            )
            self.faults.add(what, "leave out --annotator, or take them out of the folder")
        elif annotator:
            self.notes.append(f"control pictures are computed from the pictures: {annotator}")
        return out

    def _masks(self, names: Sequence[str], own: Sequence[str]) -> dict[str, str]:
        """Picture -> its mask, where masks are files; masks that would not be used are a fault."""
        named = {n: r.mask for n, r in self.rows.items() if r.mask}
        if self.source.masks == "files":
            return Companions(MASKS, names, self._taken, self.faults).match(own, named, required=True)
        if named:
            what = f'{METADATA} names masks, but data.masks is "{self.source.masks}"'
            self.faults.add(what, '--set data.masks=files, or take the column "mask" out', kind="stray")
        return {}

    def _texts(self) -> dict[str, str]:
        """Picture -> its own caption, from files beside it and from rows."""
        owners: dict[str, list[str]] = {}
        for name in self.examples:
            owners.setdefault(_key(name), []).append(name)
            owners.setdefault(stem(name), []).append(name)
        sources: dict[str, list[tuple[str, str]]] = {}
        for file in (n for n in self.listing.files if _suffix(n) in captions.SUFFIXES):
            owner = self._owner(file, owners)
            if owner is not None:
                self.parts[file] = "caption"
                sources.setdefault(owner, []).append((file, self._read(file)))
        for name, row in self.rows.items():
            if row.text is not None:
                sources.setdefault(name, []).append((f"{METADATA} line {row.line}", row.text))
        for name, given in sources.items():
            for place in (place for place, text in given if not text and place != _BROKEN):
                self.faults.add(f"{shown(place)} is an empty caption", "write a caption, or remove it", kind="caption")
            if len({text for _, text in given}) > 1:
                places = " and ".join(shown(file) for file, _ in given)
                self.faults.add(f"{shown(name)} has more than one caption: {places}", "keep one of them")
        self._told = {name for name, given in sources.items() if not given[0][1]}
        return {name: given[0][1] for name, given in sources.items() if given[0][1]}

    def _read(self, file: str) -> str:
        try:
            return captions.read_caption(self.listing.files[file])
        except DataError as fault:
            self.faults.take(fault)
            return _BROKEN

    def _owner(self, file: str, owners: Mapping[str, Sequence[str]]) -> str | None:
        """The picture a caption file belongs to; a caption without one, or with two to choose from, is a fault."""
        found = owners.get(stem(file), ())
        if len(found) == 1:
            return found[0]
        if found:
            both = " and ".join(map(shown, found))
            fix = f"name it {shown(PurePosixPath(found[0]).name)}{_suffix(file)} to say which"
            self.faults.add(f"{shown(file)} could be the caption of {both}", fix)
        elif not self._foreign(file):
            if _suffix(file) == ".json" and not _holds_caption(self.listing.files[file]):
                self._stranger(file)
            else:
                near = suggestion(file, self.examples) or "name it like its picture, or delete it"
                self.faults.add(f"{shown(file)} is a caption without a picture", near, kind="orphan")
        return None

    def _foreign(self, name: str) -> bool:
        """Say whether a file lies in a subfolder of which nothing is used; such a folder is named once, as a whole."""
        top, slash, _ = name.partition("/")
        return bool(slash) and top not in self._used_folders

    def _strangers(self) -> None:
        """Name the files that are neither pictures nor captions, and the pictures in subfolders that nothing names."""
        folders: dict[str, int] = {}
        for name in self.listing.files:
            if self._foreign(name):
                top = name.partition("/")[0]
                folders[top] = folders.get(top, 0) + 1
            elif name not in self._used and _suffix(name) not in captions.SUFFIXES:
                self._stranger(name)
        for top, count in folders.items():
            what, fix = f"{shown(top)}/ is a subfolder of {count} files that nothing names", _SUBFOLDER
            if top == MASKS:
                what = f'{MASKS}/ holds {count} files, but data.masks is "{self.source.masks}"'
                fix = "--set data.masks=files, or take the folder out"
            self.faults.add(what, fix, kind="stray")

    def _stranger(self, name: str) -> None:
        suffix, what, fix, kind = _suffix(name), "is neither a picture nor a caption", _NEITHER, "stray"
        if suffix in pictures.OTHER_PICTURES:
            what, fix, kind = "is in a format that is not read", "convert it to PNG, JPEG or WebP", "unreadable"
        elif suffix in _PACKED:
            what, fix = "is an archive that is not read", _PACKED[suffix]
        elif suffix in _TABLES:
            what, fix = "is a table that is not read", _TABLE
        elif suffix in pictures.SUFFIXES:
            if name.startswith(INSIDE):
                return  # told as what belongs to no picture
            what, fix = f"lies in a subfolder and {METADATA} does not name it", "name it there, or move it"
        self.faults.add(f"{shown(name)} {what}", fix, kind=kind)

    def complete(self, found: Mapping[str, Picture]) -> None:
        """Fill in the common caption, or insist that captions are for all pictures or for none; put the trigger in front.

        `found` are the pictures that could be read.
        """
        source = self.source
        missing = [n for n in self.examples if n not in self.texts and (n in found or "unreadable" not in self.faults.allow)]
        own = len(self.examples) - len(missing)
        if source.caption is not None:
            if own:
                rest = f"the other {len(missing)} get" if missing else "none gets"
                self.notes.append(
                    f'{own} of {len(self.examples)} pictures have captions of their own, {rest} "{source.caption}"'
                )
        elif missing and (source.require_captions or own):
            untold = [shown(name) for name in missing if name not in self._told]
            if untold:
                example = PurePosixPath(missing[0]).with_suffix(".txt").name
                fix = f"write one into a text file beside it ({shown(example)} for the first)"
                self.faults.add(f"no caption for {listed(untold)}", fix, kind="caption")
        self.texts |= dict.fromkeys(missing, source.caption or "")
        if source.trigger:
            self.texts = {name: captions.triggered(text, source.trigger) for name, text in self.texts.items()}

    def check_looks(self, found: Mapping[str, Picture]) -> None:
        """Insist that controls and masks have the proportions of their pictures (within 1 %), and that no picture is a mask."""
        for what, pairs, count in (("control", self.controls, self.source.conditions), ("mask", self.masks, 1)):
            for name, beside in pairs.items():
                picture, other = found.get(name), found.get(beside)
                if picture and other and abs(picture.width * count * other.height / (picture.height * other.width) - 1) > 0.01:
                    sizes = f"{other.width} x {other.height}, {shown(name)} {picture.width} x {picture.height}"
                    fix = f"make the {what} in the picture's proportions"
                    expected = "the same proportions" if count == 1 else f"{count} of the same proportions side by side"
                    self.faults.add(f"{shown(beside)} is {sizes}", fix, expected=expected)
        stems = {stem(name) for name in self.examples}
        for name in self.examples:
            end = next((end for end in _MASK_ENDS if stem(name).removesuffix(end) in stems - {stem(name)}), None)
            if end:
                fix = f"move it to {MASKS}/ under the picture's name and --set data.masks=files, or give it another name"
                self.faults.add(f"{shown(name)} is named like a mask, but would be trained as a picture", fix)


_BROKEN = "\0"
"""Stands for a caption that could not be read and has been told of."""
_SUBFOLDER = f"move its pictures up, make it a [[concept]] of the recipe, or name its pictures in {METADATA}"
_NEITHER = "take it out of the folder; if it is a caption, name it like its picture with .txt"
_TABLE = f'make it {METADATA} in the folder itself, one {{"file_name": ..., "text": ...}} a line, or take it out'


def _holds_caption(path: Place) -> bool:
    try:
        return bool(captions.read_caption(path))
    except DataError:
        return False


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()
