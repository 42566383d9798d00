"""Deltas put into a base's own weights for good: a new folder or file that any tool loads as a base.

The base is copied tensor by tensor, its changed ones computed as a fusion does: W + Σ strength dW(W), in float32 or wider, one
rounding to the stored dtype. So memory holds one tensor, whatever the size of a shard. Names, dtypes, order and all that is not
changed stay as they were; every variant of the weights that a folder holds is baked, and weights kept as pickles, which are
never read and would be the old ones, are left out.
"""

import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from io import BufferedReader, BufferedWriter
from pathlib import Path

import torch
from torch import Tensor

from vgm_peft.delta import Delta, Patch
from vgm_peft.errors import ConfigError, DeltaError, SaveError
from vgm_peft.folders import PICKLED, replace_folder
from vgm_peft.formats.canonical import bytes_of, header_of, read_tensor
from vgm_peft.formats.vocabulary import is_finite
from vgm_peft.header import Header, open_header
from vgm_peft.tools.checkpoint import Checkpoint, Place

CHUNK = 1 << 22
STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Metadata that is no longer true of other weights."""

Change = tuple[Patch, float, Place]
Changes = Mapping[tuple[Path, str], Sequence[Change]]
"""What comes to a stored tensor, by file and name."""


@dataclass(frozen=True)
class Baked:
    """What was written: the path, the stored tensors that changed, and the old weights that were left out."""

    path: Path
    changed: int
    left_out: tuple[str, ...]


@torch.no_grad()
def bake(uses: Sequence[tuple[Delta, float]], base: Checkpoint, out: Path) -> Baked:
    """Write `base` with deltas at their strengths. Nothing appears at `out` unless all went well.

    Raises `DeltaError` when a delta does not fit, changes with the timestep, is made of words alone, or makes a value too large
    for its dtype; `ConfigError` for an `out` of the wrong sort; `SaveError` when the disk refuses or `out` holds something.
    """
    changes = _changes(uses, base)
    if out.resolve() == base.path.resolve() or base.is_folder and base.path.resolve() in out.resolve().parents:
        raise ConfigError(f"--output {out} is the base", fix="choose another name")
    if base.is_folder == (out.suffix == ".safetensors"):
        raise ConfigError(f"--output {out}", expected="a folder for a folder, and a .safetensors file for a file")
    if not base.is_folder:
        _write_file(base.headers[0], out, changes)
        return Baked(out, len(changes), ())
    with replace_folder(out, lambda _: False) as aside:
        left_out = _copy_others(base, aside)
        for header in base.headers:
            _rewrite(header, aside / header.path.relative_to(base.path), changes)
    return Baked(out, len(changes), left_out)


def _changes(uses: Sequence[tuple[Delta, float]], base: Checkpoint) -> Changes:
    changes: dict[tuple[Path, str], list[Change]] = {}
    for delta, strength in uses:
        if delta.family != base.family.name:
            raise DeltaError(f"a delta of {delta.family}, and {base.path.name} is of {base.family.name}")
        if not delta.patches:
            raise DeltaError("a delta of words alone", expected="changes of weights", fix="export its words as embeddings")
        for patch in delta:
            if patch.timed:
                raise DeltaError(f"{patch.site}: {patch.kind} changes with the timestep", fix="attach it live")
            base.check(patch.site)
            for place in base.places(patch.site):
                changes.setdefault((place.header.path, place.key), []).append((patch, strength, place))
    return changes


def _copy_others(base: Checkpoint, aside: Path) -> tuple[str, ...]:
    """Copy all of a folder but the weights that are rewritten and the pickles beside them; return the latter."""
    rewritten = {header.path for header in base.headers}
    left_out: list[str] = []
    for path in sorted(base.path.rglob("*")):
        inner = path.relative_to(base.path)
        if any(part.startswith(".") for part in inner.parts) or path in rewritten or not path.is_file():
            continue
        if path.suffix in PICKLED or ".bin.index" in path.name:
            left_out.append(inner.as_posix())
            continue
        (aside / inner).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, aside / inner)
    return tuple(left_out)


def _write_file(header: Header, out: Path, changes: Changes) -> None:
    """Rewrite a single file, aside and then renamed."""
    if out.exists():
        raise SaveError(f"{out}: holds something else", expected="a new file", fix="name another")
    aside = out.with_name(f".{secrets.token_hex(8)}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _rewrite(header, aside, changes)
        os.replace(aside, out)
    except OSError as error:
        raise SaveError(f"{out}: not written ({error.strerror or error})", fix="make room, or choose another place") from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def _rewrite(header: Header, target: Path, changes: Changes) -> None:
    """Copy a file of weights, computing those that change on the way; what was written is read back by its header."""
    target.parent.mkdir(parents=True, exist_ok=True)
    metadata = {key: text for key, text in header.metadata.items() if key not in STALE}
    with header.path.open("rb") as source, target.open("wb") as file:
        file.write(header_of({name: (e.dtype, e.shape) for name, e in header.tensors.items()}, metadata))
        for name, entry in header.tensors.items():
            parts = changes.get((header.path, name))
            if parts is None:
                _copy(source, file, entry.start, entry.end)
            else:
                file.write(bytes_of(_changed(read_tensor(header, name), parts, f"{header.path.name}: {name}")))
        file.flush()
        os.fsync(file.fileno())
    written = open_header(target).tensors
    if [(n, e.dtype, e.shape) for n, e in written.items()] != [(n, e.dtype, e.shape) for n, e in header.tensors.items()]:
        raise SaveError(f"{target}: what was read back is not what was written", fix="check the disk")


def _copy(source: BufferedReader, file: BufferedWriter, start: int, end: int) -> None:
    source.seek(start)
    while start < end:
        chunk = source.read(min(CHUNK, end - start))
        if not chunk:
            raise SaveError(f"{source.name}: it became shorter while it was read", fix="try again")
        file.write(chunk)
        start += len(chunk)


def _changed(stored: Tensor, parts: Sequence[Change], where: str) -> Tensor:
    """The stored tensor with its changes, each computed from the untouched values."""
    dtype = torch.promote_types(stored.dtype, torch.float32)
    wide = stored.to(dtype)
    total = wide.clone()
    for patch, strength, place in parts:
        base = place.cut.of(wide).reshape(patch.site.shape)
        change = deepcopy(patch).to(dtype=dtype).change(base)
        cut = place.cut.of(total)
        cut.add_(change.reshape(cut.shape), alpha=strength)
    out = total.to(stored.dtype)
    if not is_finite(out):
        raise DeltaError(f"{where}: the sum does not fit {str(stored.dtype).removeprefix('torch.')}", fix="lower the strength")
    return out
