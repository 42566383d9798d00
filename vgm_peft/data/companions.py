"""Pictures that go with pictures: which control picture and which mask belongs to which, by names alone.

A control picture or a mask has the name of its picture in a subfolder of its own, or is `a.control.png` beside `a.png` (as in
webdataset shards; `a.conditioning_image.png` too). Where the folder has `images/` beside `control/`, the pictures are those of
`images/`.
"""

import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from vgm_peft.data.faults import Faults
from vgm_peft.data.faults import names as listed
from vgm_peft.data.pictures import shown

CONTROL, MASKS = "control", "masks"
FOLDERS: Mapping[str, tuple[str, ...]] = {CONTROL: (CONTROL, "conditioning_images"), MASKS: (MASKS,)}
"""Subfolders that hold control pictures and masks, each named like the picture that it belongs to."""
INSIDE = tuple(f"{folder}/" for folders in FOLDERS.values() for folder in folders)
_IMAGES, _BESIDE = "images/", (".control", ".conditioning_image")
_WHAT = {CONTROL: "control picture", MASKS: "mask"}


def stem(name: str) -> str:
    """Return a name without its ending, in the one Unicode form in which names are compared."""
    return unicodedata.normalize("NFC", str(PurePosixPath(name).with_suffix("")))


def root_of(names: Sequence[str], named: bool) -> str:
    """Return where the pictures of a folder are: in it, or in its `images/` when those alone have control pictures beside
    them and nothing (`named`) says which pictures are meant."""
    beside = any(name.startswith(f"{folder}/") for name in names for folder in FOLDERS[CONTROL])
    return _IMAGES if beside and not named and all("/" in name for name in names) else ""


@dataclass(frozen=True)
class Companions:
    """The companions of one kind, `control` or `masks`, among the pictures of a folder; what is wrong goes to the faults."""

    kind: str
    names: Sequence[str]
    taken: Collection[str]
    """Pictures that rows name as companions."""
    faults: Faults

    def match(self, own: Sequence[str], named: Mapping[str, str], required: bool) -> dict[str, str]:
        """Return picture -> companion for the pictures `own`, as rows name it or by its name. Where there are any, or they
        are `required`, every picture must have one; and every companion must have its picture, and that no second one."""
        out, waiting, what = dict(named), self._waiting(), _WHAT[self.kind]
        if not waiting and not required:
            return out
        for name in own:
            found = waiting.pop(_bare(name), [])
            if len(found) + (name in named) > 1:
                several = listed([shown(n) for n in ([named[name]] if name in named else []) + found])
                self.faults.add(f"{shown(name)} has more than one {what}: {several}", "keep one of them")
            if name in out:
                continue
            if found:
                out[name] = found[0]
            else:
                lack = "mask" if self.kind == MASKS else ""
                self.faults.add(f"{shown(name)} has no {what}", f"add {self.kind}/{shown(_plain(name))}", kind=lack)
        for left in (name for found in waiting.values() for name in found):
            self.faults.add(
                f"{shown(left)} is a {what} that belongs to no picture",
                "name it like the picture it belongs to, or delete it",
                kind="orphan",
            )
        return out

    def _waiting(self) -> dict[str, list[str]]:
        """Bare name of the picture -> the companions that wait for it."""
        stems, out = {_bare(name) for name in self.names}, dict[str, list[str]]()
        for name in self.names:
            folder = next((f for f in FOLDERS[self.kind] if name.startswith(f"{f}/")), None)
            if name in self.taken:
                continue
            if folder is not None:
                out.setdefault(stem(name.removeprefix(f"{folder}/")), []).append(name)
            elif self.kind == CONTROL and is_beside(name, stems):
                out.setdefault(_owner(name), []).append(name)
        return out


def is_beside(name: str, stems: Collection[str]) -> bool:
    """Say whether a picture is `a.control.png` where there is a picture `a` among the bare names."""
    return _owner(name) in stems


def bare_names(names: Sequence[str]) -> set[str]:
    """Names without ending, and without `images/`."""
    return {_bare(name) for name in names}


def _owner(name: str) -> str:
    """The bare name of the picture beside which a picture of this name would be a control picture; empty for none."""
    bare = _bare(name)
    return next((bare.removesuffix(end) for end in _BESIDE if bare.endswith(end)), "")


def _bare(name: str) -> str:
    return stem(_plain(name))


def _plain(name: str) -> str:
    return name.removeprefix(_IMAGES)
