"""What each file of an image folder is for, judged by names and texts alone: picture, caption, control picture, or a fault."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from vgm_peft.data import captions, pictures
from vgm_peft.data.captions import METADATA, Row, suggestion
from vgm_peft.data.folder import Listing
from vgm_peft.data.pictures import Picture, shown
from vgm_peft.errors import DataError

CONTROL = "control"
"""A subfolder of this name holds control pictures, each named like the picture that it steers."""
_TABLES = frozenset({".json", ".jsonl", ".csv", ".parquet", ".yaml", ".yml", ".toml"})


class Plan:
    """What each file is for, judged by names and texts alone; faults go to the listing."""

    def __init__(self, listing: Listing, caption: str | None, required: bool) -> None:
        self.listing, self.notes = listing, list[str]()
        names = [name for name in listing.files if _suffix(name) in pictures.SUFFIXES]
        self.pictures = {_key(name): name for name in names}
        self.rows = self._rows()
        self.controls = self._controls(names)
        steering = set(self.controls.values())
        self.examples = [n for n in names if n in self.rows or ("/" not in n and n not in steering)]
        self._used = {*self.examples, *steering, METADATA}
        self._used_folders = {n.partition("/")[0] for n in self._used if "/" in n}
        self.texts = self._texts()
        self._strangers()
        self._complete(caption, required)

    def _fault(self, what: str, fix: str, expected: str = "") -> None:
        self.listing.faults.append(DataError(what, expected=expected, fix=fix))

    def _rows(self) -> dict[str, Row]:
        """Picture -> its row, for the rows whose picture is there."""
        path = self.listing.files.get(METADATA)
        if path is None:
            return {}
        rows, faults, unused = captions.read_metadata(path)
        self.listing.faults += faults
        if unused:
            self.notes.append(f"{METADATA}: columns not used: {', '.join(map(shown, sorted(unused)))}")
        out: dict[str, Row] = {}
        for row in rows:
            name = self._find(row.file_name, row.line)
            control = self._find(row.control, row.line) if row.control else None
            if name in out:
                self._fault(f"{METADATA} lines {out[name].line} and {row.line} are both for {shown(name)}", "keep one of them")
            elif name:
                out[name] = replace(row, file_name=name, control=control)
        return out

    def _find(self, name: str, line: int) -> str | None:
        """Return the picture of a name (in any Unicode form); that there is none is a fault."""
        found = self.pictures.get(_key(name))
        if found is None:
            kind = "is no picture that we read" if name in self.listing.files else "is not in the folder"
            self._fault(f"{METADATA} line {line}: {shown(name)} {kind}", suggestion(name, list(self.pictures.values())))
        return found

    def _controls(self, names: Sequence[str]) -> dict[str, str]:
        """Picture -> its control picture, from rows and from the subfolder of that name."""
        out = {name: row.control for name, row in self.rows.items() if row.control}
        named = set(out.values())
        inside = f"{CONTROL}/"
        waiting = {_stem(n.removeprefix(inside)): n for n in names if n.startswith(inside) and n not in named}
        if not waiting:
            return out
        for name in names:
            if "/" not in name and name not in out and name not in named:
                control = waiting.pop(_stem(name), None)
                if control is None:
                    self._fault(f"{shown(name)} has no control picture", f"add {inside}{shown(name)}")
                else:
                    out[name] = control
        for control in waiting.values():
            self._fault(f"{shown(control)} steers no picture", "name it like the picture it belongs to, or delete it")
        return out

    def _texts(self) -> dict[str, str]:
        """Picture -> its own caption, from files beside it and from rows."""
        owners: dict[str, list[str]] = {}
        for name in self.examples:
            owners.setdefault(_key(name), []).append(name)
            owners.setdefault(_stem(name), []).append(name)
        sources: dict[str, list[tuple[str, str]]] = {}
        for file in (n for n in self.listing.files if _suffix(n) in captions.SUFFIXES):
            owner = self._owner(file, owners)
            if owner is not None:
                try:
                    sources.setdefault(owner, []).append((file, captions.read_caption(self.listing.files[file])))
                except DataError as fault:
                    self.listing.faults.append(fault)
                    sources.setdefault(owner, []).append((file, ""))
        for name, row in self.rows.items():
            if row.text is not None:
                sources.setdefault(name, []).append((f"{METADATA} line {row.line}", row.text))
        for name, given in sources.items():
            if len({text for _, text in given}) > 1:
                places = " and ".join(shown(file) for file, _ in given)
                self._fault(f"{shown(name)} has more than one caption: {places}", "keep one of them")
        return {name: given[0][1] for name, given in sources.items()}

    def _owner(self, file: str, owners: Mapping[str, Sequence[str]]) -> str | None:
        """The picture a caption file belongs to; a caption without one, or with two to choose from, is a fault."""
        found = owners.get(_stem(file), ())
        if len(found) == 1:
            return found[0]
        if found:
            both = " and ".join(map(shown, found))
            fix = f"name it {shown(PurePosixPath(found[0]).name)}{_suffix(file)} to say which"
            self._fault(f"{shown(file)} could be the caption of {both}", fix)
        elif not self._foreign(file):
            near = suggestion(file, self.examples) or "name it like its picture, or delete it"
            self._fault(f"{shown(file)} is a caption without a picture", near)
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
            fix = f"move its pictures up, give it as a folder of its own, or name its pictures in {METADATA}"
            self._fault(f"{shown(top)}/ is a subfolder of {count} files that nothing names", fix)

    def _stranger(self, name: str) -> None:
        suffix = _suffix(name)
        if suffix in pictures.OTHER_PICTURES:
            self._fault(f"{shown(name)} is in a format that is not read", "convert it to PNG, JPEG or WebP")
        elif suffix in _TABLES:
            fix = f'make it {METADATA} in the folder itself, one {{"file_name": ..., "text": ...}} a line, or take it out'
            self._fault(f"{shown(name)} is a table that is not read", fix)
        elif suffix not in pictures.SUFFIXES:
            fix = "take it out of the folder; if it is a caption, name it like its picture with .txt"
            self._fault(f"{shown(name)} is neither a picture nor a caption", fix)
        elif not name.startswith(f"{CONTROL}/"):
            self._fault(f"{shown(name)} lies in a subfolder and {METADATA} does not name it", "name it there, or move it")

    def _complete(self, caption: str | None, required: bool) -> None:
        """Fill in the common caption, or insist that captions are for all pictures or for none."""
        missing = [name for name in self.examples if name not in self.texts]
        own = len(self.examples) - len(missing)
        if caption is not None:
            if own:
                rest = f"the other {len(missing)} get" if missing else "none gets"
                self.notes.append(f'{own} of {len(self.examples)} pictures have captions of their own, {rest} "{caption}"')
        elif missing and (required or own):
            names = ", ".join(map(shown, missing))
            example = PurePosixPath(missing[0]).with_suffix(".txt").name
            self._fault(f"no caption for {names}", f"write one into a text file beside it ({shown(example)} for the first)")
        self.texts |= dict.fromkeys(missing, caption or "")

    def check_controls(self, found: Mapping[str, Picture]) -> None:
        """Insist that a control picture has the proportions of its picture (within 1 %)."""
        for name, control in self.controls.items():
            picture, steer = found.get(name), found.get(control)
            if picture and steer and abs(picture.width * steer.height / (picture.height * steer.width) - 1) > 0.01:
                what = f"{shown(control)} is {steer.width} x {steer.height}, {shown(name)} {picture.width} x {picture.height}"
                self._fault(what, "make the control in the picture's proportions", expected="the same proportions")


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _stem(name: str) -> str:
    return _key(str(PurePosixPath(name).with_suffix("")))


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()
