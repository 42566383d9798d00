"""What folders of pictures were found to hold: shown in a few lines, and kept in full with a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vgm_peft.data.member import Place
from vgm_peft.data.pictures import shown


@dataclass(frozen=True)
class Example:
    """One picture to learn from: upright size in pixels, SHA-256 of its bytes, and the control picture where there is one."""

    path: Place
    caption: str
    width: int
    height: int
    digest: str
    control: Place | None = None
    control_digest: str = ""
    repeats: int = 1
    mask: Place | None = None
    """Where it counts: a picture that is white there; the picture itself where its transparency says so."""
    mask_digest: str = ""
    concept: int = 0
    """Which of the folders it is from, from 0."""


@dataclass(frozen=True)
class Report:
    """What folders hold. Prints as a short table; `notes` are what the user should know though it stops nothing."""

    folders: tuple[Path, ...]
    examples: tuple[Example, ...]
    notes: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    """Every file -> `picture`, `caption`, `control`, `mask`, `metadata`, `shard`, or why it is none of these: `ignored: ...`,
    `left out: ...`."""

    @property
    def ignored(self) -> dict[str, str]:
        """Files that play no part, each with the reason."""
        return {name: part.split(": ", 1)[1] for name, part in self.files.items() if ": " in part}

    @property
    def counts(self) -> dict[str, int]:
        """How many files are what; the sum is all files."""
        out: dict[str, int] = {}
        for part in self.files.values():
            head = part.partition(":")[0]
            out[head] = out.get(head, 0) + 1
        return out

    def table(self) -> dict[str, object]:
        """All of it as plain values for JSON; files by name only, so nothing in it depends on where the folders are."""
        return {
            "folders": [folder.resolve().name for folder in self.folders],
            "counts": self.counts,
            "pictures": [_row(example) for example in self.examples],
            "notes": list(self.notes),
            "files": dict(self.files),
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _row(example: Example) -> dict[str, object]:
    return {
        "file": example.path.name,
        "concept": example.concept,
        "width": example.width,
        "height": example.height,
        "sha256": example.digest,
        "repeats": example.repeats,
        "caption": example.caption,
        "control": example.control.name if example.control else None,
        "mask": example.mask.name if example.mask else None,
    }


def _lines(report: Report, most: int = 12) -> list[str]:
    examples = report.examples
    width = max(len(shown(e.path.name)) for e in examples[:most])
    lines = [f"{len(examples)} pictures in {', '.join(map(str, report.folders))}"]
    for e in examples[:most]:
        text = e.caption if len(e.caption) <= 60 else e.caption[:59] + "…"
        times = f"  x{e.repeats}" if e.repeats > 1 else ""
        lines.append(f"  {shown(e.path.name):{width}}  {e.width:5} x {e.height:<5}  {text}{times}")
    if len(examples) > most:
        lines.append(f"  ... and {len(examples) - most} more")
    total = len(report.files)
    lines.append(f"{total} files: " + ", ".join(f"{part} {count}" for part, count in report.counts.items()))
    lines += [f"note: {note}" for note in report.notes]
    if report.ignored:
        lines.append("plays no part: " + ", ".join(f"{shown(name)} ({why})" for name, why in report.ignored.items()))
    return lines
