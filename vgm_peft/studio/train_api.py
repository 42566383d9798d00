"""What programs may ask of trainings, by `gradio_client`: named endpoints for all that the tab does."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import gradio as gr

from vgm_peft.config import build
from vgm_peft.errors import ConfigError
from vgm_peft.studio.draw_api import friendly
from vgm_peft.studio.jobs import Desk
from vgm_peft.studio.preflight import preflight
from vgm_peft.studio.tickets import State
from vgm_peft.studio.wishes import Wish

if TYPE_CHECKING:
    from vgm_peft.studio.engine import Engine

Told = dict[str, str | int | float | bool | None]


def endpoints(desk: Desk, engine: "Engine") -> None:
    """Name them, in the Blocks that are open."""

    def train(files: list[dict[str, Any]], wish: dict[str, Any]) -> Told:
        """Queue a training on uploaded pictures; `wish` has name, class_prompt, steps, and token, task, method, preset ..."""
        return told_of(desk.state(desk.start(build(Wish, wish), uploaded(files)).number))

    def check(files: list[dict[str, Any]], wish: dict[str, Any]) -> dict[str, Any]:
        """Say what pictures and settings come to, and begin nothing."""
        return vars(preflight(build(Wish, wish), uploaded(files), desk, engine.loaded or engine.base()))

    def trainings() -> list[Told]:
        """How the trainings stand that run or wait, and the newest of the others: oldest first."""
        return [told_of(state) for state in desk.states()]

    def training(number: int = 0) -> Told:
        """How one training stands; 0 is the newest."""
        states = desk.states() if not number else []
        if not number and not states:
            return {"running": False, "message": "No training yet."}
        return told_of(desk.state(number) if number else states[-1])

    gr.api(friendly(train), api_name="train", concurrency_limit=2)
    gr.api(friendly(check), api_name="preflight", concurrency_limit=2)
    gr.api(friendly(trainings), api_name="trainings", queue=False)
    gr.api(friendly(training), api_name="training", queue=False)
    for name, act in (("stop_training", desk.stop), ("go_on_training", desk.go_on), ("forget_training", desk.remove)):
        gr.api(friendly(_acting(act)), api_name=name, queue=False)


def _acting(act: Callable[[int], None]) -> Callable[[int], bool]:
    def acting(number: int) -> bool:
        """Act on the training of a number; true when that was done."""
        act(number)
        return True

    return acting


def told_of(state: State) -> Told:
    """A state without places on this machine."""
    return {
        "number": state.number,
        "name": state.name,
        "status": state.status,
        "running": state.running,
        "step": state.step,
        "steps": state.steps,
        "loss": state.loss,
        "message": state.message,
    }


def uploaded(files: Sequence[Mapping[str, Any]]) -> list[str]:
    """The places of uploaded files. Raises `ConfigError` for whatever is none, such as a path of this machine."""
    from gradio.utils import get_upload_folder

    root, out = Path(get_upload_folder()).resolve(), list[str]()
    for file in cast("Sequence[object]", files):
        path = cast("Mapping[str, object]", file).get("path") if isinstance(file, Mapping) else None
        if not isinstance(path, str) or not Path(path).resolve().is_relative_to(root):
            raise ConfigError("a file that was not uploaded", fix="send it with gradio_client.handle_file")
        out.append(path)
    return out
