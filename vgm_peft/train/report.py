"""`report.html`: a run on one page that opens without a network: its loss, scores, previews, pictures and settings.

Made from the run's own files and nothing else, so the same run has the same page. Whatever comes from outside (names, captions,
prompts) is escaped, and the page forbids itself every script and every request.
"""

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from vgm_peft.train.durable import write_text
from vgm_peft.train.folder import MANIFEST
from vgm_peft.train.journal import METRICS, read_metrics
from vgm_peft.train.survey import TABLE

REPORT = "report.html"
WIDE, HIGH, EDGE = 880, 260, 44
"""Of the curve, in units of its picture; the edge is left for the numbers."""
POINTS = 600
"""Most points that a curve is drawn with; a longer run is drawn by the means of stretches."""
MOST_PREVIEWS, MOST_ROWS = 48, 500
SCORES: Mapping[str, tuple[str, str]] = {
    "subject": ("#1f5fbf", "blue"),
    "prompt": ("#2e8b57", "green"),
    "drift": ("#c0392b", "red"),
    "total": ("#222222", "black"),
}
"""Colours of their curves."""
HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><title>{title}</title><style>
body{{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}}
h2{{margin:2rem 0 .5rem;font-size:1.1rem}}table{{border-collapse:collapse;width:100%}}
td,th{{text-align:left;padding:.15rem .6rem .15rem 0;border-bottom:1px solid #e4e4e4;vertical-align:top;overflow-wrap:anywhere}}
figure{{display:inline-block;margin:0 .5rem .5rem 0}}figcaption{{font-size:.8rem;color:#666}}img{{width:8rem}}
svg{{width:100%;height:auto}}li.warning{{color:#a40}}
</style></head><body>"""


def write_report(folder: Path) -> Path:
    """Write the page of a run from what its folder holds. Raises `SaveError`."""
    facts, data = _json(folder / MANIFEST), _json(folder / TABLE)
    lines = read_metrics(folder / METRICS)
    title = f"{facts.get('task', 'run')} on {facts.get('base', {}).get('name', 'a base')}"
    body = [
        HEAD.format(title=escape(title)),
        f"<h1>{escape(title)}</h1>",
        _summary(facts, lines),
        _notes(facts, lines),
        "<h2>Loss</h2>",
        _loss(lines),
        _scores(facts.get("scores", {}), lines),
        _previews(folder / "samples"),
        _data(data),
        _settings(facts),
    ]
    return write_text(folder / REPORT, "\n".join(part for part in body if part) + "\n</body></html>\n")


def _summary(facts: dict[str, Any], lines: Sequence[dict[str, Any]]) -> str:
    trained, base = facts.get("trained", {}), facts.get("base", {})
    tail = [line["loss"] for line in lines[-20:]]
    rows = {
        "steps": f"{len(lines)} of {facts.get('steps', '?')}",
        "loss": f"{fmean(tail):.4g}, the mean of the last {len(tail)} steps" if tail else "",
        "held-out loss": _best(lines),
        "best by the scores": _best_scored(lines),
        "trained": f"{trained.get('parameters', 0):,} values, {100 * trained.get('share', 0):.3g} % of the base",
        "base": f"{base.get('name', '')} ({base.get('family', '')}, SHA-256 {base.get('sha256', '')[:12]})",
        "seed": facts.get("seed", ""),
        "weights": facts.get("weights", ""),
        "result": ", ".join(facts.get("result", {})) or "none yet: the run was stopped before its end",
    }
    return _table((), [(name, value) for name, value in rows.items() if value != ""])


def _best(lines: Sequence[dict[str, Any]]) -> str:
    measured = [line for line in lines if "held_out" in line]
    if not measured:
        return ""
    best = min(reversed(measured), key=lambda line: line["held_out"])
    return f"{best['held_out']:.4g} at step {best['step']}, the best of {len(measured)} measurements"


def _best_scored(lines: Sequence[dict[str, Any]]) -> str:
    measured = [line for line in lines if "scores" in line]
    if not measured:
        return ""
    best = max(reversed(measured), key=lambda line: line["scores"]["total"])
    return f"step {best['step']} of {len(measured)} measured: {_told(best['scores'])}"


def _told(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items())


def _notes(facts: dict[str, Any], lines: Sequence[dict[str, Any]]) -> str:
    said = [f"<li>{escape(str(note))}</li>" for note in facts.get("notices", ())]
    for line in lines:
        said += [f'<li class="warning">step {line["step"]}: {escape(str(w))}</li>' for w in line.get("warnings", ())]
    return f"<h2>Notices and warnings</h2><ul>{''.join(said)}</ul>" if said else ""


def _loss(lines: Sequence[dict[str, Any]]) -> str:
    """The loss of every step, its running mean, and the held-out loss where it was measured."""
    if not lines:
        return "<p>No step was done.</p>"
    raw = _thinned([(line["step"], line["loss"]) for line in lines])
    smooth = _thinned(_running([(line["step"], line["loss"]) for line in lines]))
    held = [(line["step"], line["held_out"]) for line in lines if "held_out" in line]
    values = sorted(y for _, y in raw)
    top = max([values[int(0.98 * (len(values) - 1))], *(y for _, y in (*smooth, *held))]) * 1.05 or 1.0
    curves = [_Curve(raw, "#c8d4e6", 1), _Curve(smooth, "#1f5fbf"), *([_Curve(held, "#c0392b")] if held else [])]
    legend = "<p>thin: each step; blue: running mean" + ("; red: held-out</p>" if held else "</p>")
    return _plot(curves, "loss by step", (lines[0]["step"], lines[-1]["step"]), top) + legend


def _scores(said: dict[str, Any], lines: Sequence[dict[str, Any]]) -> str:
    """What drawn pictures were worth, from the untouched base (step 0) on."""
    measured = [(line["step"], line["scores"]) for line in lines if "scores" in line]
    if not measured:
        return ""
    told = [(0, said["base"]), *measured] if "base" in said else measured
    names = [name for name in SCORES if name in measured[0][1]]
    curves = [_Curve([(step, scores[name]) for step, scores in told if name in scores], SCORES[name][0]) for name in names]
    legend = "; ".join(f"{SCORES[name][1]}: {name}" for name in names)
    asked = [("asked", "; ".join(said.get("prompts", ()))), ("not to change", "; ".join(said.get("others", ())))]
    rows = [("read by", said.get("by", "")), *asked, ("untouched base", _told(said.get("base", {})))]
    plot = _plot(curves, "scores by step", (told[0][0], told[-1][0]), 1.0)
    return f"<h2>Scores of drawn pictures</h2>{plot}<p>{legend}</p>{_table((), [row for row in rows if row[1]])}"


@dataclass(frozen=True)
class _Curve:
    points: Sequence[tuple[float, float]]
    colour: str
    width: float = 2


def _plot(curves: Sequence[_Curve], name: str, steps: tuple[int, int], top: float) -> str:
    """Curves over a range of steps, from 0 to `top`; what is higher is cut off there."""
    first, last = steps[0], max(steps[1], steps[0] + 1)

    def path(curve: _Curve) -> str:
        places = " ".join(
            f"{EDGE + (x - first) / (last - first) * (WIDE - EDGE):.1f},{(1 - min(y, top) / top) * (HIGH - EDGE):.1f}"
            for x, y in curve.points
        )
        return f'<polyline fill="none" stroke="{curve.colour}" stroke-width="{curve.width}" points="{places}"/>'

    marks = [
        f'<text x="{EDGE - 6}" y="{(1 - s) * (HIGH - EDGE) + 4:.0f}" text-anchor="end">{s * top:.3g}</text>'
        for s in (0, 0.5, 1)
    ]
    ends = ((EDGE, "start", first), (WIDE, "end", last))
    marks += [f'<text x="{x}" y="{HIGH - EDGE + 18}" text-anchor="{a}">step {n}</text>' for x, a, n in ends]
    style = f'font-size="11" fill="#666" role="img" aria-label="{name}"'
    return f'<svg viewBox="0 -6 {WIDE + 4} {HIGH}" {style}>{"".join([*map(path, curves), *marks])}</svg>'


def _running(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential running mean over about a twentieth of the run, unbiased at its start."""
    keep = 1.0 - 1.0 / max(2.0, len(points) / 20)
    total = weight = 0.0
    out: list[tuple[float, float]] = []
    for x, y in points:
        total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        out.append((x, total / weight))
    return out


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def _previews(folder: Path) -> str:
    found = sorted(p for p in folder.glob("step-*.png")) if folder.is_dir() else []
    steps = list(dict.fromkeys(p.name.rsplit("-", 1)[0] for p in found))
    if not found:
        return ""
    rows = max(1, MOST_PREVIEWS // max(1, len(found) // len(steps)))
    chosen = {steps[round(i * (len(steps) - 1) / max(1, rows - 1))] for i in range(rows)} if rows < len(steps) else set(steps)
    out = ["<h2>Previews</h2>"]
    for step in (s for s in steps if s in chosen):
        pictures = [p for p in found if p.name.rsplit("-", 1)[0] == step]
        images = "".join(
            f'<img alt="" src="data:image/png;base64,{base64.b64encode(p.read_bytes()).decode()}">' for p in pictures
        )
        out.append(f"<figure>{images}<figcaption>step {int(re.sub('[^0-9]', '', step) or 0)}</figcaption></figure>")
    return "\n".join(out)


def _data(data: dict[str, Any]) -> str:
    pictures = data.get("pictures", [])
    rows = [(p["file"], f"{p['width']} x {p['height']}", p["repeats"], p["caption"]) for p in pictures[:MOST_ROWS]]
    notes = "".join(f"<li>{escape(str(note))}</li>" for note in data.get("notes", ()))
    more = f"<p>and {len(pictures) - MOST_ROWS} more, in {TABLE}</p>" if len(pictures) > MOST_ROWS else ""
    buckets = [tuple(bucket.values()) for bucket in data.get("buckets", ())]
    heads = [name.replace("_", " ") for name in next(iter(data.get("buckets", ())), {})]
    return "\n".join(
        [
            f"<h2>Pictures ({len(pictures)})</h2><ul>{notes}</ul>",
            _table(heads, buckets) if buckets else "",
            _table(("picture", "size", "repeats", "caption"), rows) + more,
        ]
    )


def _settings(facts: dict[str, Any]) -> str:
    flat = [
        (f"{section}.{key}" if key else section, json.dumps(value, ensure_ascii=False))
        for section, inner in facts.get("settings", {}).items()
        for key, value in (inner.items() if isinstance(inner, dict) else [("", inner)])
    ]
    versions = [(f"version of {name}", value) for name, value in facts.get("versions", {}).items()]
    return "<h2>Settings, all of them</h2>" + _table((), [*flat, *versions])


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "<tr>" + "".join(f"<th>{escape(h)}</th>" for h in heads) + "</tr>" if heads else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{head}{body}</table>"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
