"""The right side of *Create*: the pictures just drawn, all those before, what is written in one, and two side by side."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from vgm_peft.errors import VgmError
from vgm_peft.stack.controls import read_picture
from vgm_peft.studio.look import bar
from vgm_peft.studio.shelf import PICTURE, Shelf
from vgm_peft.studio.stack_panel import ASKED, QUIET

MOST = 60
"""Pictures of the history that are shown; older ones stay in the folder."""
SMALL = 256
"""Pixels of the longer side of what the history shows."""
MAX_TEXT = 20_000


class HistoryPanel:
    """Builds the panel into the Blocks that are open. `picked` is the name of the picture that was chosen."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    def build(self, page: gr.Blocks) -> None:
        """Lay it out and wire it."""
        self.picked = gr.State("")
        self.names = gr.State(list[str]())
        self._old, self._pair = gr.State(list[str]()), gr.State(("", ""))
        self.status = gr.HTML(bar(-1, "Ctrl-Enter draws."), elem_classes="status", elem_id="status", padding=False)
        with gr.Tabs(elem_id="results") as self.tabs:
            with gr.Tab("Pictures", id="pictures"):
                self.gallery = gr.Gallery(
                    show_label=False, columns=2, height=560, object_fit="contain", interactive=False, format="png",
                    buttons=["download", "fullscreen"], elem_id="gallery",
                )  # fmt: skip
            with gr.Tab("History", id="history") as history:
                self._hint = gr.HTML(
                    "Nothing was drawn yet. Pictures stay here when the Studio is closed.", elem_classes="hint"
                )
                self._past = gr.Gallery(
                    show_label=False, columns=4, height=560, object_fit="cover", interactive=False, allow_preview=False,
                    buttons=[], elem_id="history", visible=False,
                )  # fmt: skip
            with gr.Tab("Side by side", id="compare"):
                self._why = gr.HTML("Choose a picture and press Compare, then another.", elem_classes="hint")
                self._slider = gr.ImageSlider(
                    show_label=False, interactive=False, type="filepath", height=560, elem_id="compare", visible=False,
                    buttons=["fullscreen"],
                )  # fmt: skip
        self._choice()
        past = [self._hint, self._past, self._old]
        page.load(self._list, None, past, **QUIET)
        history.select(self._list, None, past, **QUIET)

    def _choice(self) -> None:
        """What is written in a chosen picture, and what can be done with it."""
        details = gr.Textbox(
            label="What is written in the picture", lines=4, max_lines=8, interactive=False, buttons=["copy"],
            elem_id="details",
            placeholder="Choose a picture to see how it was made. The file carries it too.",
        )  # fmt: skip
        with gr.Row():
            self.back = gr.Button("Send back to panel", size="sm", interactive=False, elem_id="send-back")
            self.begin = gr.Button("Begin from it", size="sm", interactive=False, elem_id="begin-from")
            self._compare = gr.Button("Compare", size="sm", interactive=False, elem_id="compare-with")
        chosen = [self.picked, details, self.back, self.begin, self._compare]
        self.gallery.select(self._pick, self.names, chosen, **ASKED)
        self._past.select(self._pick, self._old, chosen, **ASKED)
        self._compare.click(self._put, [self.picked, self._pair], [self._pair, self._why, self._slider, self.tabs], **ASKED)

    def _list(self) -> tuple[Any, Any, list[str]]:
        names = history(self.shelf.settings.pictures)
        small = [str(thumbnail(self.shelf.settings.pictures, name)) for name in names]
        return gr.update(visible=not names), gr.update(value=small, visible=bool(names)), names

    def _pick(self, event: gr.SelectData, names: list[str]) -> tuple[Any, ...]:
        index = event.index
        if not isinstance(index, int) or not 0 <= index < len(names):
            return tuple(gr.skip() for _ in range(5))
        return names[index], written(self.shelf.picture(names[index])), *(gr.update(interactive=True) for _ in range(3))

    def _put(self, name: str, pair: tuple[str, str]) -> tuple[Any, ...]:
        pair = (pair[1], name)
        try:
            places = tuple(str(self.shelf.picture(each)) for each in pair if each)
        except VgmError as error:
            raise gr.Error(escape(str(error)), duration=12, print_exception=False) from None
        both = len(places) == 2
        said = " | ".join(map(escape, pair)) if both else "Now choose another picture and press Compare again."
        return pair, said, gr.update(value=places if both else None, visible=both), gr.Tabs(selected="compare")


def history(folder: Path, most: int = MOST) -> list[str]:
    """The names of the pictures of a folder, the newest first; links are none."""
    pictures = [path for path in folder.glob("*.png") if PICTURE.fullmatch(path.name) and not path.is_symlink()]
    stamps = sorted(((path.stat().st_mtime_ns, path.name) for path in pictures if path.is_file()), reverse=True)
    return [name for _, name in stamps[:most]]


def thumbnail(folder: Path, name: str) -> Path:
    """A small copy of a picture, made once; what cannot be read is shown as it is."""
    small = folder / ".small" / f"{Path(name).stem}.webp"
    if not small.exists():
        try:
            picture = read_picture(folder / name)
        except VgmError:
            return folder / name
        picture.thumbnail((SMALL, SMALL))
        small.parent.mkdir(parents=True, exist_ok=True)
        picture.save(small, "WEBP", quality=80)
    return small


def written(path: Path) -> str:
    """What a picture says of its making, for people to read."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            text = image.info.get("parameters", "")
    except (OSError, SyntaxError, ValueError):
        return ""
    return text[:MAX_TEXT] if isinstance(text, str) else ""


def shown(drawn: Sequence[Path]) -> tuple[list[str], list[str]]:
    """What the gallery shows of pictures, and their names."""
    return [str(path) for path in drawn], [path.name for path in drawn]
