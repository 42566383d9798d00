"""A list in the page whose entries are switched, weighed, moved and removed without asking the server.

What the browser sends back is a stranger's input: `read_rows` binds it to a dataclass, with the checks of any other table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import gradio as gr

from vgm_peft.config import build
from vgm_peft.errors import ConfigError

T = TypeVar("T")
MOST = 64
"""Rows of one list."""
WEB = Path(__file__).parent / "web"


@dataclass(frozen=True, kw_only=True)
class Field:
    """What can be set in a row: a number (`range`), one of several (`choice`) or a text (`text`), under a key of the row."""

    key: str
    label: str
    info: str = ""
    type: str = "range"
    min: float = 0.0
    max: float = 1.0
    step: float = 0.05
    choices: tuple[tuple[str, str], ...] = ()
    """What it is called in the page, and its value."""
    placeholder: str = ""
    unless: str = ""
    """Left out in rows that have a value under this key."""


def row_list(*, empty: str, main: Field | None = None, more: Sequence[Field] = (), elem_id: str) -> gr.HTML:
    """A list of rows in the page; `empty` is shown where there are none, of each `main` always and `more` behind a button.

    Its value is a list of tables with at least `name`, `on` and `more`; it triggers `listed` when rows go or move.
    """
    return gr.HTML(
        value=cast(Any, list[object]()),
        html_template='<div class="rows"></div>',
        css_template=(WEB / "rows.css").read_text(encoding="utf-8"),
        js_on_load=(WEB / "rows.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id=elem_id,
        spec=spec(empty, main, more),
    )


def spec(empty: str, main: Field | None, more: Sequence[Field]) -> dict[str, Any]:
    """What the page is told of the rows of a list."""
    return {"empty": empty, "main": main and asdict(main), "more": [asdict(field) for field in more]}


def read_rows(kind: type[T], value: object) -> list[T]:
    """Bind what the browser sent to dataclasses. Raises `ConfigError` for too many rows, or one that does not bind."""
    said = cast("list[object]", value) if isinstance(value, list) else []
    if len(said) > MOST:
        raise ConfigError(f"{len(said)} rows", expected=f"at most {MOST}")
    return [build(kind, cast("Mapping[str, object]", row) if isinstance(row, dict) else {}, "row: ") for row in said]
