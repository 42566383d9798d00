"""A folder of pictures -> captioned examples, with every file in it accounted for.

The rule is that nothing is skipped in silence: each file is an example, belongs to one (caption, control picture), is
ignored for a reason that the report states, or is a fault; and all faults are raised together, each with its cure.
"""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from vgm_peft.data import pictures
from vgm_peft.data.folder import Listing, walk
from vgm_peft.data.pictures import Picture, shown
from vgm_peft.data.plan import Plan
from vgm_peft.data.report import Example, Report
from vgm_peft.errors import DataError


def scan(folder: Path, *, caption: str | None = None, require_captions: bool = False) -> Report:
    """Account for every file of an image folder and return its examples, sorted by name.

    `caption` is for pictures that have none of their own; without it captions are for all or for none, and with
    `require_captions` for all. Pictures in subfolders are examples when `metadata.jsonl` names them. Every picture is
    decoded once, in full. Raises one `DataError` that names every file that cannot be used and what to do about it.
    """
    listing = walk(folder)
    plan = Plan(listing, caption, require_captions)
    found = _examine(listing.files, [*plan.examples, *plan.controls.values()], listing.faults)
    plan.check_controls(found)
    if not plan.examples and not listing.faults:
        listing.faults.append(DataError("there is no picture in it", expected="PNG, JPEG, WebP or BMP files"))
    if listing.faults:
        raise _together(folder, listing.faults)
    examples = tuple(_example(name, listing, plan, found) for name in plan.examples)
    notes = (*plan.notes, *_duplicates(plan.examples, found), *_by_note(found))
    return Report(folder, examples, notes, tuple(listing.ignored.items()))


def _examine(files: Mapping[str, Path], names: Iterable[str], faults: list[DataError]) -> dict[str, Picture]:
    """Examine the pictures on a few threads (decoding leaves Python's lock alone), gathering the faults."""

    def one(name: str) -> Picture | DataError:
        try:
            return pictures.examine(files[name])
        except DataError as fault:
            return fault

    unique = list(dict.fromkeys(names))
    with warnings.catch_warnings(), ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own, lower limit speaks
        results = dict(zip(unique, pool.map(one, unique), strict=True))
    faults += [fault for fault in results.values() if isinstance(fault, DataError)]
    return {name: picture for name, picture in results.items() if isinstance(picture, Picture)}


def _example(name: str, listing: Listing, plan: Plan, found: Mapping[str, Picture]) -> Example:
    picture, control = found[name], plan.controls.get(name)
    return Example(
        listing.files[name],
        plan.texts[name],
        picture.width,
        picture.height,
        picture.digest,
        listing.files[control] if control else None,
        found[control].digest if control else "",
        plan.rows[name].repeats if name in plan.rows else 1,
    )


def _duplicates(names: Iterable[str], found: Mapping[str, Picture]) -> list[str]:
    same: dict[str, list[str]] = {}
    for name in names:
        same.setdefault(found[name].digest, []).append(shown(name))
    return [f"the same picture more than once: {_short(group)}" for group in same.values() if len(group) > 1]


def _by_note(found: Mapping[str, Picture]) -> list[str]:
    grouped: dict[str, list[str]] = {}
    for name, picture in found.items():
        for note in picture.notes:
            grouped.setdefault(note, []).append(shown(name))
    return [f"{note}: {_short(names)}" for note, names in grouped.items()]


def _short(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _together(folder: Path, faults: Sequence[DataError]) -> DataError:
    if len(faults) == 1:
        return DataError(f"{folder}: {faults[0].what}", expected=faults[0].expected, fix=faults[0].fix)
    return DataError(f"{folder}: {len(faults)} things are wrong\n" + "\n".join(f"  {fault}" for fault in faults))
