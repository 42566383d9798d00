"""The *Create* tab: a prompt, deltas of the library with their strengths, one control network, pictures."""

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from vgm_peft.errors import VgmError
from vgm_peft.stack.recipe import SCHEDULERS, Stack, parse_size
from vgm_peft.studio.engine import Drawn, Engine
from vgm_peft.studio.look import bar, clock

if TYPE_CHECKING:
    from PIL import Image

    from vgm_peft.stack.sampling import Progress

NONE = "none"
PREVIEW_EVERY = 0.7
"""Seconds between two previews, so that decoding them never costs more than the drawing."""


@dataclass(frozen=True)
class Event:
    """What a drawing says while it goes: how far it is, and at times a preview."""

    fraction: float
    line: str
    preview: "Image.Image | None" = None


class Drawing:
    """One drawing in a thread of its own: iterate over its events, then take the result; `stop` ends it early."""

    def __init__(self, work: "Callable[[Callable[[Progress], bool]], list[Drawn]]") -> None:
        self.result: list[Drawn] = []
        self.error: Exception | None = None
        self.stopped = False
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._work, self._begun, self._previewed = work, 0.0, 0.0
        threading.Thread(target=self._run, name="drawing", daemon=True).start()

    def stop(self) -> None:
        """End it at the next step."""
        self.stopped = True

    def __iter__(self) -> Iterator[Event]:
        while (event := self._events.get()) is not None:
            yield event

    def _run(self) -> None:
        try:
            self.result = self._work(self._step)
        except Exception as error:
            self.error = error
        finally:
            self._events.put(None)

    def _step(self, progress: "Progress") -> bool:
        now = time.monotonic()
        self._begun = self._begun or now
        spent, share = now - self._begun, progress.fraction
        left = f" · {clock(spent / share * (1 - share))} left" if spent > 1 and share < 1 else ""
        several = f"Picture {progress.picture} of {progress.pictures} · " if progress.pictures > 1 else ""
        preview = None
        if now - self._previewed > PREVIEW_EVERY and progress.step < progress.steps:
            preview = progress.preview()
            self._previewed = time.monotonic()
        self._events.put(Event(share, f"{several}step {progress.step} of {progress.steps}{left}", preview))
        return not self.stopped


class CreateTab:
    """Builds the tab into the Blocks that are open, and answers its events."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._drawings: dict[str, Drawing] = {}

    def build(self, page: gr.Blocks) -> None:
        """Lay the tab out and wire it."""
        self._told = gr.State(list[str]())
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=340):
                self._wishes(page)
            with gr.Column(scale=6, min_width=340):
                self._results()
        self._halt.click(self._stop, None, None, queue=False, api_visibility="private")

    def _wishes(self, page: gr.Blocks) -> None:
        """The left side: what to draw."""
        prompt = gr.Textbox(
            label="Prompt", lines=3, max_lines=8, max_length=4000, placeholder="What the picture shows", autofocus=True
        )
        negative = gr.Textbox(label="Without", max_length=4000, placeholder="What it should not show (optional)")
        with gr.Row():
            self.go = gr.Button("Draw", variant="primary", scale=3, elem_id="draw")
            self._halt = gr.Button("Stop", scale=1, elem_id="stop", interactive=False)
        self.chosen = gr.Dropdown(
            self.names(),
            value=[],
            multiselect=True,
            label="Deltas",
            info="What was trained, to be put on the base.",
            elem_id="deltas",
        )
        self._strengths(page)
        control = self._control()
        self._inputs = [prompt, negative, *self._settings(), *control]

    def _results(self) -> None:
        """The right side: how far it is, the pictures, and what they say of themselves."""
        self.status = gr.HTML(bar(-1, "Ctrl-Enter draws."), elem_classes="status", elem_id="status", padding=False)
        self.gallery = gr.Gallery(
            show_label=False,
            columns=2,
            height=640,
            object_fit="contain",
            interactive=False,
            format="png",
            buttons=["download", "fullscreen"],
            elem_id="gallery",
        )
        details = gr.Textbox(
            label="What is written in the picture",
            placeholder="Choose a picture to see how it was made. The file carries it too.",
            lines=4,
            max_lines=8,
            interactive=False,
            buttons=["copy"],
            elem_id="details",
        )
        self.gallery.select(self._details, self._told, details, queue=False, show_progress="hidden", api_visibility="private")

    def names(self) -> list[str]:
        """The deltas to choose from."""
        return [found.name for found in self.engine.deltas(fresh=False)]

    def _control(self) -> list[gr.components.Component]:
        names = [found.name for found in self.engine.networks()]
        # `interactive` is said everywhere: gradio shows as fixed what only a rendered button reads.
        with gr.Accordion("Control", open=False, elem_id="control"):
            if not names:
                gr.HTML(
                    "No control network in the library yet: <code>vgm-train controlnet</code> trains one.", elem_classes="hint"
                )
            shown = bool(names)
            network = gr.Dropdown(
                [NONE, *names], value=NONE, label="Network", interactive=True, visible=shown, elem_id="network"
            )
            image = gr.Image(type="filepath", label="Control picture", height=220, interactive=True, visible=shown)
            strength = gr.Slider(0, 2, 1, step=0.05, label="Strength", interactive=True, visible=shown)
        return [network, image, strength]

    def _settings(self) -> list[gr.components.Component]:
        samplers = [(label, name) for name, (_, label) in SCHEDULERS.items()]
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            with gr.Row():
                steps = gr.Slider(
                    1, 100, 25, step=1, label="Steps", interactive=True, info="More take longer.", elem_id="steps"
                )
                guidance = gr.Slider(
                    0, 20, 0, step=0.5, label="Guidance", interactive=True, info="0: as suits the base. More: stricter."
                )
            with gr.Row():
                seed = gr.Number(
                    -1, label="Seed", precision=0, minimum=-1, interactive=True, info="-1: a new one.", elem_id="seed"
                )
                count = gr.Slider(1, 8, 2, step=1, label="Pictures", interactive=True, info="One seed after another.")
            with gr.Row():
                size = gr.Textbox("", label="Size", placeholder="like 768x512", max_length=11, interactive=True)
                sampler = gr.Dropdown(samplers, value="dpmpp", label="Sampler", interactive=True)
        return [steps, guidance, seed, count, size, sampler]

    def _strengths(self, page: gr.Blocks) -> None:
        """Draw a slider for every chosen delta, and let the button read whatever sliders there are."""
        known = gr.State(dict[str, float]())

        @gr.render(inputs=[self.chosen, known], triggers=[self.chosen.change, page.load])
        def strengths(names: list[str] | None, before: dict[str, float]) -> None:
            names = names or []
            sliders = [
                gr.Slider(-1, 2, before.get(name, 1.0), step=0.05, label=name, interactive=True, key=f"strength {name}")
                for name in names
            ]
            quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
            for name, slider in zip(names, sliders, strict=True):
                slider.change(_remembering(name), [slider, known], known, **quiet)

            def draw(request: gr.Request, *values: Any) -> Iterator[Any]:
                fixed = len(self._inputs)
                pairs = {name: float(value) for name, value in zip(names, values[fixed:], strict=True)}
                yield from self._draw(request.session_hash or "", values[:fixed], pairs)

            self.go.click(
                draw,
                [*self._inputs, *sliders],
                [self.gallery, self.status, self._told, self.go, self._halt],
                show_progress="hidden",
                concurrency_id="drawing",
                concurrency_limit=4,
                api_visibility="private",
            )

    def _draw(self, session: str, values: tuple[Any, ...], strengths: dict[str, float]) -> Iterator[Any]:
        """Draw, telling the page how far it is: gallery, status, details of every picture, the two buttons."""
        running = (gr.Button(interactive=False), gr.Button(interactive=True))
        resting = (gr.Button(interactive=True), gr.Button(interactive=False))
        yield gr.skip(), bar(0, "Getting ready"), gr.skip(), *running
        try:
            stack = described(*values[:8])
            control = chosen_control(*values[8:])
        except VgmError as error:
            yield gr.skip(), bar(-1, "Nothing was drawn."), gr.skip(), *resting
            raise gr.Error(escape(str(error)), duration=12, print_exception=False) from None
        drawing = self._drawings[session] = Drawing(lambda step: self.engine.draw(stack, strengths, control, step))
        for event in drawing:
            shown = gr.skip() if event.preview is None else [event.preview]
            yield shown, bar(event.fraction, event.line), gr.skip(), *running
        self._drawings.pop(session, None)
        if drawing.error is not None:
            yield gr.skip(), bar(-1, "Nothing was drawn."), gr.skip(), *resting
            known = isinstance(drawing.error, VgmError)
            raise gr.Error(escape(explain(drawing.error)), duration=12, print_exception=not known) from drawing.error
        said = "Stopped." if drawing.stopped else f"{len(drawing.result)} drawn, seed {stack.seed}."
        said = " ".join([said, *(f"Note: {text}." for drawn in drawing.result[:1] for text in drawn.notices)])
        pictures = [str(d.path) for d in drawing.result]
        yield pictures, bar(-1, said), [d.parameters for d in drawing.result], *resting

    def _stop(self, request: gr.Request) -> None:
        drawing = self._drawings.get(request.session_hash or "")
        if drawing is not None:
            drawing.stop()

    def _details(self, event: gr.SelectData, told: list[str]) -> str:
        index = event.index
        return told[index] if isinstance(index, int) and index < len(told) else ""


def _remembering(name: str) -> Callable[[float, dict[str, float]], dict[str, float]]:
    """Keep a slider's value: choosing another delta draws all the sliders anew."""

    def remember(value: float, strengths: dict[str, float]) -> dict[str, float]:
        return {**strengths, name: value}

    return remember


def described(
    prompt: str, negative: str, steps: float, guidance: float, seed: float | None, count: float, size: str, sampler: str
) -> Stack:
    """Turn the page's fields into a stack; a seed of -1 (or none) becomes a random one. Raises `ConfigError`."""
    width, height = parse_size(size) if (size or "").strip() else (None, None)
    chosen = random.SystemRandom().randrange(2**32) if seed is None or seed < 0 else int(seed)
    return Stack(
        prompt=prompt or "", negative=negative or "", steps=int(steps), guidance=float(guidance) or None, seed=chosen,
        count=int(count), width=width, height=height, scheduler=sampler,
    )  # fmt: skip


def chosen_control(network: str | None, image: str | None, strength: float) -> tuple[str, Path, float] | None:
    """Turn the control panel's fields into what the engine takes. Raises `ConfigError` for a network without a picture."""
    from vgm_peft.errors import ConfigError

    if not network or network == NONE:
        return None
    if not image:
        raise ConfigError("the control network has no picture", fix="drop one into the field Control picture")
    return network, Path(image), float(strength)


def explain(error: Exception) -> str:
    """One line for the page: our own errors as they are, running out of memory with its cures, the rest by its kind."""
    text = str(error)
    if isinstance(error, VgmError):
        return text
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        return "Out of memory. Draw fewer pictures at once, choose a smaller size, or close other programs."
    return f"{type(error).__name__}: {text[:300]}"
