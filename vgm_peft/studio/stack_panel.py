"""The panel of deltas: those that were added from the library, each with a strength, a span of the steps and a region."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

import gradio as gr

from vgm_peft.errors import VgmError
from vgm_peft.stack.uses import DeltaUse
from vgm_peft.studio.rows import MOST, Field, read_rows, row_list, spec
from vgm_peft.studio.shelf import Shelf

Values = Mapping[Any, Any]
"""What the page's components hold."""
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
ASKED: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
"""For events that can fail: gradio shows the error of an event only if it queues."""
EMPTY = "None yet: the base draws alone. Add one below."
STRENGTH = Field(
    key="strength", label="Strength", min=-1.0, max=2.0, info="1: as trained. 0: not at all. Below 0: the opposite."
)
SPAN = (
    Field(key="start", label="From", info="From which share of the steps on it acts; 0 is the beginning."),
    Field(
        key="end", label="Until", info="Until which share of the steps it acts; 1 is the end. Late steps only touch details."
    ),
)


@dataclass(frozen=True, kw_only=True)
class DeltaRow:
    """A delta of the panel."""

    name: str
    on: bool = True
    more: bool = False
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    region: str = ""
    kind: str = ""
    """What is said beside the name."""
    words: tuple[str, ...] = ()
    schedule: tuple[float, ...] = ()
    """Not shown, but kept: from a stack that was opened."""
    blocks: Mapping[str, float] = field(default_factory=dict[str, float])

    def use(self) -> DeltaUse:
        """The row as a stack says it."""
        return DeltaUse(
            file=self.name, strength=self.strength, start=self.start, end=max(self.start, self.end), region=self.region,
            schedule=self.schedule, blocks=self.blocks,
        )  # fmt: skip


class StackPanel:
    """Builds the panel into the Blocks that are open. `chosen` is the field by which deltas are added."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    def build(self) -> None:
        """Lay it out and wire it."""
        self.rows = row_list(empty=EMPTY, main=STRENGTH, more=self._more(()), elem_id="deltas")
        self.chosen = gr.Dropdown(
            [], value=None, label="Add a delta", elem_id="add-delta", interactive=True,
            info="What was trained and is in the library. Those you add act together.",
        )  # fmt: skip
        self.chosen.input(self._add, [self.chosen, self.rows], [self.chosen, self.rows], **ASKED)

    def uses(self, values: Values) -> tuple[DeltaUse, ...]:
        """The deltas that are switched on, as a stack says them. Raises `ConfigError`."""
        return tuple(row.use() for row in read_rows(DeltaRow, values[self.rows]) if row.on)

    def shown(self, uses: Sequence[DeltaUse], regions: Sequence[str]) -> Any:
        """The update that shows the deltas of a stack."""
        return gr.update(value=[asdict(self._row(use)) for use in uses], spec=self.spec(regions))

    def spec(self, regions: Sequence[str]) -> dict[str, Any]:
        """What the page is told of the rows: the regions that can be chosen are those there are."""
        return spec(EMPTY, STRENGTH, self._more(regions))

    def choices(self) -> Any:
        """The update that lists what can be added now."""
        return gr.update(choices=[found.name for found in self.shelf.deltas(fresh=False)])

    def _more(self, regions: Sequence[str]) -> tuple[Field, ...]:
        info = "Where in the picture it acts. Regions are drawn further below."
        choices = (("everywhere", ""), *((name, name) for name in regions))
        return (*SPAN, Field(key="region", label="Where", type="choice", choices=choices, info=info))

    def _add(self, name: str | None, value: list[Any]) -> tuple[Any, Any]:
        if not name:
            return gr.skip(), gr.skip()
        if len(value or []) >= MOST:
            raise gr.Error(f"There are {MOST} deltas already.", duration=8, print_exception=False)
        try:
            row = self._row(DeltaUse(file=name))
        except VgmError as error:
            raise gr.Error(escape(str(error)), duration=12, print_exception=False) from None
        return gr.update(value=None), [*(value or []), asdict(row)]

    def _row(self, use: DeltaUse) -> DeltaRow:
        notes = ("with a schedule" if use.schedule else "", "by blocks" if use.blocks else "")
        return DeltaRow(
            name=use.file, strength=use.strength, start=use.start, end=use.end, region=use.region, schedule=use.schedule,
            blocks=dict(use.blocks), words=self.shelf.words(use.file), kind=", ".join(note for note in notes if note),
            more=(use.start, use.end, use.region) != (0.0, 1.0, ""),
        )  # fmt: skip
