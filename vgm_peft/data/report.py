"""What a folder was found to hold, and how it is shown."""

from dataclasses import dataclass
from pathlib import Path

from vgm_peft.data.pictures import shown


@dataclass(frozen=True)
class Example:
    """One picture to learn from: upright size in pixels, SHA-256 of its bytes, and the control picture where there is one."""

    path: Path
    caption: str
    width: int
    height: int
    digest: str
    control: Path | None = None
    control_digest: str = ""
    repeats: int = 1


@dataclass(frozen=True)
class Report:
    """What a folder holds. Prints as a short table; `notes` are what the user should know though it is no fault."""

    folder: Path
    examples: tuple[Example, ...]
    notes: tuple[str, ...] = ()
    ignored: tuple[tuple[str, str], ...] = ()
    """Names of files that play no part, each with the reason."""

    def __str__(self) -> str:
        return "\n".join(_table(self))


def _table(report: Report, most: int = 12) -> list[str]:
    examples = report.examples
    width = max(len(shown(e.path.name)) for e in examples[:most])
    lines = [f"{len(examples)} pictures in {report.folder}"]
    for e in examples[:most]:
        text = e.caption if len(e.caption) <= 60 else e.caption[:59] + "…"
        times = f"  x{e.repeats}" if e.repeats > 1 else ""
        lines.append(f"  {shown(e.path.name):{width}}  {e.width:5} x {e.height:<5}  {text}{times}")
    if len(examples) > most:
        lines.append(f"  ... and {len(examples) - most} more")
    lines += [f"note: {note}" for note in report.notes]
    if report.ignored:
        lines.append("ignored: " + ", ".join(f"{shown(name)} ({why})" for name, why in report.ignored))
    return lines
