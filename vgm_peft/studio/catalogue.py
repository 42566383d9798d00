"""The library as it is listed: what every file in it is, from its header alone, and what it looks like.

Nothing is read twice while it stays as it is, and one look at the folders never takes long: what there was no time for comes
with the next look. Pickles are no deltas here and never opened; a file that is damaged is listed with what is wrong with it.
"""

import hashlib
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vgm_peft.errors import VgmError
from vgm_peft.header import open_header
from vgm_peft.studio.inputs import small_url
from vgm_peft.studio.shelf import trained_words

if TYPE_CHECKING:
    from vgm_peft.studio.engine import Engine
    from vgm_peft.tools.glance import Glance

AT_ONCE = 1.5
"""Seconds that one look may take before it leaves the rest to the next."""
REMEMBERED = 4_000
"""Files of which is known what they are."""
SIDE = 160
"""Pixels of a thumbnail."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".preview.png")
"""How a picture beside a file ends that shows what it is."""
Fits = Literal["yes", "no", "unknown"]


@dataclass(frozen=True)
class Entry:
    """One file or folder of the library."""

    name: str
    path: Path
    what: Literal["delta", "words", "network", "damaged", "unread"] = "unread"
    kinds: str = ""
    """How it changes a base: `LoRA`, `lora + norm`."""
    tool: str = ""
    family: str = ""
    rank: str = ""
    words: tuple[str, ...] = ()
    size: int = 0
    fits: Fits = "unknown"
    why: str = ""
    """Why it does not fit, or what is wrong with it."""
    thumbnail: str = ""
    """A data URL; empty where there is no picture."""

    def told(self) -> dict[str, str | int | list[str]]:
        """For programs: all but places and pictures."""
        plain = {"name": self.name, "what": self.what, "kinds": self.kinds, "tool": self.tool, "family": self.family}
        return {**plain, "rank": self.rank, "words": list(self.words), "size": self.size, "fits": self.fits, "why": self.why}

    def says(self, text: str) -> bool:
        """Whether every word of a search is somewhere in what is known of it."""
        all_of = " ".join((self.name, self.what, self.kinds, self.tool, self.family, *self.words)).casefold()
        return all(word in all_of for word in text.casefold().split())


@dataclass(frozen=True)
class _Known:
    stamp: tuple[object, ...]
    entry: Entry


class Catalogue:
    """Lists the library of an engine. Safe to call from several threads."""

    def __init__(self, engine: "Engine") -> None:
        self.engine = engine
        self._known: dict[Path, _Known] = {}
        self._lock = threading.Lock()

    def entries(self, search: str = "", patience: float = AT_ONCE, fresh: bool = False) -> list[Entry]:
        """What is in the library, by name; with `search` what matches all its words, `fresh` as it is at this moment."""
        end = time.monotonic() + patience
        with self._lock:
            out = [self._entry(found.name, found.path, "", end) for found in self.engine.deltas(fresh)]
            out += [self._entry(found.name, found.path, found.kind, end) for found in self.engine.shelf.networks(fresh=False)]
            while len(self._known) > REMEMBERED:
                del self._known[next(iter(self._known))]
        chosen = [entry for entry in out if not search or entry.says(search[:200])]
        return sorted(chosen, key=lambda entry: entry.name.casefold())

    def entry(self, name: str) -> Entry | None:
        """One of them, looked at now if need be."""
        return next((entry for entry in self.entries(patience=30.0, fresh=True) if entry.name == name), None)

    def _entry(self, name: str, path: Path, network: str, end: float) -> Entry:
        try:
            stamp = self._stamp(path)
        except OSError:
            return Entry(name, path, "damaged", why="it has gone")
        known = self._known.pop(path, None)
        if known is None or known.stamp != stamp:
            if time.monotonic() > end:
                return Entry(name, path)
            known = _Known(stamp, self._looked_at(name, path, network))
        self._known[path] = known  # what was asked for last is forgotten last
        return replace(known.entry, name=name)

    def _stamp(self, path: Path) -> tuple[object, ...]:
        """All that an entry is made from: the file, its picture, and whether the base is there to compare it with."""
        facts, picture = path.stat(), picture_of(path)
        seen = picture.stat() if picture else None
        loaded = self.engine.loaded is not None
        return facts.st_mtime_ns, facts.st_size, picture, seen and (seen.st_mtime_ns, seen.st_size), loaded

    def _looked_at(self, name: str, path: Path, network: str) -> Entry:
        picture = picture_of(path)
        plain = Entry(name, path, thumbnail=_thumbnail(picture) if picture else "")
        if network:
            files = [path] if path.is_file() else [file for file in path.glob("*.safetensors") if file.is_file()]
            return replace(plain, what="network", kinds=network, size=sum(file.stat().st_size for file in files))
        from vgm_peft.tools.glance import glance

        try:
            seen = glance(path)
            family, fits, why = self._fit(path)
        except (VgmError, OSError) as error:
            return replace(plain, what="damaged", fits="no", why=str(error).replace(str(path), path.name))
        what = "delta" if seen.kinds else "words" if seen.words else "damaged"
        if what == "damaged":
            return replace(plain, what=what, size=seen.size, fits="no", why="no delta: none of its tensors is one's")
        return replace(
            plain, what=what, kinds=_kinds(seen), tool=seen.tool, family=family, rank=_rank(seen), words=trained_words(path),
            size=seen.size, fits=fits, why=why,
        )  # fmt: skip

    def _fit(self, path: Path) -> tuple[str, Fits, str]:
        """The family of a file, whether it fits the base in memory, and why not."""
        from vgm_peft.formats.fitting import family_of, misfit

        header, base = open_header(path), self.engine.loaded
        family = family_of(header)
        if base is None or not family:
            return family, "unknown", "" if base else "the base is not in memory yet"
        why = misfit(header, base)
        return family, "no" if why else "yes", why


def picture_of(path: Path) -> Path | None:
    """The picture that shows what a file does: one beside it of its name, else the last preview of its run."""
    beside = (path.with_name(path.stem + end) for end in PICTURES)
    found = next((picture for picture in beside if picture.is_file() and not picture.is_symlink()), None)
    if found is not None or path.name != "delta.safetensors" and not path.is_dir():
        return found
    return max((path.parent / "samples").glob("step-*-0.png"), default=None, key=lambda picture: picture.name)


def _thumbnail(picture: Path) -> str:
    from vgm_peft.stack.controls import read_picture

    try:
        return small_url(read_picture(picture), SIDE)
    except VgmError:  # a picture that cannot be read says nothing of the file beside it
        return ""


def _kinds(seen: "Glance") -> str:
    return " + ".join(seen.kinds) or "words"


def _rank(seen: "Glance") -> str:
    """`4`, or `4 .. 16` where layers differ."""
    low, high = min(seen.ranks, default=0), max(seen.ranks, default=0)
    return "" if not high else str(low) if low == high else f"{low} .. {high}"


def hue(name: str) -> int:
    """A colour for what has no picture, always the same for a name: degrees."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:2], "big") % 360
