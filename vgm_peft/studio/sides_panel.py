"""The panel of side networks: control pictures and image prompts, each with its network, strength and span of the steps."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from vgm_peft.errors import ConfigError, VgmError
from vgm_peft.stack.uses import ControlUse
from vgm_peft.studio.inputs import picture_field, small_url
from vgm_peft.studio.rows import Field, read_rows, row_list
from vgm_peft.studio.shelf import Shelf
from vgm_peft.studio.stack_panel import ASKED, SPAN, Values

if TYPE_CHECKING:
    from PIL import Image

AS_IT_IS = ""
LAYERS = Field(
    key="layers", label="Heard by", type="choice", info="Of an image prompt (IP-Adapter): all of it, its style or its layout.",
    choices=(("all layers", ""), ("style", "style"), ("layout", "layout"), ("style and layout", "style+layout")),
)  # fmt: skip
STRENGTH = Field(key="strength", label="Strength", min=0.0, max=2.0, info="1: as trained. 0: not heard.")


@dataclass(frozen=True, kw_only=True)
class ControlRow:
    """A side network of the panel, with its picture."""

    name: str
    on: bool = True
    more: bool = False
    image: str = ""
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    layers: str = ""
    mask: str = ""
    guess: bool = False
    thumb: str = ""
    kind: str = ""

    def use(self) -> ControlUse:
        """The row as a stack says it."""
        return ControlUse(
            network=self.name, image=self.image, strength=self.strength, start=self.start, end=max(self.start, self.end),
            layers=self.layers, mask=self.mask, guess=self.guess,
        )  # fmt: skip


class SidesPanel:
    """Builds the panel into the Blocks that are open."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    def build(self) -> None:
        """Lay it out and wire it."""
        self.rows = row_list(
            empty="None yet. Networks are in the library; vgm-train controlnet trains one.",
            main=STRENGTH,
            more=(*SPAN, LAYERS),
            elem_id="controls",
        )
        self.network = gr.Dropdown(
            [], value=None, label="Network", interactive=True, elem_id="network",
            info="What reads the picture: edges, depth, poses, or its look (IP-Adapter).",
        )  # fmt: skip
        with gr.Row():
            image = picture_field("Picture", "control-picture")
            made = gr.Image(
                label="What the network will see", height=180, interactive=False, visible=False, elem_id="control-preview",
                buttons=[],
            )  # fmt: skip
        annotator = gr.Dropdown(
            annotators(), value=AS_IT_IS, label="Made from the picture", interactive=True, elem_id="annotator",
            info="What is computed from the picture first; as it is, if it is a control picture already.",
        )  # fmt: skip
        add = gr.Button("Add control", size="sm", elem_id="add-control")
        slow: dict[str, Any] = {**ASKED, "concurrency_limit": 2}
        for event in (image.upload, image.clear, annotator.input):
            event(self._preview, [image, annotator], made, **slow)
        add.click(self._add, [self.network, image, annotator, self.rows], [self.rows, image, made], **ASKED)

    def uses(self, values: Values) -> tuple[ControlUse, ...]:
        """The networks that are switched on, as a stack says them. Raises `ConfigError`."""
        return tuple(row.use() for row in read_rows(ControlRow, values[self.rows]) if row.on)

    def shown(self, uses: Sequence[ControlUse]) -> Any:
        """The update that shows the side networks of a stack."""
        return gr.update(value=[asdict(self._row(use)) for use in uses])

    def choices(self) -> Any:
        """The update that lists the networks there are now."""
        found = self.shelf.networks(fresh=False)
        return gr.update(choices=[(f"{network.name} · {network.kind}", network.name) for network in found])

    def _preview(self, image: str | None, annotator: str) -> Any:
        if not image:
            return gr.update(value=None, visible=False)
        try:
            return gr.update(value=annotated(Path(image), annotator), visible=True)
        except VgmError as error:
            raise gr.Error(escape(str(error)), duration=12, print_exception=False) from None

    def _add(self, network: str | None, image: str | None, annotator: str, value: list[Any]) -> tuple[Any, Any, Any]:
        try:
            if not network:
                raise ConfigError("no network is chosen", fix="choose one above; vgm-train controlnet trains one")
            if not image:
                raise ConfigError("the network has no picture", fix="drop one into the field Picture")
            row = self._row(ControlUse(network=network, image=self.shelf.keep(annotated(Path(image), annotator))))
        except VgmError as error:
            raise gr.Error(escape(str(error)), duration=12, print_exception=False) from None
        return [*(value or []), asdict(row)], None, gr.update(value=None, visible=False)

    def _row(self, use: ControlUse) -> ControlRow:
        from vgm_peft.stack.controls import read_picture

        kinds = {network.name: network.kind for network in self.shelf.networks(fresh=False)}
        picture = read_picture(self.shelf.picture(use.image))
        return ControlRow(
            name=use.network, image=use.image, strength=use.strength, start=use.start, end=use.end, layers=use.layers,
            mask=use.mask, guess=use.guess, thumb=small_url(picture, 64), kind=kinds.get(use.network, ""),
        )  # fmt: skip


def annotators() -> list[tuple[str, str]]:
    """The annotators that can be used here, and what they make."""
    from vgm_peft.annotate import learned, plain

    names = [*plain.TABLE, *(learned.TABLE if importlib.util.find_spec(learned.PACKAGE) else ())]
    return [("the picture as it is", AS_IT_IS), *((LABELS.get(name, name), name) for name in names)]


LABELS: Mapping[str, str] = {
    "canny": "edges (canny)",
    "softedge": "soft edges",
    "scribble": "a scribble",
    "colour": "patches of colour",
    "grey": "grey, without colour",
    "tile": "coarse tiles",
    "lineart-standard": "line art",
}


def annotated(path: Path, annotator: str) -> "Image.Image":
    """Read a picture and compute from it what an annotator makes, if one is named. Raises `ConfigError` or `DataError`."""
    import numpy as np
    from PIL import Image

    from vgm_peft.annotate import open_annotator
    from vgm_peft.stack.controls import read_picture

    picture = read_picture(path)
    return Image.fromarray(open_annotator(annotator)(np.array(picture))) if annotator else picture
