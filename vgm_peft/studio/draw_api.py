"""What programs may ask of drawings (`gradio_client`): lists, pictures to keep, drawings, grids, and the stacks of pictures.

A stack here is the table of a stack file without `base`; deltas and networks go by their names in the library, pictures by
the names that `/keep` and `/history` give.
"""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import gradio as gr

from vgm_peft.errors import ConfigError, VgmError
from vgm_peft.stack.controls import read_picture
from vgm_peft.stack.recipe import Stack
from vgm_peft.studio.drawing import explain
from vgm_peft.studio.engine import Engine
from vgm_peft.studio.history import history
from vgm_peft.studio.plots import Axis, Plot, draw_plot
from vgm_peft.studio.stack_files import open_stack

P = ParamSpec("P")
R = TypeVar("R")
FIXED = ("base", "base_digest")
"""Keys of a stack that the Studio itself decides."""


def endpoints(engine: Engine) -> None:
    """Name them, into the Blocks that are open."""
    shelf = engine.shelf

    def deltas() -> list[str]:
        """The names of the deltas in the library."""
        return [found.name for found in engine.deltas()]

    def networks() -> dict[str, str]:
        """The names of the side networks in the library, and their kinds."""
        return {network.name: network.kind for network in engine.networks()}

    def keep(picture: str) -> str:
        """Keep an uploaded picture (`handle_file`) to be named in stacks; returns its name."""
        return shelf.keep(read_picture(Path(picture)))

    def draw(prompt: str, deltas: dict[str, float], settings: dict[str, Any]) -> dict[str, list[str]]:
        """Draw pictures; `deltas` are names with strengths, `settings` further keys of a stack (steps, seed, regions ...)."""
        drawn = engine.draw(asked(prompt, deltas, settings))
        return {"files": [str(d.path) for d in drawn], "parameters": [d.parameters for d in drawn]}

    def plot(prompt: str, settings: dict[str, Any], across: list[str], down: list[str]) -> str:
        """Draw a grid; `across` and `down` are a setting and its values, like ["guidance", "2, 4, 8"], or empty. The file."""
        axes = [Axis.parse(*(axis[:2] if len(axis) == 2 else ("", ""))) for axis in (across, down)]
        sheet = draw_plot(engine, asked(prompt, {}, settings), Plot(*axes))
        return str(sheet.path) if sheet else ""

    def pictures() -> list[str]:
        """The names of the pictures that were drawn, the newest first."""
        return history(engine.settings.pictures)

    def stack_of(picture: str) -> dict[str, Any]:
        """The stack that a drawn or kept picture carries, in the library's names."""
        return open_stack(shelf, shelf.picture(picture)).table()

    gr.api(friendly(deltas), api_name="deltas", queue=False)
    gr.api(friendly(networks), api_name="networks", queue=False)
    gr.api(friendly(pictures), api_name="history", queue=False)
    gr.api(friendly(stack_of), api_name="stack", queue=False)
    gr.api(friendly(draw), api_name="draw", concurrency_id="drawing", concurrency_limit=4)
    gr.api(friendly(plot), api_name="grid", concurrency_id="drawing", concurrency_limit=4)
    # A component, since gradio itself sees to it that a file given to one was uploaded and is no other of this machine.
    upload, kept = gr.File(type="filepath", visible=False), gr.Textbox(visible=False)
    upload.upload(friendly(keep), upload, kept, api_name="keep", queue=False)


def asked(prompt: str, deltas: dict[str, float], settings: dict[str, Any]) -> Stack:
    """The stack that a program asks for. Raises `ConfigError`."""
    if fixed := [key for key in FIXED if key in settings]:
        raise ConfigError(f'unknown setting "{fixed[0]}"', expected="none: a Studio draws on its own base")
    listed = settings.get("deltas", [])
    if not isinstance(listed, list):
        raise ConfigError(f"deltas = {str(listed)[:80]}", expected="a list of tables")
    brief = [{"file": name, "strength": strength} for name, strength in deltas.items()]
    return Stack.of_table({**settings, "prompt": prompt, "deltas": [*cast("list[object]", listed), *brief]})


def friendly(ask: Callable[P, R]) -> Callable[P, R]:
    """Tell a program in one line why it gets no answer."""

    @wraps(ask)
    def answer(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return ask(*args, **kwargs)
        except Exception as error:
            raise gr.Error(explain(error), print_exception=not isinstance(error, VgmError)) from None

    return answer
