"""The Studio's engine: one base in memory, deltas read once, one drawing at a time."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vgm_peft.errors import ConfigError, DeltaError, nearest
from vgm_peft.stack.library import Found, find
from vgm_peft.stack.recipe import ControlUse, DeltaUse, Stack, sha256
from vgm_peft.studio.settings import Settings

if TYPE_CHECKING:
    from vgm_peft.delta import Delta
    from vgm_peft.family import Base
    from vgm_peft.stack.sampling import Progress


STALE = 3.0
"""Seconds for which open pages share one look at the library's folders."""


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
        self.settings = settings
        self._lock = threading.Lock()
        self._base: Base | None = None
        self._listed = (float("-inf"), list[Found]())
        self._read: dict[Path, tuple[tuple[float, int], str, Delta]] = {}

    def base(self) -> "Base":
        """The base, loaded at the first call."""
        with self._lock:
            if self._base is None:
                from vgm_peft.stack.loading import load_base

                self._base = load_base(Stack(base=self.settings.base))
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
        """The deltas of the library; without `fresh` as they were at most `STALE` seconds ago."""
        when, found = self._listed
        if fresh or time.monotonic() - when > STALE:
            found = find(self.settings.folders)
            self._listed = time.monotonic(), found
        return found

    def networks(self) -> list[Found]:
        """The side networks of the library: folders in diffusers' layout that stand alone."""
        found: list[Found] = []
        for folder in self.settings.folders:
            for config in sorted(folder.glob("*/config.json")) + sorted(folder.glob("*/*/config.json")):
                inside = config.resolve().is_relative_to(folder.resolve())
                if inside and not (config.parent.parent / "model_index.json").exists():
                    found.append(Found(config.parent.relative_to(folder).as_posix(), config.parent))
        return found

    def draw(
        self,
        stack: Stack,
        strengths: dict[str, float],
        control: tuple[str, Path, float] | None = None,
        on_step: "Callable[[Progress], bool | None] | None" = None,
    ) -> list[Drawn]:
        """Draw a stack with deltas and a side network of the library, by their names there, and keep the pictures.

        Raises `ConfigError` for a name that is not in the library: nothing outside it is ever opened.
        """
        from vgm_peft.picture import parameters
        from vgm_peft.stack.sampling import generate

        base = self.base()
        with self._lock:
            given: dict[str, Delta] = {}
            uses: list[DeltaUse] = []
            for name, strength in strengths.items():
                path = _by_name(name, self.deltas(), "delta")
                digest, delta = self._delta(path, base)
                uses.append(DeltaUse(file=str(path.absolute()), strength=strength, digest=digest))
                given[str(path.absolute())] = delta
            controls: tuple[ControlUse, ...] = ()
            if control is not None:
                folder = _by_name(control[0], self.networks(), "control network")
                controls = (ControlUse(network=str(folder.absolute()), image=str(control[1]), strength=control[2]),)
            full = replace(stack, base=self.settings.base, deltas=tuple(uses), controls=controls)
            notices: list[str] = []
            pictures = generate(base, full, on_step, given=given, tell=notices.append)
            return [Drawn(p.save(self._place(p.stack.seed)), parameters(p.stack), tuple(notices)) for p in pictures]

    def _delta(self, path: Path, base: "Base") -> "tuple[str, Delta]":
        """Read a delta, or remember it while its file has not changed."""
        from vgm_peft.stack.handle import read_delta

        try:
            facts = path.stat()
        except OSError:
            raise DeltaError(f"{path.name}: it has gone", fix="refresh the list") from None
        stamp = (facts.st_mtime, facts.st_size)
        known = self._read.get(path)
        if known is None or known[0] != stamp:
            known = self._read[path] = (stamp, sha256(path), read_delta(path, base))
        return known[1], known[2]

    def _place(self, seed: int) -> Path:
        folder = self.settings.pictures.absolute()
        stem = time.strftime("%Y%m%d-%H%M%S")
        path = folder / f"{stem}-{seed}.png"
        number = 1
        while path.exists():
            number += 1
            path = folder / f"{stem}-{seed}-{number}.png"
        return path


def _by_name(name: str, found: list[Found], kind: str) -> Path:
    for each in found:
        if each.name == name:
            return each.path
    raise ConfigError(
        f'no {kind} "{name[:100]}" in the library', fix=nearest(name[:100], [f.name for f in found]) if found else ""
    )
