"""Is a delta file sound? Everything read, every value a number, every tensor used, ranks and hashes what they say.

With a base, every change must have a tensor of its shape there, known from the base's headers alone.
"""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from vgm_peft.delta import Delta
from vgm_peft.errors import VgmError
from vgm_peft.formats import files_of, open_header, read
from vgm_peft.formats.vocabulary import is_finite
from vgm_peft.header import Header, shown
from vgm_peft.tools.checkpoint import Checkpoint
from vgm_peft.tools.measure import stored_rank, used_rank

CHUNK = 1 << 22
HASH = re.compile(r"(?:0x)?([0-9a-f]{64})")


@dataclass(frozen=True)
class Verdict:
    """What was found in one file: `faults` make it unsound, `notes` do not."""

    file: str
    faults: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults


def verify(path: Path, checkpoint: Checkpoint | None = None) -> Verdict:
    """Read a file whole and say what is wrong with it; what a reader refuses is a fault like any other."""
    verdict = Verdict(path.name)
    try:
        delta, headers = read(path), [open_header(file) for file in files_of(path)]
    except VgmError as error:
        verdict.faults.append(str(error))
        return verdict
    tensors = sum(len(header.tensors) for header in headers)
    verdict.notes.append(f"{tensors} tensors, all used: {len(delta.patches)} changes, {len(delta.words)} words")
    _check_values(delta, verdict)
    if verdict.sound:
        _check_ranks(delta, verdict)
    for header in headers:
        _check_hashes(header, verdict, of=f" in {header.path.parent.name}/{header.path.name}" if len(headers) > 1 else "")
    if checkpoint is not None:
        _check_fit(delta, checkpoint, verdict)
    return verdict


def _check_values(delta: Delta, verdict: Verdict) -> None:
    rows = ((f"{w.token}/{part}", t) for w in delta.words.values() for part, t in w.rows.items())
    wrong = [name for name, t in (*delta.parameters(), *rows) if not is_finite(t.detach())]
    if wrong:
        verdict.faults.append(f"{len(wrong)} tensors hold values that are not finite, the first {shown(wrong[0])}")
    if not delta.patches and not delta.words:
        verdict.faults.append("it holds no change and no word")


def _check_ranks(delta: Delta, verdict: Verdict) -> None:
    pairs = [(stored_rank(patch), used) for patch in delta if (used := used_rank(patch)) is not None]
    if not pairs:
        return
    used = [rank for _, rank in pairs]
    stored = sorted({rank for rank, _ in pairs if rank is not None})
    verdict.notes.append(
        f"ranks: {'/'.join(map(str, stored))} stored, {min(used)} .. {max(used)} in use on {len(pairs)} low-rank layers"
    )
    if not any(used):
        verdict.faults.append("every change is zero: nothing was learned, or the file was emptied")


def _check_hashes(header: Header, verdict: Verdict, of: str) -> None:
    digest, data = hashlib.sha256(), min((e.start for e in header.tensors.values()), default=header.size)
    with header.path.open("rb") as file:
        file.seek(data)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    found = digest.hexdigest()
    verdict.notes.append(f"SHA-256 of the tensors{of} {found}")
    match = HASH.fullmatch(header.metadata.get("sshs_model_hash", ""))
    if match and match[1] != found:
        verdict.faults.append(f"sshs_model_hash{of} says {match[1][:12]}..., so its tensors were changed after that")


def _check_fit(delta: Delta, checkpoint: Checkpoint, verdict: Verdict) -> None:
    if delta.family != checkpoint.family.name:
        verdict.faults.append(f"a delta of {delta.family}, and {checkpoint.path.name} is of {checkpoint.family.name}")
        return
    wrong: list[str] = []
    for patch in delta:
        try:
            checkpoint.check(patch.site)
        except VgmError as error:
            wrong.append(str(error))
    if wrong:
        verdict.faults.append(f"{len(wrong)} of {len(delta.patches)} changes do not fit the base; the first: {wrong[0]}")
    else:
        verdict.notes.append(f"every change has its tensor in {checkpoint.path.name}")
