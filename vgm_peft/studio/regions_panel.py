"""The panel of regions: parts of the picture with a prompt of their own, drawn as a box or painted."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from vgm_peft.errors import ConfigError, VgmError
from vgm_peft.stack.uses import Box, Region
from vgm_peft.studio.inputs import small_url
from vgm_peft.studio.rows import Field, read_rows, row_list
from vgm_peft.studio.shelf import Shelf
from vgm_peft.studio.sketch import EMPTY, Tool, canvas, read_shape, scene
from vgm_peft.studio.stack_panel import ASKED, QUIET, StackPanel, Values

if TYPE_CHECKING:
    from PIL import Image

TOOLS: tuple[Tool, ...] = ("box", "brush")
CORNERS = ("left", "top", "right", "bottom")
HOLDING = (("each drawn for itself and blended", "noise"), ("one drawing whose places read their own prompt", "attention"))


@dataclass(frozen=True, kw_only=True)
class RegionRow:
    """A region of the panel; its box is in shares of the picture, and has no say where there is a mask."""

    name: str
    on: bool = True
    more: bool = True
    prompt: str = ""
    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0
    mask: str = ""
    thumb: str = ""
    kind: str = ""

    def region(self) -> Region:
        """The row as a stack says it."""
        if self.mask:
            return Region(name=self.name, prompt=self.prompt, mask=self.mask)
        return Region(name=self.name, prompt=self.prompt, box=(self.left, self.top, self.right, self.bottom))


class RegionsPanel:
    """Builds the panel into the Blocks that are open."""

    def __init__(self, shelf: Shelf, deltas: StackPanel) -> None:
        self.shelf, self.deltas = shelf, deltas

    def build(self) -> None:
        """Lay it out and wire it."""
        prompt = Field(key="prompt", label="Prompt", type="text", placeholder="What is there (the prompt above, if empty)")
        corners = [
            Field(key=key, label=key.capitalize(), step=0.01, unless="mask", info="A share of the picture") for key in CORNERS
        ]
        self.rows = row_list(empty="None: the prompt is for the whole picture.", more=(prompt, *corners), elem_id="regions")
        gr.HTML("Show a place on the picture, then add it as a region.", elem_classes="hint")
        self.sketch = canvas(*TOOLS, elem_id="region-sketch")
        with gr.Row():
            name = gr.Textbox(label="Name", placeholder="like left", max_length=40, interactive=True, elem_id="region-name")
            text = gr.Textbox(
                label="What is there",
                placeholder="A prompt for this place alone",
                max_length=4000,
                interactive=True,
                elem_id="region-prompt",
            )
        add = gr.Button("Add region", size="sm", elem_id="add-region")
        self.holding = gr.Dropdown(
            HOLDING, value="noise", label="Regions are", interactive=True, elem_id="regional",
            info="How regions are held together. The first keeps them apart better and takes longer.",
        )  # fmt: skip
        add.click(
            self._add, [self.sketch, name, text, self.rows], [self.rows, self.sketch, name, text, self.deltas.rows], **ASKED
        )
        self.rows.listed(self._listed, self.rows, self.deltas.rows, **QUIET)

    def regions(self, values: Values) -> tuple[Region, ...]:
        """The regions that are switched on, as a stack says them. Raises `ConfigError`."""
        return tuple(row.region() for row in read_rows(RegionRow, values[self.rows]) if row.on)

    def shown(self, regions: Sequence[Region]) -> Any:
        """The update that shows the regions of a stack."""
        return gr.update(value=[asdict(self._row(region)) for region in regions])

    def over(self, picture: "Image.Image") -> Any:
        """The update that lets places be shown on a picture."""
        return gr.update(scene=scene(*TOOLS, backdrop=small_url(picture, 512)))

    def _add(self, said: object, name: str, prompt: str, value: object) -> tuple[Any, ...]:
        try:
            known, shape = read_rows(RegionRow, value), read_shape(said)
            if shape.box is None and shape.mask is None:
                raise ConfigError("no place was shown", fix="drag a box over the picture, or paint with the brush, then add it")
            name = name.strip() or _free({row.name for row in known})
            if any(row.name == name for row in known):
                raise ConfigError(f'there is a region "{name}" already', fix="give this one another name")
            if shape.mask is not None:
                region = Region(name=name, prompt=prompt, mask=self.shelf.keep(shape.mask))
            else:
                region = Region(name=name, prompt=prompt, box=shape.box or (0.0, 0.0, 1.0, 1.0))
        except VgmError as error:
            raise gr.Error(escape(str(error)), duration=12, print_exception=False) from None
        listed = [asdict(row) for row in (*known, self._row(region))]
        return listed, gr.update(value=EMPTY), "", "", self._listed(listed)

    def _listed(self, value: object) -> Any:
        """Let deltas choose among the regions that there are."""
        return gr.update(spec=self.deltas.spec([row.name for row in read_rows(RegionRow, value)]))

    def _row(self, region: Region) -> RegionRow:
        from vgm_peft.stack.controls import read_picture

        shape = read_picture(self.shelf.picture(region.mask)) if region.mask else _boxed(region.box)
        left, top, right, bottom = region.box
        return RegionRow(
            name=region.name, prompt=region.prompt, left=left, top=top, right=right, bottom=bottom, mask=region.mask,
            thumb=small_url(shape, 64), kind="painted" if region.mask else "box",
        )  # fmt: skip


def _free(taken: set[str]) -> str:
    """A name that is not taken."""
    number = 1
    while f"region {number}" in taken:
        number += 1
    return f"region {number}"


def _boxed(box: Box) -> "Image.Image":
    """A small picture that is white where the box is."""
    from PIL import Image

    picture = Image.new("L", (64, 64))
    picture.paste(255, (round(box[0] * 64), round(box[1] * 64), round(box[2] * 64), round(box[3] * 64)))
    return picture
