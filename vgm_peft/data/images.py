"""Folders of pictures -> captioned examples, with every file in them accounted for.

The rule is that nothing is skipped in silence: each file is an example, belongs to one (caption, control picture, mask), is
ignored for a reason that the report states, or is a fault; and all faults are raised together, each with its cure.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from vgm_peft.data import pictures
from vgm_peft.data.faults import Faults, Tell
from vgm_peft.data.faults import names as listed
from vgm_peft.data.folder import Listing
from vgm_peft.data.look import same_bytes, same_look
from vgm_peft.data.member import Place
from vgm_peft.data.pictures import Picture, shown
from vgm_peft.data.plan import Plan, Source
from vgm_peft.data.report import Example, Report
from vgm_peft.data.shards import listings
from vgm_peft.errors import DataError

_ONE_BY_ONE = {"tiny": f"use pictures of at least {pictures.MIN_SIDE} pixels a side", "animated": "save the frame you want"}
_CURES = {
    **_ONE_BY_ONE,
    "transparent": "lay it on a background, or use the transparency as a mask: --set data.masks=alpha",
    "profile": "save it with sRGB colours",
}


def scan(folder: Path, *, caption: str | None = None, require_captions: bool = False) -> Report:
    """Account for every file of one folder; see `scan_all`."""
    return scan_all([Source(folder=folder, caption=caption, require_captions=require_captions)])


def scan_all(sources: Sequence[Source], allow: AbstractSet[str] = frozenset(), tell: Tell | None = None) -> Report:
    """Account for every file of the folders and return their examples, sorted by folder and name.

    Pictures in subfolders are examples when `metadata.jsonl` names them. Every picture is decoded to its last byte. `allow`
    are kinds of faults to go on in spite of. Raises one `DataError` that names every file that cannot be used and what to
    do about it.
    """
    faults = Faults(allow)
    plans = [
        (f"{label}{shard and f'{shard}/'}", number, Plan(listing, source))
        for number, (label, source) in enumerate(zip(_labels(sources), sources, strict=True))
        for shard, listing in listings(source.folder, faults)
    ]
    files = [{name: plan.listing.files[name] for name in _wanted(plan)} for _, _, plan in plans]
    examined = _examine([place for group in files for place in group.values()], tell)
    folders = [
        _Folder(label, number, plan, _sound(plan, {name: examined[place] for name, place in group.items()}))
        for (label, number, plan), group in zip(plans, files, strict=True)
    ]
    for folder in folders:
        folder.plan.complete(folder.found)
        folder.plan.check_looks(folder.found)
    if {folder.concept for folder in folders if folder.plan.examples} != set(range(len(sources))) and not faults.found:
        faults.add("there is no picture in it", "put some there", expected="PNG, JPEG, WebP or BMP files")
    trained = {f"{f.label}{name}": f.found[name] for f in folders for name in f.plan.examples if name in f.found}
    _repeated(trained, faults)
    allowed = faults.settle(" and ".join(str(source.folder) for source in sources))
    if not trained:
        raise DataError(f"{sources[0].folder}: no picture is left", fix="allow less, or give whole pictures")
    return _report(sources, folders, allowed)


@dataclass(frozen=True)
class _Folder:
    """A folder or a shard, all read."""

    label: str
    """What its files are named with."""
    concept: int
    plan: Plan
    found: Mapping[str, Picture]
    """Its sound pictures by name."""


def _wanted(plan: Plan) -> list[str]:
    return list(dict.fromkeys([*plan.examples, *plan.controls.values(), *plan.masks.values()]))


def _examine(paths: Sequence[Place], tell: Tell | None) -> dict[Place, Picture | DataError]:
    """Examine picture files on a few threads (hashing and decoding leave Python's lock alone)."""

    def one(path: Place) -> Picture | DataError:
        try:
            return pictures.examine(path)
        except DataError as fault:
            return fault

    out: dict[Place, Picture | DataError] = {}
    with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own, lower limit speaks
        for path, result in zip(paths, pool.map(one, paths), strict=True):
            out[path] = result
            if tell:
                tell(len(out), len(paths))
    return out


def _sound(plan: Plan, examined: Mapping[str, Picture | DataError]) -> dict[str, Picture]:
    """The pictures that can be used, what is wrong with them noted; alike faults of pictures are told in one line."""
    faults, alike = plan.faults, dict[tuple[str, str], list[str]]()
    for name, result in examined.items():
        if isinstance(result, DataError):
            # Without its control or mask a picture would be another example: only whole pictures may be left out.
            faults.take(_placed(result, name), "unreadable" if plan.parts[name] == "picture" else "")
            plan.listing.left_out[name] = "cannot be read"
            continue
        for kind, what in result.faults if plan.parts[name] in ("picture", "control") else ():
            if kind == "transparent" and plan.source.masks == "alpha":
                continue
            alike.setdefault((kind, what), []).append(shown(name))
    for (kind, what), found in alike.items():
        faults.add(f"{listed(found)} {what}", _CURES[kind], kind=kind)
    return {name: result for name, result in examined.items() if isinstance(result, Picture)}


def _placed(error: DataError, name: str) -> DataError:
    """What was said of a file by its own name, said by its name in the folder: pairs have the same in two of them."""
    head = shown(Path(name).name)
    return DataError(f"{shown(name)}{error.what.removeprefix(head)}", expected=error.expected, fix=error.fix)


def _repeated(trained: Mapping[str, Picture], faults: Faults) -> None:
    fix = "keep one; to train one picture more often, give it repeats in metadata.jsonl"
    for group in same_bytes(trained):
        faults.add(f"the same picture more than once: {listed([shown(n) for n in group])}", fix, kind="duplicate")
    for group in same_look(trained):
        faults.add(f"pictures that look the same: {listed([shown(n) for n in group])}", fix, kind="near-duplicate")


def _labels(sources: Sequence[Source]) -> list[str]:
    """What names of files are told with: nothing where there is one folder, else the folder."""
    if len(sources) == 1:
        return [""]
    heads = [source.folder.resolve().name for source in sources]
    return [f"{head}{f' ({i + 1})' if heads.count(head) > 1 else ''}/" for i, head in enumerate(heads)]


def _report(sources: Sequence[Source], folders: Sequence[_Folder], allowed: tuple[str, ...]) -> Report:
    examples: list[Example] = []
    notes: list[str] = []
    files: dict[str, str] = {}
    for folder in folders:
        label, plan, found = folder.label, folder.plan, folder.found
        examples += [replace(_example(name, plan, found), concept=folder.concept) for name in plan.examples if name in found]
        notes += [f"{label and f'{label}: '}{note}" for note in (*plan.notes, *_by_note(plan, found))]
        files |= {f"{label}{name}": part for name, part in _account(plan).items()}
    return Report(tuple(source.folder for source in sources), tuple(examples), (*notes, *allowed), files)


def _account(plan: Plan) -> dict[str, str]:
    """Every file of a folder -> what became of it."""
    listing: Listing = plan.listing
    out = {name: f"ignored: {why}" for name, why in listing.ignored.items()}
    out |= dict.fromkeys(listing.shards, "shard")
    out |= {name: plan.parts.get(name, "left out: plays no part") for name in listing.files}
    out |= {name: f"left out: {why}" for name, why in listing.left_out.items()}
    return dict(sorted(out.items()))


def _example(name: str, plan: Plan, found: Mapping[str, Picture]) -> Example:
    picture, files = found[name], plan.listing.files
    control, mask = plan.controls.get(name, ""), plan.masks.get(name, "")
    if plan.source.masks == "alpha" and picture.transparent:
        mask = name
    return Example(
        files[name],
        plan.texts[name],
        picture.width,
        picture.height,
        picture.digest,
        control=files[control] if control in found else None,
        control_digest=found[control].digest if control in found else "",
        repeats=(plan.rows[name].repeats if name in plan.rows else 1) * plan.source.repeats,
        mask=files[mask] if mask in found else None,
        mask_digest=found[mask].digest if mask in found else "",
    )


def _by_note(plan: Plan, found: Mapping[str, Picture]) -> list[str]:
    grouped: dict[str, list[str]] = {}
    for name, picture in found.items():
        for note in picture.notes:
            grouped.setdefault(note, []).append(shown(name))
    out = [f"{note}: {listed(names, 5)}" for note, names in grouped.items()]
    if plan.source.masks == "alpha" and (whole := [shown(n) for n in plan.examples if n in found and not found[n].transparent]):
        out.append(f"not transparent anywhere, so all of it counts: {listed(whole, 5)}")
    return out
