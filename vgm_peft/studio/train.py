"""The *Train* tab: drop pictures, see what they and the settings come to, queue the training, watch it, go on with it."""

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from vgm_peft.errors import VgmError
from vgm_peft.studio.jobs import Desk
from vgm_peft.studio.look import bar, clock
from vgm_peft.studio.tickets import State
from vgm_peft.studio.wishes import ALLOWED, ANNOTATORS, Wish, aim_of, aims, presets

if TYPE_CHECKING:
    from PIL import Image

    from vgm_peft.studio.engine import Engine

QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
SIGNS = {"waiting": "◌", "running": "▶", "done": "✓", "stopped": "■", "interrupted": "⚠", "failed": "✕"}
NOTHING = "No training yet. Drop pictures, press Check to see what they come to, then Train."
FILES = [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".txt"]


class TrainTab:
    """Builds the tab into the Blocks that are open, and answers its events."""

    def __init__(self, desk: Desk, engine: "Engine") -> None:
        self.desk, self.engine = desk, engine

    def build(self) -> None:
        """Lay the tab out and wire it. A timer reads how things stand, so that a reloaded page sees them too."""
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self._pictures()
                fields = self._fields()
            with gr.Column(scale=6, min_width=320):
                self._watching()
        self._wire(fields)

    # --- layout

    def _pictures(self) -> None:
        self._files = gr.File(
            label="Pictures (and captions: .txt of the same name)",
            file_count="multiple",
            type="filepath",
            file_types=FILES,
            height=170,
            elem_id="uploads",
        )
        shown = gr.Gallery(
            elem_id="uploaded", show_label=False, columns=6, height=120, object_fit="cover", visible=False, buttons=[]
        )
        self._files.change(self._show, self._files, shown, show_progress="hidden", api_visibility="private")

    def _fields(self) -> list[gr.components.Component]:
        """What can be said of a training, in the order of `wished`."""
        aim, offered = aim_of("dreambooth"), self._presets("dreambooth")
        with gr.Row():
            name = gr.Textbox("my-subject", label="Name", max_length=40, info="Of the result.", elem_id="train-name")
            tasks = [(aim.label, task) for task, aim in aims().items()]
            task = gr.Dropdown(tasks, value="dreambooth", label="Task", info="What is to be learned.", elem_id="train-task")
        with gr.Row():
            text = gr.Textbox(aim.begin[0], label=aim.text, max_length=200, info=aim.hint, elem_id="train-text")
            word = gr.Textbox(
                aim.begin[1], label=aim.word, max_length=40, info="Write “a sks robot” to draw it.", elem_id="train-word"
            )
            annotator = gr.Dropdown(
                list(ANNOTATORS), value="canny", label="Control pictures", info="Computed from yours.", visible=False
            )
        steps = gr.Slider(1, 2000, _steps(offered), step=1, label="Steps", elem_id="train-steps", info="More learns it closer.")
        with gr.Accordion("Method and recipe", open=False, elem_id="train-method"):
            preset = gr.Dropdown(_choices(offered), value="", label="Recipe", info="Settings that suit this base.")
            about = gr.HTML("", elem_classes="hint", padding=False, visible=False)
            methods = [("as the recipe says", ""), *((kind, kind) for kind in _methods())]
            method = gr.Dropdown(methods, value="", label="Method", info="What kind of change is trained; LoRA is usual.")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, info="The same seed gives the same result, bit for bit.")
        with gr.Accordion("Go on in spite of", open=False):
            allow = gr.CheckboxGroup(
                [(f"{kind}: {instead}", kind) for kind, instead in ALLOWED.items()], show_label=False, elem_id="train-allow"
            )
        with gr.Row():
            self._check = gr.Button("Check", scale=1, elem_id="train-check")
            self._go = gr.Button("Train", variant="primary", scale=2, elem_id="train")
        self._report = gr.HTML("", elem_classes="report", elem_id="train-report", padding=False)
        changing = [text, word, annotator, steps, preset, about, method]
        task.change(self._task_chosen, task, changing, **QUIET)
        preset.change(self._preset_chosen, [task, preset], [about, steps], **QUIET)
        return [self._files, name, text, word, steps, allow, task, preset, method, annotator, seed]

    def _watching(self) -> None:
        """The right side: the queue, and how the chosen training stands."""
        self._list = gr.Radio([], label="Trainings", interactive=True, visible=False, elem_id="trainings", elem_classes="list")
        self._status = gr.HTML(bar(-1, NOTHING), elem_classes="status", elem_id="train-status", padding=False)
        with gr.Row(elem_classes="tight"):
            self._halt = gr.Button("Stop and keep", visible=False, elem_id="train-stop", size="sm")
            self._more = gr.Button("Go on", visible=False, variant="primary", elem_id="train-go-on", size="sm")
            self._drop = gr.Button("Forget", visible=False, elem_id="train-forget", size="sm")
        self._curve = gr.HTML("", elem_id="train-curve", padding=False)
        self._previews = gr.Gallery(
            show_label=False, columns=4, height=360, object_fit="contain", interactive=False, buttons=[], elem_id="previews",
            visible=False,
        )  # fmt: skip
        with gr.Accordion("Log", open=False):
            self._log = gr.Textbox(show_label=False, lines=8, max_lines=16, interactive=False, elem_id="log")

    # --- events

    def _wire(self, fields: list[gr.components.Component]) -> None:
        """Let a timer bring the page up to date, and the buttons act on the chosen training."""
        seen, timer = gr.State(""), gr.Timer(1.0)
        page = [self._list, self._status, self._curve, self._previews, self._log, self._halt, self._more, self._drop, seen]
        timer.tick(self._tick, [self._list, seen], page, **QUIET)
        self._list.input(self._tick, [self._list, seen], page, **QUIET)
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        self._check.click(self._checked, fields, self._report, concurrency_limit=2, **quiet)
        self._go.click(self._started, fields, [self._list, self._status], **quiet)
        acts = {self._halt: self.desk.stop, self._more: self.desk.go_on, self._drop: self.desk.remove}
        for button, act in acts.items():
            button.click(_acting(act), self._list, None, **quiet)

    def _presets(self, task: str) -> list[tuple[str, str, int | None]]:
        """Name, what it says of itself, and its steps, of the recipes for a task; none for a base that cannot be looked at."""
        settings = self.desk.settings
        try:
            return [(p.name, p.about, p.steps) for p in presets(task, settings.base, settings.recipe)]
        except VgmError:
            return []

    def _task_chosen(self, task: str) -> tuple[Any, ...]:
        aim, offered = aim_of(task), self._presets(task)
        return (
            gr.Textbox(label=aim.text, info=aim.hint),
            gr.Textbox(value=aim.begin[1], label=aim.word or "Word", visible=bool(aim.word)),
            gr.Dropdown(visible=aim.annotated),
            gr.Slider(value=_steps(offered)),
            gr.Dropdown(choices=_choices(offered), value=""),
            gr.HTML(visible=False),
            gr.Dropdown(value="", visible=task in ("dreambooth", "finetune")),
        )

    def _preset_chosen(self, task: str, preset: str) -> tuple[Any, Any]:
        for name, about, steps in self._presets(task):
            if name == preset:
                return gr.HTML(value=escape(about), visible=True), gr.Slider(value=steps) if steps else gr.skip()
        return gr.HTML(visible=False), gr.skip()

    def _show(self, files: list[str] | None) -> Any:
        """Show what was dropped, or say at once which file is no picture."""
        from vgm_peft.studio.uploads import checked

        chosen = [Path(file) for file in files or [] if not file.endswith(".txt")]
        try:
            small = [_small(checked(path)) for path in chosen[: self.desk.settings.upload_count]]
        except VgmError as error:
            raise told(error) from None
        return gr.Gallery(value=small, visible=bool(small))

    def _checked(self, *values: Any) -> str:
        """Say what the pictures and settings come to, as HTML; nothing is begun."""
        from vgm_peft.studio.preflight import preflight

        try:
            return preflight(
                wished(*values[1:]), list(values[0] or []), self.desk, self.engine.loaded or self.engine.base()
            ).html()
        except VgmError as error:
            raise told(error) from None

    def _started(self, *values: Any) -> tuple[Any, str]:
        try:
            ticket = self.desk.start(wished(*values[1:]), list(values[0] or []))
        except VgmError as error:
            raise told(error) from None
        rows = _rows(self.desk.states())
        return gr.Radio(choices=rows, value=ticket.number, visible=True), bar(0, f"{ticket.wish.name}: queued")

    def _tick(self, chosen: int | None, seen: str) -> tuple[Any, ...]:
        """Bring the page up to date, touching only what changed since `seen`."""
        self.desk.wake()
        states = self.desk.states()
        numbers, picked = [state.number for state in states], chosen
        if chosen not in numbers:
            chosen = next((s.number for s in states if s.running), numbers[-1] if numbers else None)
        now = f"{chosen}|{[(s.number, s.status, s.step, s.message, s.previews) for s in states]}"
        if now == seen:
            return (*[gr.skip()] * 8, seen)
        if chosen is None:
            return gr.Radio(visible=False), bar(-1, NOTHING), "", *[gr.skip()] * 2, *[gr.Button(visible=False)] * 3, now
        state = next(s for s in states if s.number == chosen)
        previews = gr.Gallery(value=[(str(p), _caption(p)) for p in state.previews], visible=bool(state.previews))
        buttons = (
            gr.Button("Take out of the queue" if state.status == "waiting" else "Stop and keep", visible=not state.ended),
            gr.Button(visible=state.can_go_on),
            gr.Button(visible=state.can_go_on),
        )
        # What is chosen is left alone: this answer may come after a newer choice.
        value: dict[str, Any] = {} if chosen == picked else {"value": chosen}
        rows = gr.update(choices=_rows(states), visible=True, **value)
        curve = self.desk.metrics(chosen).curve(state.steps)
        return rows, _line(state), curve, previews, state.log, *buttons, now


def wished(*fields: Any) -> Wish:
    """The page's fields (without the files) as a wish. Raises `ConfigError`."""
    name, text, word, steps, allow, task, preset, method, annotator, seed = fields
    return Wish(
        name=name or "", class_prompt=text or "", token=word or "", steps=int(steps or 0), allow=tuple(allow or ()), task=task,
        preset=preset or "", method=method or "", annotator=annotator or "canny", seed=int(seed or 0),
    )  # fmt: skip


def told(error: Exception) -> gr.Error:
    """An error for the page: escaped, since names of files and texts of strangers stand in it."""
    return gr.Error(escape(str(error)), duration=12, print_exception=not isinstance(error, VgmError))


def _acting(act: Callable[[int], None]) -> Callable[[int | None], None]:
    def acting(number: int | None) -> None:
        try:
            if number is not None:
                act(int(number))
        except VgmError as error:
            raise told(error) from None

    return acting


def _methods() -> list[str]:
    from vgm_peft.deltas import TABLE
    from vgm_peft.train.config import DeltaConfig

    usual = DeltaConfig().kind
    return sorted(TABLE, key=lambda kind: (kind != usual, kind))


def _choices(offered: list[tuple[str, str, int | None]]) -> list[tuple[str, str]]:
    return [("the usual one", ""), *((name, name) for name, _, _ in offered)]


def _steps(offered: list[tuple[str, str, int | None]]) -> int:
    """The steps of the usual recipe."""
    return min(2000, (offered[0][2] if offered else None) or 400)


def _rows(states: list[State]) -> list[tuple[str, int]]:
    """The list of trainings, the newest first."""
    return [(f"{SIGNS[s.status]} {s.name} · {_short(s)}", s.number) for s in reversed(states)]


def _short(state: State) -> str:
    if state.running and state.step:
        left = "" if state.seconds_left is None else f", {clock(state.seconds_left)} left"
        return f"step {state.step} of {state.steps}{left}"
    return {"running": "getting ready", "waiting": "waits"}.get(state.status, state.status)


def _line(state: State) -> str:
    parts = [f"{state.name}: {state.message}"]
    if state.running and state.loss is not None:
        parts.append(f"loss {state.loss:.4f}")
    if state.running and state.seconds_left is not None:
        parts.append(f"{clock(state.seconds_left)} left")
    return bar(state.step / state.steps if state.running or state.status == "done" else -1, " · ".join(parts))


def _caption(path: Path) -> str:
    """`step-000100-0` -> `step 100`."""
    step = path.stem.split("-")[1:2]
    return f"step {int(step[0])}" if step and step[0].isdigit() else path.stem


def _small(picture: "Image.Image") -> "Image.Image":
    picture.thumbnail((256, 256))
    return picture
