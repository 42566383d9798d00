"""The panel of a picture to begin from: drawn anew as a whole, or only where it is painted over."""

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from vgm_peft.config import Table
from vgm_peft.errors import VgmError
from vgm_peft.stack.controls import read_picture
from vgm_peft.stack.recipe import Stack
from vgm_peft.studio.inputs import picture_field, small_url
from vgm_peft.studio.shelf import Shelf
from vgm_peft.studio.sketch import EMPTY, canvas, painted, read_shape, scene
from vgm_peft.studio.stack_panel import ASKED, QUIET, Values


class BeginPanel:
    """Builds the panel into the Blocks that are open."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    def build(self) -> None:
        """Lay it out and wire it."""
        self.image = gr.State("")
        file = picture_field("Picture to begin from", "begin-picture")
        with gr.Column(visible=False) as self.painting:
            self.change = gr.Slider(
                0.05, 1, 0.75, step=0.05, label="Change", interactive=True, elem_id="change",
                info="How much is drawn anew: little keeps the picture, 1 keeps hardly anything.",
            )  # fmt: skip
            gr.HTML("Paint over what is to be drawn anew. Without paint it is all of it.", elem_classes="hint")
            self.sketch = canvas("brush", elem_id="paint-sketch")
            leave = gr.Button("Begin without a picture", size="sm", elem_id="begin-without")
        shown = [self.image, self.painting, self.sketch]
        file.upload(self._given, file, shown, **ASKED)
        file.clear(self._none, None, shown, **QUIET)
        leave.click(lambda: (None, *self._none()), None, [file, *shown], **QUIET)

    def table(self, values: Values) -> Table:
        """What the panel says, as keys of a stack. Raises `DataError` for what is no picture."""
        if not values[self.image]:
            return {}
        from PIL.Image import Resampling

        shape = read_shape(values[self.sketch])
        table: Table = {"image": values[self.image], "change": float(values[self.change])}
        if shape.mask is not None:
            size = read_picture(self.shelf.picture(values[self.image])).size
            table["paint"] = self.shelf.keep(shape.mask.resize(size, Resampling.NEAREST))
        return table

    def shown(self, stack: Stack) -> dict[Any, Any]:
        """The updates that show the picture that a stack begins from, and what is painted over in it."""
        name, painting, sketch = self._told(stack.image) if stack.image else self._none()
        if stack.paint:
            sketch["value"] = painted(read_picture(self.shelf.picture(stack.paint)))
        return {self.image: name, self.change: stack.change, self.painting: painting, self.sketch: sketch}

    def _given(self, file: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
        try:
            return self._told(self.shelf.keep(read_picture(Path(file))))
        except VgmError as error:
            raise gr.Error(escape(str(error)), duration=12, print_exception=False) from None

    def _told(self, name: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
        backdrop = small_url(read_picture(self.shelf.picture(name)), 512)
        return name, gr.update(visible=True), gr.update(value=EMPTY, scene=scene("brush", backdrop=backdrop))

    def _none(self) -> tuple[str, dict[str, Any], dict[str, Any]]:
        return "", gr.update(visible=False), gr.update(value=EMPTY, scene=scene("brush"))
