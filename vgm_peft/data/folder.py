"""What lies in an image folder: every entry once, each either a plain file inside it, ignored for a reason, or a fault.

Links that leave the folder, links to folders (which may loop), pipes and devices are faults by name; nothing is opened.
"""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from vgm_peft.data.faults import Faults
from vgm_peft.data.member import Place
from vgm_peft.data.pictures import shown
from vgm_peft.errors import DataError

COMPANIONS = frozenset({"thumbs.db", "desktop.ini", "__macosx", "readme.md", "license", "license.md", "license.txt"})
"""Names, lower case, that other programs leave beside pictures and that cannot be anyone's caption."""


@dataclass
class Listing:
    """The entries of a folder or shard: `files` by their path relative to it (forward slashes), in sorted order."""

    faults: Faults
    files: dict[str, Place] = field(default_factory=dict[str, Place])
    ignored: dict[str, str] = field(default_factory=dict[str, str])
    shards: list[str] = field(default_factory=list[str])
    """Those whose members are listed by themselves, and are not in `files`."""
    left_out: dict[str, str] = field(default_factory=dict[str, str])
    """What is no plain file of this folder, with the reason; each is a fault as well."""


def walk(folder: Path, faults: Faults) -> Listing:
    """List a folder and its subfolders. Raises `DataError` when it is not a folder or cannot be listed."""
    listing = Listing(faults)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"image folder {folder} {what}", expected="a folder of pictures")
    _walk(folder, "", folder.resolve(), listing)
    return listing


def _walk(folder: Path, prefix: str, root: Path, listing: Listing) -> None:
    try:
        entries = sorted(os.scandir(folder), key=lambda e: e.name)
    except OSError as error:
        what = f"folder {shown(prefix or str(folder))} cannot be listed ({error.strerror})"
        listing.faults.add(what, "check its permissions")
        return
    for entry in entries:
        name = prefix + entry.name
        if reason := why_ignored(entry.name):
            listing.ignored[name] = reason
        elif entry.is_dir(follow_symlinks=False):
            _walk(Path(entry.path), f"{name}/", root, listing)
        else:
            fault = _fault(entry, name, root)
            if fault is None:
                listing.files[name] = Path(entry.path)
            else:
                listing.faults.take(fault, "unreadable")
                listing.left_out[name] = fault.what.removeprefix(f"{shown(name)} is ")


def why_ignored(name: str) -> str:
    """Say why a file of this path plays no part; empty for one that may."""
    parts = name.split("/")
    if any(part.startswith(".") for part in parts):
        return "hidden"
    return "left by another program" if any(part.lower() in COMPANIONS for part in parts) else ""


def _fault(entry: os.DirEntry[str], name: str, root: Path) -> DataError | None:
    try:
        mode = entry.stat().st_mode
        leaves = entry.is_symlink() and not Path(entry.path).resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):
        return DataError(f"{shown(name)} is a link to nothing", fix="delete it, or put the file itself there")
    if stat.S_ISDIR(mode):
        return DataError(f"{shown(name)} is a link to a folder", fix="put the files themselves there")
    if not stat.S_ISREG(mode):
        return DataError(f"{shown(name)} is a pipe, socket or device", expected="a plain file", fix="take it out of the folder")
    if leaves:
        return DataError(f"{shown(name)} is a link out of the folder", fix="put the file itself there")
    return None
