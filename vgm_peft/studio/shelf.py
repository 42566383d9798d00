"""What the Studio has at hand, by names: deltas and side networks of the library, and pictures. Nothing else is ever opened.

A stack in the Studio names no paths. `placed` gives its names their places and refuses what is not there; `named` goes the
other way, for stacks that come from a picture or from a file.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from vgm_peft.errors import ConfigError, DataError, VgmError, nearest
from vgm_peft.stack.files import FileKind
from vgm_peft.stack.library import Found, find, locate
from vgm_peft.stack.recipe import Stack
from vgm_peft.studio.inputs import keep_picture
from vgm_peft.studio.settings import Settings

STALE = 3.0
"""Seconds for which open pages share one look at the library's folders."""
PICTURE = re.compile(r"[\w. +()@,-]{1,200}\.(?:png|jpe?g|webp|bmp)", re.IGNORECASE)
"""The plain name of a picture."""
WORDS, LONGEST = 8, 60
"""Trained words that are told of one delta, and characters of one."""


@dataclass(frozen=True)
class Network(Found):
    """A side network of the library, and its kind."""

    kind: str


class Shelf:
    """The library and the pictures of a Studio. Safe to call from several threads."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._listed = (float("-inf"), list[Found](), list[Network]())
        self._kinds: dict[Path, tuple[tuple[int, int], str]] = {}

    def deltas(self, fresh: bool = True) -> list[Found]:
        """The deltas of the library; without `fresh` as they were at most `STALE` seconds ago."""
        return self._look(fresh)[0]

    def networks(self, fresh: bool = True) -> list[Network]:
        """The side networks of the library, folders and files of every kind."""
        return self._look(fresh)[1]

    def _look(self, fresh: bool) -> tuple[list[Found], list[Network]]:
        when, deltas, networks = self._listed
        if fresh or time.monotonic() - when > STALE:
            files = find(self.settings.folders)
            kinds = {found.path: self._kind(found.path) for found in files}
            deltas = [found for found in files if not kinds[found.path]]
            single = [Network(found.name, found.path, kinds[found.path]) for found in files if kinds[found.path]]
            networks = [*self._folders(), *single]
            self._listed = time.monotonic(), deltas, networks
        return deltas, networks

    def _folders(self) -> list[Network]:
        """Folders of networks in diffusers' layout that stand alone."""
        found: list[Network] = []
        for folder in self.settings.folders:
            for config in sorted(folder.glob("*/config.json")) + sorted(folder.glob("*/*/config.json")):
                inside = config.resolve().is_relative_to(folder.resolve())
                if inside and not (config.parent.parent / "model_index.json").exists():
                    if kind := self._kind(config.parent, config):
                        found.append(Network(config.parent.relative_to(folder).as_posix(), config.parent, kind))
        return found

    def _kind(self, place: Path, witness: Path | None = None) -> str:
        """The kind of side network that a file or folder is, if it is one; looked at again when it (or `witness`) changes."""
        from vgm_peft.sides import TABLE

        try:
            facts = (witness or place).stat()
            stamp = (facts.st_mtime_ns, facts.st_size)
            known = self._kinds.get(place)
            if known is None or known[0] != stamp:
                kind = next((side.name for side in TABLE.values() if side.recognises(place)), "")
                known = self._kinds[place] = (stamp, kind)
            return known[1]
        except (VgmError, OSError):  # damaged, or just gone: whoever uses it is told what is wrong with it
            return ""

    def words(self, name: str) -> tuple[str, ...]:
        """The words that a delta of the library was trained with, as far as its file says."""
        return trained_words(_by_name(name, self.deltas(fresh=False), "delta"))

    # --- pictures

    def keep(self, picture: Any) -> str:
        """Keep a picture (of Pillow's) to be used in stacks, and return its name."""
        return keep_picture(picture, self.settings.inputs)

    def picture(self, name: str) -> Path:
        """The place of a kept or drawn picture. Raises `DataError` for any other."""
        for folder in (self.settings.inputs, self.settings.pictures):
            path = folder / name
            if PICTURE.fullmatch(name) and path.is_file() and path.resolve().parent == folder.resolve():
                return path.absolute()
        raise DataError(f'no picture "{name[:100]}" here', fix="choose one of the history, or upload it")

    # --- stacks

    def placed(self, stack: Stack) -> Stack:
        """Give the names of a stack their places. Raises `VgmError` for a name that is not here."""

        deltas, networks = self._look(fresh=True)

        def place(kind: FileKind, name: str, digest: str) -> tuple[str, str]:
            if kind == "picture":
                return str(self.picture(name)), digest
            found, what = (deltas, "delta") if kind == "delta" else (networks, "side network")
            return str(_by_name(name, found, what).absolute()), digest

        return stack.renamed(place)

    def named(self, stack: Stack) -> Stack:
        """Find the files of a stack that names them plainly, and name them as they are named here.

        Raises `VgmError` for a file that is not here, or has other bytes.
        """
        from vgm_peft.stack.controls import read_picture

        for kind, name in named_files(stack):
            if kind == "picture" and not PICTURE.fullmatch(name):
                raise ConfigError(f"the picture {name[:80]!r}", expected="a plain name such as me.png")
        folders = (*self.settings.folders, self.settings.inputs, self.settings.pictures)
        deltas, networks = self._look(fresh=True)
        names = {found.path.absolute(): found.name for found in (*deltas, *networks)}

        def name_of(kind: FileKind, place: str, digest: str) -> tuple[str, str]:
            path = Path(place)
            if kind == "picture" and path.parent in (self.settings.inputs.absolute(), self.settings.pictures.absolute()):
                return path.name, ""
            if kind == "picture":
                return self.keep(read_picture(path)), ""
            if path not in names:
                raise DataError(f"{path.name} is not in the library", fix="start the Studio with the --library that holds it")
            return names[path], ""

        return replace(locate(stack, folders).renamed(name_of), base=self.settings.base, base_digest="")


def named_files(stack: Stack) -> list[tuple[FileKind, str]]:
    """What kinds of files a stack names, and by what names."""
    files: list[tuple[FileKind, str]] = []

    def note(kind: FileKind, name: str, digest: str) -> tuple[str, str]:
        files.append((kind, name))
        return name, digest

    stack.renamed(note)
    return files


def trained_words(path: Path) -> tuple[str, ...]:
    """The words that a delta file says it was trained with: its own, its trigger phrase, and the commonest of its tags."""
    from vgm_peft.tools.glance import glance

    try:
        seen = glance(path)
    except (VgmError, OSError):
        return ()
    said = [path.stem if word.startswith("(") else word for word in seen.words]
    said += re.split(r"\s*,\s*", ", ".join(seen.metadata.get(key, "") for key in ("token", "modelspec.trigger_phrase")))
    said += _tags(seen.metadata.get("ss_tag_frequency", ""))
    usable = (word for word in said if word and len(word) <= LONGEST and word.isprintable())
    return tuple(dict.fromkeys(usable))[:WORDS]


def _tags(text: str) -> list[str]:
    """The commonest tags of what kohya's trainer writes: a JSON table of counts for every folder."""
    try:
        folders = cast(object, json.loads(text or "{}"))
    except (ValueError, RecursionError):
        return []
    counts: Counter[str] = Counter()
    for tags in cast("dict[str, object]", folders).values() if isinstance(folders, dict) else ():
        for tag, count in cast("dict[str, object]", tags).items() if isinstance(tags, dict) else ():
            counts[tag.strip()] += count if isinstance(count, int) else 0
    return [tag for tag, _ in counts.most_common(WORDS)]


def _by_name(name: str, found: Sequence[Found], kind: str) -> Path:
    for each in found:
        if each.name == name:
            return each.path
    raise ConfigError(
        f'no {kind} "{name[:100]}" in the library', fix=nearest(name[:100], [f.name for f in found]) if found else ""
    )
