"""The panel of grids: which two settings are varied, and over what values."""

from typing import Any

import gradio as gr

from vgm_peft.studio.plots import NOTHING, SETTINGS, STRENGTH, Axis, Plot
from vgm_peft.studio.rows import read_rows
from vgm_peft.studio.stack_panel import QUIET, DeltaRow, StackPanel, Values

EXAMPLES = {
    "steps": "10, 20, 40",
    "guidance": "2, 4, 8",
    "seed": "1, 2, 3",
    "sampler": "DDIM, DPM++ 2M, Euler",
    "change": "0.3, 0.6, 0.9",
}
"""What stands in a field when its setting was chosen."""
STRENGTHS = "0, 0.5, 1"
VARIED: dict[str, Any] = {"interactive": True, "info": "What differs from one to the next."}
TAKEN: dict[str, Any] = {"label": "Their values", "max_length": 300, "interactive": True, "info": "Between commas, at most 8."}


class PlotPanel:
    """Builds the panel into the Blocks that are open. `go` is its button, `fields` what it says."""

    def build(self, deltas: StackPanel) -> None:
        """Lay it out and wire it."""
        with gr.Row():
            across = gr.Dropdown(_choices([]), value="guidance", elem_id="plot-across", label="Columns", **VARIED)
            high = gr.Textbox(EXAMPLES["guidance"], elem_id="plot-across-values", **TAKEN)
        with gr.Row():
            down = gr.Dropdown(_choices([]), value=NOTHING, elem_id="plot-down", label="Rows", **VARIED)
            low = gr.Textbox(elem_id="plot-down-values", **TAKEN)
        self.go = gr.Button("Draw grid", size="sm", elem_id="draw-grid")
        self.fields = (across, high, down, low)
        for setting, values in ((across, high), (down, low)):
            setting.focus(self._list, deltas.rows, setting, **QUIET)
            setting.input(_example, setting, values, **QUIET)

    def plot(self, values: Values) -> Plot:
        """What the panel says. Raises `ConfigError`."""
        across, high, down, low = (values[each] for each in self.fields)
        return Plot(Axis.parse(across, high), Axis.parse(down, low))

    def _list(self, value: object) -> Any:
        return gr.update(choices=_choices([row.name for row in read_rows(DeltaRow, value)]))


def _choices(names: list[str]) -> list[tuple[str, str]]:
    plain = [("nothing", NOTHING), *((setting, setting) for setting in SETTINGS)]
    return plain + [(f"strength of {name}", STRENGTH + name) for name in names]


def _example(setting: str) -> str:
    return STRENGTHS if setting.startswith(STRENGTH) else EXAMPLES.get(setting, "")
