"""The Studio's engine: one base in memory, deltas read once, one drawing at a time."""

import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vgm_peft.errors import DeltaError
from vgm_peft.stack.files import sha256
from vgm_peft.stack.library import Found
from vgm_peft.stack.recipe import Stack
from vgm_peft.studio.settings import Settings
from vgm_peft.studio.shelf import Network, Shelf

if TYPE_CHECKING:
    from PIL import Image

    from vgm_peft.delta import Delta
    from vgm_peft.family import Base
    from vgm_peft.picture import Picture
    from vgm_peft.stack.runtime import Applied
    from vgm_peft.stack.sampling import OnStep

REMEMBERED = 32
"""Deltas that stay in memory."""


@dataclass(frozen=True)
class Drawn:
    """A finished picture: its file, and what other programs would read in it."""

    path: Path
    parameters: str
    notices: tuple[str, ...] = ()
    """What whoever asked for it should know."""


class Engine:
    """Draws what the browser asks for. Safe to call from several threads; drawings queue up."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.shelf = settings, Shelf(settings)
        self._lock = threading.Lock()
        self._base: Base | None = None
        self.applied: Applied | None = None
        """What the last drawing left on the base, so that the next one touches only what differs."""
        self._read: dict[Path, tuple[tuple[float, int], str, Delta]] = {}

    def base(self) -> "Base":
        """The base with nothing on it, loaded at the first call."""
        with self._lock:
            base = self._load()
            self._take_off()
            return base

    @contextmanager
    def alone(self) -> "Generator[Base]":
        """Have the base to oneself for a while, with nothing on it; drawings wait."""
        with self._lock:
            base = self._load()
            self._take_off()
            yield base

    @property
    def loaded(self) -> "Base | None":
        """The base if it is in memory; never waits for a drawing."""
        return self._base

    def warm_up(self) -> None:
        """Load the base in the background, so that the page is there at once and the first picture is not late."""

        def load() -> None:
            try:
                self.base()
            except Exception as error:  # said again, properly, to whoever asks for the first picture
                print(f"vgm-studio: {error}")

        threading.Thread(target=load, name="warm-up", daemon=True).start()

    def deltas(self, fresh: bool = True) -> list[Found]:
        """The deltas of the library; without `fresh` as they were a moment ago."""
        return self.shelf.deltas(fresh)

    def networks(self) -> list[Network]:
        """The side networks of the library."""
        return self.shelf.networks()

    def draw(self, stack: Stack, on_step: "OnStep | None" = None) -> list[Drawn]:
        """Draw a stack that names things as `Shelf` does, and keep the pictures.

        Raises `ConfigError` for a name that is not in the library: nothing outside it is ever opened.
        """
        from vgm_peft.picture import parameters

        notices: list[str] = []
        pictures = self.render(stack, on_step, notices.append)
        return [Drawn(self.keep(p), parameters(p.stack), tuple(notices)) for p in pictures]

    def render(
        self, stack: Stack, on_step: "OnStep | None" = None, tell: Callable[[str], None] = lambda text: None
    ) -> "list[Picture]":
        """Draw as `draw` does, and keep nothing."""
        from vgm_peft.stack.sampling import draw

        placed = self.shelf.placed(replace(stack, base=self.settings.base, base_digest=""))
        with self._lock:
            base = self._load()
            given: dict[str, Delta] = {}
            digests: dict[str, str] = {}
            for file in {use.file for use in placed.deltas}:
                digests[file], given[file] = self._delta(Path(file), base)
            deltas = tuple(replace(use, digest=digests[use.file]) for use in placed.deltas)
            full = replace(placed, deltas=deltas)
            record, applied = full.pinned(skip=given), self._put_on(base, full, given)
            for notice in applied.notices:
                tell(notice)
            return list(draw(applied, record, on_step))

    def _load(self) -> "Base":
        if self._base is None:
            from vgm_peft.stack.loading import load_base

            self._base = load_base(Stack(base=self.settings.base))
        return self._base

    def _put_on(self, base: "Base", stack: Stack, given: "Mapping[str, Delta]") -> "Applied":
        """Have a stack be on the base: of what is on since the last drawing only what differs is touched."""
        from vgm_peft.stack.runtime import Applied

        if self.applied is None:
            self.applied = Applied(base, stack, given=given)
        else:
            try:
                self.applied.change(stack, given=given)
            except BaseException:
                self._take_off()  # whatever went wrong, the next drawing begins with the base alone
                raise
        return self.applied

    def _take_off(self) -> None:
        if self.applied is not None:
            self.applied.remove()
            self.applied = None

    def keep(self, picture: "Picture") -> Path:
        """Keep a drawn picture, with its stack in it."""
        return picture.save(self._place(str(picture.stack.seed)))

    def keep_sheet(self, sheet: "Image.Image", said: Mapping[str, str]) -> Path:
        """Keep a grid of pictures, with texts in it."""
        from PIL.PngImagePlugin import PngInfo

        from vgm_peft.picture import write_image

        info = PngInfo()
        for key, text in said.items():
            info.add_text(key, text)
        return write_image(sheet, self._place("grid"), info)

    def _delta(self, path: Path, base: "Base") -> "tuple[str, Delta]":
        """Read a delta, or remember it while its file has not changed."""
        from vgm_peft.stack.handle import read_delta

        try:
            facts = path.stat()
        except OSError:
            raise DeltaError(f"{path.name}: it has gone", fix="refresh the list") from None
        stamp = (facts.st_mtime, facts.st_size)
        known = self._read.pop(path, None)
        if known is None or known[0] != stamp:
            self._take_off()  # some formats are read against the base's own weights
            known = (stamp, sha256(path), read_delta(path, base))
        self._read[path] = known  # the one used last is the last to be forgotten
        while len(self._read) > REMEMBERED:
            del self._read[next(iter(self._read))]
        return known[1], known[2]

    def _place(self, what: str) -> Path:
        folder = self.settings.pictures.absolute()
        stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{what}"
        path = folder / f"{stem}.png"
        number = 1
        while path.exists():
            number += 1
            path = folder / f"{stem}-{number}.png"
        return path
