"""The *Train* tab: drop pictures, say what they show, start; the result joins the deltas of *Create*."""

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from vgm_peft.errors import VgmError
from vgm_peft.studio.create import CreateTab
from vgm_peft.studio.jobs import ALLOWED, Desk, State, Wish
from vgm_peft.studio.look import bar, clock

if TYPE_CHECKING:
    from PIL import Image


class TrainTab:
    """Builds the tab into the Blocks that are open, and answers its events."""

    def __init__(self, desk: Desk, create: CreateTab) -> None:
        self.desk, self.create = desk, create

    def build(self) -> None:
        """Lay the tab out and wire it. A timer reads how the training stands, so that a reloaded page sees it too."""
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=340):
                files = gr.File(
                    label="Pictures of one subject (three to twenty)",
                    file_count="multiple",
                    type="filepath",
                    file_types=[".png", ".jpg", ".jpeg", ".webp", ".bmp"],
                    height=180,
                    elem_id="uploads",
                )
                shown = gr.Gallery(
                    elem_id="uploaded", show_label=False, columns=6, height=120, object_fit="cover", visible=False, buttons=[]
                )
                with gr.Row():
                    name = gr.Textbox(
                        "my-subject", label="Name", max_length=40, info="What the new delta is called.", elem_id="train-name"
                    )
                    kind = gr.Textbox(label="What it is", value="a toy", max_length=200, info="Its class, as in “a robot”.")
                with gr.Row():
                    token = gr.Textbox(label="Word for it", value="sks", max_length=40, info="Write “a sks robot” to draw it.")
                    steps = gr.Slider(1, 2000, 200, step=1, label="Steps", elem_id="train-steps", info="More learns it closer.")
                with gr.Accordion("Go on in spite of", open=False):
                    allow = gr.CheckboxGroup(
                        [(f"{kind}: {instead}", kind) for kind, instead in ALLOWED.items()],
                        show_label=False,
                        elem_id="train-allow",
                    )
                with gr.Row():
                    self._go = gr.Button("Train", variant="primary", scale=3, elem_id="train")
                    self._halt = gr.Button("Stop and keep", scale=1, interactive=False, elem_id="train-stop")
            with gr.Column(scale=6, min_width=340):
                begin = bar(-1, "Drop pictures to begin.")
                self._status = gr.HTML(begin, elem_classes="status", elem_id="train-status", padding=False)
                self._previews = gr.Gallery(
                    show_label=False,
                    columns=4,
                    height=420,
                    object_fit="contain",
                    interactive=False,
                    buttons=[],
                    elem_id="previews",
                )
                with gr.Accordion("Log", open=False):
                    self._log = gr.Textbox(show_label=False, lines=8, max_lines=16, interactive=False, elem_id="log")
        self._wire()
        files.change(self._show, files, shown, show_progress="hidden", api_visibility="private")
        self._go.click(
            self._start, [files, name, kind, token, steps, allow], self._status, show_progress="hidden", api_name="train"
        )

    def _wire(self) -> None:
        """Let a timer bring the page up to date, and the button stop the training."""
        seen, timer = gr.State(""), gr.Timer(1.0)
        outputs = [self._status, self._previews, self._log, self._go, self._halt, self.create.chosen, seen]
        quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        timer.tick(self._tick, seen, outputs, **quiet)
        self._halt.click(self.desk.stop, None, None, **quiet)

    def _show(self, files: list[str] | None) -> Any:
        """Show what was dropped, or say at once which file is no picture."""
        from vgm_peft.stack.controls import read_picture

        try:
            pictures = [read_picture(Path(file)) for file in (files or [])[: self.desk.settings.upload_count]]
        except VgmError as error:
            raise gr.Error(escape(str(error)), duration=12, print_exception=False) from None
        return gr.Gallery(value=[_small(p) for p in pictures], visible=bool(pictures))

    def _start(self, files: list[str] | None, name: str, kind: str, token: str, steps: float, allow: list[str]) -> str:
        """Start training on uploaded pictures; returns the status line."""
        try:
            wish = Wish(name=name, class_prompt=kind, steps=int(steps), token=token, allow=tuple(allow))
            self.desk.start(wish, list(files or []))
        except VgmError as error:
            raise gr.Error(escape(str(error)), duration=12, print_exception=False) from None
        return bar(0, "Getting ready")

    def _tick(self, seen: str) -> tuple[Any, ...]:
        """Bring the page up to date, touching only what changed since `seen`."""
        names = self.create.names()
        state = None if self.desk.job is None else self.desk.job.state()
        now = f"{state and (state.step, state.message, state.previews, state.running)}|{names}"
        if now == seen:
            return (*[gr.skip()] * 6, seen)
        chosen = gr.Dropdown(choices=names)
        if state is None:
            return (*[gr.skip()] * 5, chosen, now)
        previews = [(str(path), _caption(path)) for path in state.previews]
        buttons = gr.Button(interactive=not state.running), gr.Button(interactive=state.running)
        return _line(state), previews, state.log, *buttons, chosen, now


def _line(state: State) -> str:
    parts = [f"{state.name}: {state.message}"]
    if state.running and state.loss is not None:
        parts.append(f"loss {state.loss:.4f}")
    if state.running and state.seconds_left is not None:
        parts.append(f"{clock(state.seconds_left)} left")
    return bar(state.step / state.steps if state.running or state.step == state.steps else -1, " · ".join(parts))


def _caption(path: Path) -> str:
    """`step-000100-0` -> `step 100`."""
    step = path.stem.split("-")[1:2]
    return f"step {int(step[0])}" if step and step[0].isdigit() else path.stem


def _small(picture: "Image.Image") -> "Image.Image":
    picture.thumbnail((256, 256))
    return picture
