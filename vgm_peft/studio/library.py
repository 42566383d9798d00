"""The *Library* tab: what every delta is and whether it fits the base; export for other tools, merge, resize."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from vgm_peft.errors import VgmError
from vgm_peft.studio.catalogue import Catalogue, Entry, hue
from vgm_peft.studio.draw_api import friendly
from vgm_peft.studio.drawing import explain
from vgm_peft.studio.preflight import in_words
from vgm_peft.studio.rows import MOST, Field, read_rows, row_list
from vgm_peft.studio.workbench import Workbench

if TYPE_CHECKING:
    from vgm_peft.studio.engine import Engine

QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
WORK: dict[str, Any] = {"concurrency_id": "tools", "concurrency_limit": 2, "show_progress": "minimal"}
WEB = Path(__file__).parent / "web"
TARGETS = ("comfyui", "a1111", "forge", "invokeai", "kohya", "diffusers", "peft", "lycoris", "embedding", "native")
METHODS = (
    ("sum, exactly", "concat"), ("sum, at a rank", "svd"), ("TIES: where they agree", "ties"), ("DARE: thinned out", "dare"),
)  # fmt: skip
SHOWN = 300
"""Cards of one page; a search finds the others."""
STRENGTH = Field(key="strength", label="Strength", min=-1.0, max=2.0, info="1: as trained.")
EMPTY = (
    '<p class="hint">Nothing here yet. Train something in the tab <b>Train</b>, or start the Studio with '
    "<code>--library FOLDER</code> to see the deltas in a folder.</p>"
)


@dataclass(frozen=True, kw_only=True)
class MergeRow:
    """A delta to be merged."""

    name: str
    on: bool = True
    more: bool = False
    strength: float = 1.0
    kind: str = ""
    words: tuple[str, ...] = ()


class LibraryTab:
    """Builds the tab into the Blocks that are open, and answers its events."""

    def __init__(self, engine: "Engine") -> None:
        self.engine = engine
        self.catalogue, self.workbench = Catalogue(engine), Workbench(engine)

    def build(self) -> None:
        """Lay the tab out and wire it."""
        with gr.Row(equal_height=False):
            with gr.Column(scale=7, min_width=320):
                self._search = gr.Textbox(
                    show_label=False, placeholder="Search by name, kind, family or word", max_length=200, elem_id="search"
                )
                self._cards = gr.HTML(
                    "", js_on_load=(WEB / "cards.js").read_text(encoding="utf-8"), elem_id="cards", padding=False
                )
            with gr.Column(scale=5, min_width=320):
                self._chosen = gr.Textbox(visible="hidden", elem_id="library-chosen", label="Name")
                self._details = gr.HTML(_details(None), elem_classes="report", elem_id="library-details", padding=False)
                with gr.Accordion("Export for another tool", open=True, elem_id="export-panel"):
                    self._export()
                with gr.Accordion("Merge", open=False, elem_id="merge-panel"):
                    self._merge()
                with gr.Accordion("Make smaller", open=False, elem_id="resize-panel"):
                    self._resize()
        self._wire()
        self._endpoints()

    def _export(self) -> None:
        target = gr.Dropdown(
            list(TARGETS), value="comfyui", label="For", info="Exactly, or not at all.", interactive=True, elem_id="export-for"
        )
        near = gr.Checkbox(False, label="Approximate by LoRA of rank 32 where there is no other way", interactive=True)
        go = gr.Button("Export", variant="primary", size="sm", elem_id="export")
        file = gr.File(label="Fetch it here", visible=False, interactive=False, elem_id="exported")
        told = gr.HTML("", elem_classes="hint", padding=False)
        go.click(self._exported, [self._chosen, target, near], [file, told], api_name="export", **WORK)

    def _merge(self) -> None:
        self._rows = row_list(empty="None yet. Choose one in the list, then add it.", main=STRENGTH, elem_id="merge")
        with gr.Row():
            add = gr.Button("Add the chosen one", size="sm", elem_id="merge-add")
        with gr.Row():
            method = gr.Dropdown(list(METHODS), value="concat", label="How", interactive=True)
            rank = gr.Number(
                16, label="Rank", precision=0, minimum=1, maximum=1024, info="Of a sum at a rank.", interactive=True
            )
        name = gr.Textbox("merged", label="Name of the result", max_length=40, interactive=True, elem_id="merge-name")
        go = gr.Button("Merge", variant="primary", size="sm", elem_id="merge-go")
        told = gr.HTML("", elem_classes="hint", elem_id="merge-told", padding=False)
        add.click(self._added, [self._chosen, self._rows], self._rows, **QUIET)
        go.click(self._merged, [self._rows, name, method, rank], told, api_visibility="private", **WORK)

    def _resize(self) -> None:
        rank = gr.Slider(1, 128, 8, step=1, label="Rank", info="Lower is smaller and less exact.", interactive=True)
        name = gr.Textbox("smaller", label="Name of the result", max_length=40, interactive=True, elem_id="resize-name")
        go = gr.Button("Make smaller", variant="primary", size="sm", elem_id="resize-go")
        told = gr.HTML("", elem_classes="hint", elem_id="resize-told", padding=False)
        go.click(self._resized, [self._chosen, name, rank], told, api_visibility="private", **WORK)

    def _wire(self) -> None:
        seen, timer = gr.State(""), gr.Timer(2.0)
        shown = [self._search, self._chosen, seen]
        timer.tick(self._look, shown, [self._cards, seen], **QUIET)
        for event in (self._search.input, self._chosen.change):
            event(self._look, shown, [self._cards, seen], **QUIET)
        self._cards.picked(self._picked, None, [self._chosen, self._details], **QUIET)

    def _endpoints(self) -> None:
        """What programs may ask for besides `/export`, which is the button's."""

        def library(search: str = "") -> list[dict[str, Any]]:
            """Everything in the library that matches all words of a search: kind, family, rank, words, size, does it fit."""
            return [entry.told() for entry in self.catalogue.entries(search, patience=60.0, fresh=True)]

        def inspect(name: str) -> dict[str, Any]:
            """What the header of one delta says."""
            from vgm_peft.tools.glance import glance

            return json.loads(json.dumps(asdict(glance(self.workbench.place(name)))))  # numbers for keys become texts

        def merge(weights: dict[str, float], name: str, method: str = "concat", rank: int | None = None) -> str:
            """Make several deltas, each at a strength, into one of a new name; says what came of it."""
            return self.workbench.merge(weights, name, method, rank).told

        def resize(of: str, name: str, rank: int | None = None, keep: float | None = None) -> str:
            """Make a delta smaller under a new name: to a rank, or to what keeps a share of every layer's spectrum."""
            return self.workbench.resize(of, name, rank, keep).told

        gr.api(friendly(library), api_name="library", queue=False)
        gr.api(friendly(inspect), api_name="inspect", queue=False)
        gr.api(friendly(merge), api_name="merge", concurrency_id="tools", concurrency_limit=2)
        gr.api(friendly(resize), api_name="resize", concurrency_id="tools", concurrency_limit=2)

    # --- events

    def _look(self, search: str, chosen: str, seen: str) -> tuple[Any, str]:
        """The cards, if they are other ones than were seen."""
        html = _cards(self.catalogue.entries(search or ""), chosen, bool(search))
        now = str(hash(html))
        return (gr.skip(), seen) if now == seen else (html, now)

    def _picked(self, event: gr.EventData) -> tuple[str, str]:
        entry = self.catalogue.entry(str(event.name)[:400])
        return (entry.name, _details(entry)) if entry else ("", _details(None))

    def _exported(self, name: str, target: str, near: bool = False) -> tuple[Any, str]:
        """Write a delta for another tool, to be fetched."""
        made = _done(lambda: self.workbench.export(name, target, 32 if near else None))
        return gr.File(value=str(made.path), visible=True), escape(made.told)

    def _added(self, name: str, value: list[Any]) -> list[Any]:
        listed = list(value or [])
        if not name:
            raise gr.Error("Choose one in the list first.", duration=8, print_exception=False)
        if len(listed) >= MOST or any(row.get("name") == name for row in listed if isinstance(row, dict)):
            return listed
        return [*listed, asdict(MergeRow(name=name))]

    def _merged(self, value: list[Any], name: str, method: str, rank: float | None) -> str:
        def work() -> str:
            weights = {row.name: row.strength for row in read_rows(MergeRow, value) if row.on}
            return self.workbench.merge(weights, name, method, int(rank or 1) if method != "concat" else None).told

        return f'<p class="good">{escape(_done(work))}</p>'

    def _resized(self, of: str, name: str, rank: float) -> str:
        return f'<p class="good">{escape(_done(lambda: self.workbench.resize(of, name, int(rank))).told)}</p>'


def _done(work: Any) -> Any:
    """Do what was asked for in the page, or say why not: escaped, since a stranger's file may have a say in it."""
    try:
        return work()
    except Exception as error:
        known = isinstance(error, VgmError)
        raise gr.Error(escape(explain(error)), duration=12, print_exception=not known) from None


def _cards(entries: Sequence[Entry], chosen: str, searched: bool) -> str:
    if not entries:
        return '<p class="hint">Nothing matches.</p>' if searched else EMPTY
    more = f'<p class="hint">and {len(entries) - SHOWN} more; search for them</p>' if len(entries) > SHOWN else ""
    return f'<div class="cards" role="listbox">{"".join(_card(e, e.name == chosen) for e in entries[:SHOWN])}</div>{more}'


def _card(entry: Entry, chosen: bool) -> str:
    name = escape(entry.name)
    if entry.thumbnail:
        face = f'<img class="face" alt="" src="{escape(entry.thumbnail)}">'
    else:
        style = f"background:hsl({hue(entry.name)} 32% 42%)"
        face = f'<span class="face" style="{style}" aria-hidden="true">{escape(entry.name[:1])}</span>'
    words = f'<span class="words">{escape(", ".join(entry.words[:3]))}</span>' if entry.words else ""
    return (
        f'<button type="button" class="card{" chosen" if chosen else ""}" data-name="{name}" role="option" '
        f'aria-selected="{str(chosen).lower()}" title="{name}">{face}<span class="text"><span class="name">{name}</span>'
        f'<span class="facts">{escape(_facts(entry))}</span>{words}{_badge(entry)}</span></button>'
    )


def _facts(entry: Entry) -> str:
    if entry.what == "unread":
        return "looking …"
    parts = (entry.kinds, f"rank {entry.rank}" if entry.rank else "", in_words(entry.size) if entry.size else "")
    return " · ".join(part for part in parts if part)


def _badge(entry: Entry) -> str:
    said = {"yes": "fits", "no": "does not fit", "unknown": ""}[entry.fits]
    said = "damaged" if entry.what == "damaged" else said or entry.family
    return f'<span class="badge {entry.fits}">{escape(said)}</span>' if said else ""


def _details(entry: Entry | None) -> str:
    """What is known of the chosen one."""
    if entry is None:
        return '<p class="hint">Choose one in the list to see what it is.</p>'
    unknown = entry.why or "only reading it would tell"
    fits = {"yes": "fits the base", "no": f"does not fit: {entry.why}", "unknown": unknown}[entry.fits]
    rows = {
        "Kind": f"{entry.kinds}, {entry.tool}" if entry.tool else entry.kinds,
        "Family": entry.family,
        "Rank": entry.rank,
        "Words": ", ".join(entry.words),
        "Size": in_words(entry.size) if entry.size else "",
        "Base": "" if entry.what == "network" else fits if entry.what != "damaged" else entry.why,
        "File": entry.path.name,
    }
    told = "".join(f"<dt>{key}</dt><dd>{escape(text)}</dd>" for key, text in rows.items() if text)
    return f"<p><b>{escape(entry.name)}</b></p><dl>{told}</dl>{_metadata(entry)}"


def _metadata(entry: Entry) -> str:
    """What a file says of itself, shortened: some hold the tags of thousands of pictures."""
    from vgm_peft.tools.glance import glance

    if entry.what not in ("delta", "words"):
        return ""
    try:
        said = glance(entry.path).metadata
    except (VgmError, OSError):
        return ""
    lines = [f"{key} = {text if len(text) <= 160 else text[:160] + ' …'}" for key, text in list(said.items())[:60]]
    return (
        f"<details><summary>What the file says of itself</summary><pre>{escape(chr(10).join(lines))}</pre></details>"
        if lines
        else ""
    )
