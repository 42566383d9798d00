"""Building the Studio's page and serving it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgm_peft.errors import ConfigError
from vgm_peft.studio.engine import Engine
from vgm_peft.studio.guard import Guard
from vgm_peft.studio.jobs import Desk
from vgm_peft.studio.look import CSS, SHORTCUT, theme
from vgm_peft.studio.settings import Settings

if TYPE_CHECKING:
    import gradio as gr

    from vgm_peft.studio.create import CreateTab

QUEUE = 16
"""Drawings that may wait; more are told to come back."""


@dataclass(frozen=True)
class Studio:
    """A built Studio: the page and what stands behind it."""

    settings: Settings
    engine: Engine
    desk: Desk
    page: "gr.Blocks"

    def launch(self, *, block: bool = True, browser: bool = False) -> str:
        """Serve it; returns the address (at once when not `block`). Raises `ConfigError` when the port is taken."""
        self.engine.warm_up()
        try:
            _, url, _ = self.page.launch(**launch_options(self.settings), inbrowser=browser, prevent_thread_lock=True)
        except OSError as error:
            raise ConfigError(f"port {self.settings.port}: {error}", fix="choose another --port") from None
        print(f"vgm-studio: {url}   (Ctrl-C ends it; a training that runs goes on)", flush=True)
        if block:
            self.page.block_thread()
        return url


def build(settings: Settings) -> Studio:
    """Build the page for some settings; nothing is loaded and nothing served yet."""
    # Before gradio is imported: it looks up two outside hosts otherwise.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import gradio as gr

    from vgm_peft.studio import draw_api, train_api
    from vgm_peft.studio.compare import CompareTab
    from vgm_peft.studio.create import CreateTab
    from vgm_peft.studio.library import LibraryTab
    from vgm_peft.studio.train import TrainTab

    for folder in (settings.runs, settings.pictures, settings.queue):
        folder.mkdir(parents=True, exist_ok=True)
    engine, desk = Engine(settings), Desk(settings)
    create = CreateTab(engine)
    library, train, compare = LibraryTab(engine), TrainTab(desk, engine), CompareTab(engine, desk)
    with gr.Blocks(title="vgm studio", analytics_enabled=False, fill_width=True) as page:
        gr.HTML("<h1>vgm studio</h1><p>Teach a base model something new, and draw with what it learned.</p>", elem_id="title")
        with gr.Tabs():
            with gr.Tab("Create"):
                create.build(page)
            with gr.Tab("Library"):
                library.build()
            with gr.Tab("Train"):
                train.build()
            with gr.Tab("Compare"):
                compare.build(page)
        draw_api.endpoints(engine)
        train_api.endpoints(desk, engine)
        _news(create)
    page.queue(max_size=QUEUE, default_concurrency_limit=4)
    return Studio(settings, engine, desk, page)


def launch_options(settings: Settings) -> dict[str, Any]:
    """What gradio's `launch` is told: who may reach the page and what it may read."""
    from starlette.middleware import Middleware

    return {
        "server_name": settings.host,
        "server_port": settings.port or None,
        "auth": settings.auth,
        "allowed_paths": [str(settings.pictures.absolute()), str(settings.runs.absolute())],
        "blocked_paths": [str(settings.queue.absolute())],
        "max_file_size": settings.upload_bytes,
        "app_kwargs": {"middleware": [Middleware(Guard, hosts=settings.hosts)]},
        "theme": theme(),
        "css": CSS + (Path(__file__).parent / "web" / "tabs.css").read_text(encoding="utf-8"),
        "head": SHORTCUT,
        "share": False,
        "enable_monitoring": False,
        "run_history": False,
        "ssr_mode": False,
        "quiet": True,
        "show_error": True,
        "footer_links": [],
        # Gradio would otherwise ask itself for the page and give up after seconds, which a busy machine fails.
        "_frontend": False,
    }


def _news(create: "CreateTab") -> None:
    """Have *Create* offer what a training or another program put into the library meanwhile."""
    import gradio as gr

    def look(seen: list[str]) -> tuple[Any, list[str]]:
        names = create.names()
        return (gr.skip() if names == seen else gr.Dropdown(choices=names)), names

    seen, timer = gr.State(list[str]()), gr.Timer(2.0)
    timer.tick(look, seen, [create.chosen, seen], queue=False, show_progress="hidden", api_visibility="private")


def settings_of_environment() -> Settings:
    """The settings of a hosted Studio (`apps/studio.py`): `VGM_BASE`, `VGM_LIBRARY`, `VGM_HOST`, `VGM_AUTH`, `SPACE_HOST`."""
    from vgm_peft.studio.settings import parse_auth

    found = os.environ.get
    auth = found("VGM_AUTH")
    return Settings(
        base=found("VGM_BASE", "toybox"),
        library=tuple(Path(p) for p in found("VGM_LIBRARY", "").split(os.pathsep) if p),
        host=found("VGM_HOST", "127.0.0.1"),
        port=int(found("PORT", "7860")),
        auth=parse_auth(auth) if auth else None,
        names=tuple(name for name in found("SPACE_HOST", "").split(",") if name),
    )
