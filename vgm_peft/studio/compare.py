"""The *Compare* tab: deltas side by side at the same seeds, or how one training went on, with scores where they are known."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from vgm_peft.errors import ConfigError, VgmError, nearest
from vgm_peft.picture import grid
from vgm_peft.stack.recipe import Stack
from vgm_peft.stack.uses import DeltaUse
from vgm_peft.studio.draw_api import asked, friendly
from vgm_peft.studio.drawing import Drawing, Stepping, explain
from vgm_peft.studio.look import bar

if TYPE_CHECKING:
    from PIL import Image

    from vgm_peft.studio.engine import Engine
    from vgm_peft.studio.jobs import Desk

BASE = "the base alone"
MOST, SEEDS = 12, 6
"""Rows, and seeds of each."""
STEPS = 8
"""Moments of a training that are shown: the first, the last, and between."""
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class Compared:
    """A sheet, and what each of its rows is worth: name -> score, 0 .. 1 (empty where nothing can tell)."""

    sheet: Path
    scores: dict[str, dict[str, float]]


def compare_deltas(
    engine: "Engine", stack: Stack, names: Sequence[str], seeds: int, on_step: Stepping | None = None
) -> Compared:
    """Draw a prompt with each of several deltas, and with the base alone, from the same seeds. Raises `ConfigError`.

    Where `on_step` ends it, what was drawn so far is shown; without any row there is a `ConfigError`.
    """
    if not 1 <= len(names) <= MOST or not 1 <= seeds <= SEEDS:
        raise ConfigError(f"{len(names)} deltas with {seeds} seeds", expected=f"1 .. {MOST} deltas and 1 .. {SEEDS} seeds")
    cells = {BASE: replace(stack, count=seeds, deltas=())}
    for name in dict.fromkeys(names):
        cells[name] = replace(stack, count=seeds, deltas=(DeltaUse(file=name),))
    for cell in cells.values():
        engine.shelf.placed(cell)  # every name is known before the first is drawn
    rows: dict[str, list[Image.Image | None]] = {}
    for number, (name, cell) in enumerate(cells.items()):
        drawn = [picture.image for picture in engine.render(cell, _counted(number * seeds, len(cells) * seeds, on_step))]
        if not drawn:
            break
        rows[name] = [*drawn, *[None] * (seeds - len(drawn))]
    if not rows:
        raise ConfigError("stopped before the first picture")
    scores = {name: _score(engine, name, [p for p in row if p], stack.prompt) for name, row in rows.items()}
    labels = [_label(name, scores[name]) for name in rows]
    sheet = grid(list(rows.values()), [f"seed {stack.seed + i}" for i in range(seeds)], labels, caption=stack.prompt[:300])
    return Compared(engine.keep_sheet(sheet, {"parameters": f"A comparison of {', '.join(rows)}"}), scores)


def compare_steps(engine: "Engine", desk: "Desk", run: str) -> Compared:
    """Put the previews of one training beside one another, step by step. Raises `ConfigError` for one without any."""
    from vgm_peft.stack.controls import read_picture
    from vgm_peft.train.journal import METRICS, read_metrics

    known = runs_of(desk)
    if run not in known:
        raise ConfigError(f'no training "{run[:80]}" with previews', fix=nearest(run[:80], known) if known else "train first")
    folder = desk.settings.runs / run
    by_step: dict[int, list[Path]] = {}
    for path in sorted((folder / "samples").glob("step-*.png")):
        step = path.stem.split("-")[1]
        if step.isdigit():
            by_step.setdefault(int(step), []).append(path)
    steps = sorted(by_step)
    if len(steps) > STEPS:
        steps = [steps[round(i * (len(steps) - 1) / (STEPS - 1))] for i in range(STEPS)]
    many = min(SEEDS, max(len(by_step[step]) for step in steps))
    columns = [[read_picture(path) for path in by_step[step][:many]] for step in steps]
    rows = [[column[i] if i < len(column) else None for column in columns] for i in range(many)]
    lines = {line["step"]: line for line in read_metrics(folder / METRICS)}
    scores = {f"step {step}": dict(lines.get(step, {}).get("scores", {})) for step in steps}
    losses = {step: _around(lines, step) for step in steps}
    heads = [f"step {step}" + (f", loss {losses[step]:.3f}" if losses[step] is not None else "") for step in steps]
    sheet = grid(rows, heads, caption=f"{run}: previews from the same seeds; losses are means of ten steps")
    return Compared(engine.keep_sheet(sheet, {"parameters": f"Previews of {run}"}), scores)


def runs_of(desk: "Desk") -> list[str]:
    """The trainings that have previews, newest first."""
    found = [folder for folder in desk.settings.runs.glob("*/samples") if not folder.parent.name.startswith(".")]
    with_any = [folder.parent for folder in found if next(folder.glob("step-*.png"), None) is not None]
    return [folder.name for folder in sorted(with_any, key=lambda folder: folder.stat().st_mtime, reverse=True)]


def _around(lines: "dict[int, dict[str, Any]]", step: int) -> float | None:
    losses = [float(lines[i]["loss"]) for i in range(step - 9, step + 1) if i in lines]
    return sum(losses) / len(losses) if losses else None


def _counted(done: int, total: int, on_step: Stepping | None) -> Any:
    """Tell of a step as one of all the pictures of the sheet."""

    def step(progress: Any) -> bool | None:
        return None if on_step is None else on_step(replace(progress, picture=done + progress.picture, pictures=total))

    return step


def _score(engine: "Engine", name: str, pictures: "Sequence[Image.Image]", prompt: str) -> dict[str, float]:
    """What the Toybox's oracles say: how much of the prompt is shown, and how like the run's own pictures they are."""
    if engine.settings.base != "toybox":
        return {}
    from vgm_peft.scores import scorer_named

    scorer, out = scorer_named("oracles").load(""), dict[str, float]()
    with suppress(ConfigError):  # the prompt names nothing of that world
        shown = scorer.agreement(pictures, [prompt] * len(pictures))
        if shown is not None:
            out["prompt"] = float(shown.mean())
    references = _references(engine, name)
    if references:
        out["subject"] = float(scorer.likeness(pictures, references, "subject").mean())
    return out


def _references(engine: "Engine", name: str) -> "list[Image.Image]":
    """The pictures that a delta learned from, where its training was asked for here."""
    from vgm_peft.stack.controls import read_picture
    from vgm_peft.studio.tickets import tickets_of

    for ticket in tickets_of(engine.settings.queue).values():
        if ticket.run.name == name and ticket.wish.task != "finetune":
            return [read_picture(path) for path in sorted((ticket.folder / ticket.wish.folder_name).glob("*.png"))[:16]]
    return []


def _label(name: str, scores: "dict[str, float]") -> str:
    return " ".join([name, *(f"{key} {value:.2f}" for key, value in scores.items())])


class CompareTab:
    """Builds the tab into the Blocks that are open, and answers its events."""

    def __init__(self, engine: "Engine", desk: "Desk") -> None:
        self.engine, self.desk = engine, desk
        self._drawings: dict[str, Drawing[Compared]] = {}

    def build(self, page: gr.Blocks) -> None:
        """Lay the tab out and wire it."""
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                self._fields()
            with gr.Column(scale=7, min_width=320):
                hint = "The same prompt and the same seeds with each of them: what differs is what they learned."
                self._status = gr.HTML(bar(-1, hint), elem_classes="status", elem_id="compare-status", padding=False)
                self._sheet = gr.Image(
                    show_label=False, interactive=False, format="png", elem_id="sheet", buttons=["download", "fullscreen"],
                    visible=False,
                )  # fmt: skip
                self._table = gr.HTML("", elem_classes="report", elem_id="compare-scores", padding=False)
        self._wire(page)
        self._endpoints()

    def _fields(self) -> None:
        with gr.Accordion("Deltas side by side", open=True):
            self._prompt = gr.Textbox(label="Prompt", lines=2, max_length=4000, elem_id="compare-prompt")
            self._names = gr.Dropdown(
                [], multiselect=True, max_choices=MOST, label="Deltas", info="The base alone comes with them.",
                interactive=True, elem_id="compare-deltas",
            )  # fmt: skip
            with gr.Row():
                self._seed = gr.Number(1, label="First seed", precision=0, minimum=0, interactive=True)
                self._seeds = gr.Slider(1, SEEDS, 3, step=1, label="Seeds", interactive=True, elem_id="compare-seeds")
            self._steps = gr.Slider(1, 100, 25, step=1, label="Steps", interactive=True, elem_id="compare-steps")
            with gr.Row():
                self._go = gr.Button("Compare", variant="primary", scale=3, elem_id="compare")
                self._halt = gr.Button("Stop", scale=1, interactive=False, elem_id="compare-stop")
        with gr.Accordion("How one training went on", open=True):
            self._run = gr.Dropdown([], label="Training", interactive=True, info="Its previews by step.", elem_id="compare-run")
            self._show = gr.Button("Show", size="sm", elem_id="compare-show")

    def _wire(self, page: gr.Blocks) -> None:
        work: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": 4}
        out = [self._status, self._sheet, self._table, self._go, self._halt]
        fields = [self._prompt, self._names, self._seed, self._seeds, self._steps]
        self._go.click(self._compare, fields, out, concurrency_id="drawing", **work)
        self._show.click(self._previews, self._run, out, **work)
        self._halt.click(self._stop, None, None, **QUIET)
        for event in (page.load, self._names.focus, self._run.focus):
            event(self._choices, None, [self._names, self._run], **QUIET)

    def _endpoints(self) -> None:
        def compare(prompt: str, deltas: list[str], seeds: int, settings: dict[str, Any]) -> dict[str, Any]:
            """Draw a prompt with each delta and without any, from the same seeds; the sheet's file, and scores by row."""
            found = compare_deltas(self.engine, asked(prompt, {}, settings), deltas, seeds)
            return {"sheet": str(found.sheet), "scores": found.scores}

        def previews(run: str) -> dict[str, Any]:
            """Put the previews of one training side by side; the sheet's file, and scores by step."""
            found = compare_steps(self.engine, self.desk, run)
            return {"sheet": str(found.sheet), "scores": found.scores}

        gr.api(friendly(compare), api_name="compare", concurrency_id="drawing", concurrency_limit=4)
        gr.api(friendly(previews), api_name="compare_steps", concurrency_limit=2)

    def _choices(self) -> tuple[Any, Any]:
        names = [found.name for found in self.engine.deltas(fresh=False)]
        return gr.update(choices=names), gr.update(choices=runs_of(self.desk))

    def _compare(
        self, prompt: str, names: list[str], seed: float, seeds: float, steps: float, request: gr.Request
    ) -> Iterator[Any]:
        def work(step: Stepping) -> Compared:
            stack = Stack(prompt=prompt or "", seed=int(seed or 0), steps=int(steps))
            return compare_deltas(self.engine, stack, names or [], int(seeds), step)

        yield from self._worked(work, request)

    def _previews(self, run: str | None, request: gr.Request) -> Iterator[Any]:
        yield from self._worked(lambda _: compare_steps(self.engine, self.desk, run or ""), request)

    def _worked(self, work: Callable[[Stepping], Compared], request: gr.Request) -> Iterator[Any]:
        session = request.session_hash or ""
        yield bar(0, "Getting ready"), gr.skip(), gr.skip(), gr.update(interactive=False), gr.update(interactive=True)
        drawing = self._drawings[session] = Drawing(work)
        for event in drawing:
            yield bar(event.fraction, event.line), *[gr.skip()] * 4
        self._drawings.pop(session, None)
        rest = gr.update(interactive=True), gr.update(interactive=False)
        if drawing.error is not None or drawing.result is None:
            yield bar(-1, "Nothing was drawn."), gr.skip(), gr.skip(), *rest
            error = drawing.error or ConfigError("nothing was drawn")
            known = isinstance(error, VgmError)
            raise gr.Error(escape(explain(error)), duration=12, print_exception=not known)
        said = "Stopped; what was drawn so far." if drawing.stopped else "Done. The sheet is kept among the pictures."
        sheet = gr.update(value=str(drawing.result.sheet), visible=True)
        yield bar(-1, said), sheet, _scores(drawing.result.scores), *rest

    def _stop(self, request: gr.Request) -> None:
        drawing = self._drawings.get(request.session_hash or "")
        if drawing is not None:
            drawing.stop()


def _scores(scores: dict[str, dict[str, float]]) -> str:
    """The scores as a table; nothing where there are none."""
    names = list(dict.fromkeys(key for row in scores.values() for key in row))
    if not names:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in ["", *names])
    rows = "".join(
        f"<tr><td>{escape(row)}</td>"
        + "".join(f"<td>{told[n]:.3f}</td>" if n in told else "<td>–</td>" for n in names)
        + "</tr>"
        for row, told in scores.items()
    )
    return f"<table><tr>{head}</tr>{rows}</table><p>0 .. 1, read by the oracles of the embedded base; more is better.</p>"
