"""The record of a run as it grows: what was added is read, never the whole of it again; and its loss as a curve."""

import json
from collections import deque
from html import escape
from pathlib import Path
from statistics import median
from typing import Any, cast

POINTS = 400
"""Most points of a curve; when there are twice as many, two become one."""
MOST = 4_000_000
"""Bytes that one look reads at most."""
WIDE, HIGH, LEFT, FOOT = 640, 180, 44, 22


class Metrics:
    """Reads one `metrics.jsonl` bit by bit."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.step, self.loss = 0, cast("float | None", None)
        self.points: list[tuple[float, float]] = []
        self._offset, self._stride = 0, 1
        self._sum, self._count = 0.0, 0
        self._paces: deque[float] = deque(maxlen=100)

    @property
    def pace(self) -> float | None:
        """Seconds a step, the median of the last ones."""
        return median(self._paces) if self._paces else None

    def update(self, path: Path) -> None:
        """Read what was added; a file that became shorter (a run went back to its checkpoint) is read anew."""
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                if size < self._offset:
                    self._begin()
                file.seek(self._offset)
                raw = file.read(MOST)
        except OSError:
            self._begin()
            return
        whole = raw[: raw.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            said: Any = json.loads(line)
            step, loss, seconds = int(said["step"]), float(said["loss"]), float(said.get("seconds", 0.0))
        except (ValueError, KeyError, TypeError, AttributeError):
            return
        self.step, self.loss = step, loss
        if seconds > 0:
            self._paces.append(seconds)
        self._sum, self._count = self._sum + loss, self._count + 1
        if self._count == self._stride:
            self.points.append((step - (self._stride - 1) / 2, self._sum / self._count))
            self._sum, self._count = 0.0, 0
        if len(self.points) >= 2 * POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [((a + c) / 2, (b + d) / 2) for (a, b), (c, d) in pairs]
            self._stride *= 2

    def curve(self, steps: int) -> str:
        """The loss so far over all the steps there will be, as SVG whose colours are the page's; empty before two points."""
        points = self.points
        if len(points) < 2:
            return ""
        smooth = _running(points)
        ordered = sorted(y for _, y in points)
        top = max(ordered[int(0.98 * (len(ordered) - 1))], max(y for _, y in smooth)) * 1.08 or 1.0
        last = max(float(steps), points[-1][0])

        def line(name: str, of: list[tuple[float, float]]) -> str:
            places = " ".join(
                f"{LEFT + x / last * (WIDE - LEFT):.1f},{(1 - min(y, top) / top) * (HIGH - FOOT):.1f}" for x, y in of
            )
            return f'<polyline class="{name}" points="{places}"/>'

        rules = "".join(_rule(share, top) for share in (0.0, 0.5, 1.0))
        ends = f'<text x="{LEFT}" y="{HIGH - 6}">step 0</text><text x="{WIDE}" y="{HIGH - 6}" text-anchor="end">{steps}</text>'
        said = escape(f"Loss by step: now {smooth[-1][1]:.4f}, at first {smooth[0][1]:.4f}")
        return (
            f'<figure class="curve"><svg viewBox="0 -8 {WIDE} {HIGH + 8}" role="img" aria-label="{said}">{rules}{ends}'
            f"{line('each', points)}{line('mean', smooth)}</svg><figcaption>Loss of each step, and its running mean. "
            "It jumps from step to step; only its trend says something.</figcaption></figure>"
        )


def _rule(share: float, top: float) -> str:
    y = (1 - share) * (HIGH - FOOT)
    return (
        f'<line x1="{LEFT}" x2="{WIDE}" y1="{y:.0f}" y2="{y:.0f}"/>'
        f'<text x="{LEFT - 6}" y="{y + 4:.0f}" text-anchor="end">{share * top:.2g}</text>'
    )


def _running(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential running mean over about a twentieth of the points, unbiased at its start."""
    keep = 1.0 - 1.0 / max(2.0, len(points) / 20)
    total = weight = 0.0
    out: list[tuple[float, float]] = []
    for x, y in points:
        total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        out.append((x, total / weight))
    return out
