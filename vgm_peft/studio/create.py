"""The *Create* tab: a prompt, deltas, regions, control pictures, a picture to begin from, and what comes of them."""

from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from gradio.blocks import Block

from vgm_peft.errors import VgmError
from vgm_peft.stack.controls import read_picture
from vgm_peft.stack.recipe import Stack
from vgm_peft.studio.begin_panel import BeginPanel
from vgm_peft.studio.drawing import Drawing, Stepping, explain
from vgm_peft.studio.engine import Drawn, Engine
from vgm_peft.studio.history import HistoryPanel, shown
from vgm_peft.studio.look import SAVE_TEXT, bar
from vgm_peft.studio.plot_panel import PlotPanel
from vgm_peft.studio.plots import draw_plot
from vgm_peft.studio.regions_panel import RegionsPanel
from vgm_peft.studio.settings_panel import SettingsPanel
from vgm_peft.studio.sides_panel import SidesPanel
from vgm_peft.studio.stack_files import open_stack, stack_text
from vgm_peft.studio.stack_panel import ASKED, QUIET, StackPanel, Values

T = TypeVar("T")
Updates = dict[Any, Any]
"""Component -> what becomes of it; the others stay as they are."""


class CreateTab:
    """Builds the tab into the Blocks that are open, and answers its events."""

    def __init__(self, engine: Engine) -> None:
        self.engine, shelf = engine, engine.shelf
        self.deltas = StackPanel(shelf)
        self.regions = RegionsPanel(shelf, self.deltas)
        self.sides, self.begin, self.settings = SidesPanel(shelf), BeginPanel(shelf), SettingsPanel()
        self.plot, self.history = PlotPanel(), HistoryPanel(shelf)
        self._drawings: dict[str, Drawing[Any]] = {}

    @property
    def chosen(self) -> gr.Dropdown:
        """The field in which deltas are chosen; its choices change when a training ends."""
        return self.deltas.chosen

    def names(self) -> list[str]:
        """The deltas to choose from."""
        return [found.name for found in self.engine.deltas(fresh=False)]

    def build(self, page: gr.Blocks) -> None:
        """Lay the tab out and wire it."""
        with gr.Row(equal_height=False, elem_classes="create"):
            with gr.Column(elem_classes="asked"):
                self._asked()
            with gr.Column(elem_classes="results"):
                self.history.build(page)
            with gr.Column(elem_classes="panels"):
                self._panels()
        self._wire(page)

    def _asked(self) -> None:
        """What is always asked for, and the buttons."""
        self.prompt = gr.Textbox(
            label="Prompt", lines=3, max_lines=8, max_length=4000, placeholder="What the picture shows", autofocus=True,
            elem_id="prompt",
        )  # fmt: skip
        self.negative = gr.Textbox(label="Without", max_length=4000, placeholder="What it should not show (optional)")
        with gr.Row():
            self.go = gr.Button("Draw", variant="primary", scale=3, elem_id="draw")
            self.halt = gr.Button("Stop", scale=1, elem_id="stop", interactive=False)

    def _panels(self) -> None:
        """All that can be asked for besides."""
        with gr.Accordion("Deltas", open=True):
            self.deltas.build()
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            self.settings.build()
        with gr.Accordion("Regions", open=False, elem_id="regions-panel"):
            self.regions.build()
        with gr.Accordion("Control pictures", open=False, elem_id="controls-panel"):
            self.sides.build()
        with gr.Accordion("Begin from a picture", open=False, elem_id="begin-panel"):
            self.begin.build()
        with gr.Accordion("Grid over two settings", open=False, elem_id="plot-panel"):
            self.plot.build(self.deltas)
        with gr.Row():
            self._save = gr.Button("Save stack", size="sm", elem_id="save-stack")
            self._open = gr.UploadButton("Open stack", size="sm", file_types=[".toml", ".png"], elem_id="open-stack")
        self._text = gr.Textbox(visible="hidden", interactive=False)

    def _wire(self, page: gr.Blocks) -> None:
        panels = (self.deltas, self.regions, self.sides)
        told: set[Block] = {self.prompt, self.negative, *(panel.rows for panel in panels), self.regions.holding}
        told |= {self.begin.image, self.begin.change, self.begin.sketch, *self.settings.fields}
        busy = [self.history.status, self.go, self.plot.go, self.halt]
        drawn = [*busy, self.history.gallery, self.history.names, self.history.tabs, self.regions.sketch]
        work: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": 4}
        self.go.click(self._draw, told, drawn, concurrency_id="drawing", **work)
        self.plot.go.click(self._plot, {*told, *self.plot.fields}, drawn, concurrency_id="drawing", **work)
        self.halt.click(self._stop, None, None, **QUIET)
        fields: list[Block] = [self.prompt, self.negative, *(panel.rows for panel in panels), self.regions.holding]
        fields += [self.begin.image, self.begin.change, self.begin.painting, self.begin.sketch, *self.settings.fields]
        self.history.back.click(self._back, self.history.picked, fields, **ASKED)
        self.history.begin.click(self._begin, self.history.picked, fields, **ASKED)
        self._open.upload(self._opened, self._open, fields, **ASKED)
        saved = self._save.click(self._saved, told, self._text, **ASKED)
        saved.success(None, self._text, None, js=SAVE_TEXT, **QUIET)
        lists = [self.deltas.chosen, self.sides.network]
        page.load(lambda: (self.deltas.choices(), self.sides.choices()), None, lists, **QUIET)

    def stack(self, values: Values) -> Stack:
        """What the page describes, in the library's names. Raises `VgmError` for what is no stack."""
        deltas, controls = self.deltas.uses(values), self.sides.uses(values)
        uses = {"deltas": deltas, "controls": controls, "regions": self.regions.regions(values)}
        text = {"prompt": values[self.prompt] or "", "negative": values[self.negative] or ""}
        regional = {"regional": values[self.regions.holding]} if uses["regions"] else {}
        return Stack.of_table({**text, **regional, **self.settings.table(values), **self.begin.table(values), **uses})

    def shown(self, stack: Stack) -> Updates:
        """The updates that show a stack in the library's names."""
        return {
            self.prompt: stack.prompt,
            self.negative: stack.negative,
            self.regions.rows: self.regions.shown(stack.regions),
            self.regions.holding: stack.regional,
            self.deltas.rows: self.deltas.shown(stack.deltas, [region.name for region in stack.regions]),
            self.sides.rows: self.sides.shown(stack.controls),
            **self.begin.shown(stack),
            **self.settings.shown(stack),
        }

    # --- drawing

    def _draw(self, values: Values, request: gr.Request) -> Iterator[Updates]:
        def work(step: Stepping) -> list[Drawn]:
            return self.engine.draw(self.stack(values), step)

        yield from self._run(request, work)

    def _plot(self, values: Values, request: gr.Request) -> Iterator[Updates]:
        def work(step: Stepping) -> list[Drawn]:
            sheet = draw_plot(self.engine, self.stack(values), self.plot.plot(values), step)
            return [] if sheet is None else [sheet]

        yield from self._run(request, work)

    def _run(self, request: gr.Request, work: Callable[[Stepping], list[Drawn]]) -> Iterator[Updates]:
        """Draw, telling the page how far it is, and show what came of it."""
        session, page = request.session_hash or "", self.history
        yield {page.status: bar(0, "Getting ready"), **self._busy(True), page.tabs: gr.Tabs(selected="pictures")}
        drawing = self._drawings[session] = Drawing(work)
        for event in drawing:
            preview = {} if event.preview is None else {page.gallery: [event.preview]}
            yield {page.status: bar(event.fraction, event.line), **preview}
        self._drawings.pop(session, None)
        if drawing.error is not None:
            yield {page.status: bar(-1, "Nothing was drawn."), **self._busy(False)}
            raise _shown(drawing.error)
        drawn = drawing.result or []
        said = ["Stopped." if drawing.stopped else f"{len(drawn)} drawn{_seed(drawn)}."]
        said += [f"Note: {text}." for each in drawn[:1] for text in each.notices]
        pictures, names = shown([each.path for each in drawn])
        updates = {page.status: bar(-1, " ".join(said)), **self._busy(False), page.gallery: pictures, page.names: names}
        if drawn:
            updates[self.regions.sketch] = self.regions.over(read_picture(drawn[-1].path))
        yield updates

    def _busy(self, busy: bool) -> Updates:
        rest, stop = gr.update(interactive=not busy), gr.update(interactive=busy)
        return {self.go: rest, self.plot.go: rest, self.halt: stop}

    def _stop(self, request: gr.Request) -> None:
        drawing = self._drawings.get(request.session_hash or "")
        if drawing is not None:
            drawing.stop()

    # --- stacks that come and go

    def _back(self, name: str) -> Updates:
        return self._told(lambda: open_stack(self.engine.shelf, self.engine.shelf.picture(name)))

    def _opened(self, file: str | None) -> Updates:
        return self._told(lambda: open_stack(self.engine.shelf, Path(file or "")))

    def _told(self, find: Callable[[], Stack]) -> Updates:
        try:
            return self.shown(find())
        except VgmError as error:
            raise _shown(error) from None

    def _begin(self, name: str) -> Updates:
        try:
            return self.begin.shown(Stack(image=name))
        except VgmError as error:
            raise _shown(error) from None

    def _saved(self, values: Values) -> str:
        try:
            return stack_text(self.engine.shelf, self.stack(values))
        except VgmError as error:
            raise _shown(error) from None


def _shown(error: Exception) -> gr.Error:
    """The error as the page shows it; only our own are expected."""
    return gr.Error(escape(explain(error)), duration=12, print_exception=not isinstance(error, VgmError))


def _seed(drawn: list[Drawn]) -> str:
    """Which seed the first picture has, by its name."""
    seed = drawn[0].path.stem.split("-")[2:3] if drawn else []
    return f", seed {seed[0]}" if seed and seed[0].isdigit() else ""
