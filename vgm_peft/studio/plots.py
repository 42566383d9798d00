"""Grids of pictures over any two settings: what to vary, the stacks of all cells, and the sheet they make."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vgm_peft.errors import ConfigError, nearest
from vgm_peft.picture import grid, parameters
from vgm_peft.stack.recipe import SCHEDULERS, Stack
from vgm_peft.stack.uses import DeltaUse
from vgm_peft.studio.engine import Drawn, Engine

if TYPE_CHECKING:
    from PIL import Image

    from vgm_peft.picture import Picture
    from vgm_peft.stack.sampling import OnStep, Progress

NOTHING = ""
MOST = 8
"""Values of one axis."""
STRENGTH = "strength: "
SETTINGS = ("steps", "guidance", "seed", "sampler", "change")


@dataclass(frozen=True)
class Axis:
    """One of `SETTINGS`, or `strength: NAME`, with the values that it takes; or nothing."""

    setting: str = NOTHING
    values: tuple[str, ...] = ("",)

    @classmethod
    def parse(cls, setting: str | None, text: str | None) -> "Axis":
        """Read what was chosen and the values between commas. Raises `ConfigError`."""
        if not setting:
            return cls()
        if setting not in SETTINGS and not setting.startswith(STRENGTH):
            raise ConfigError(f'no setting "{setting[:80]}"', fix=nearest(setting, list(SETTINGS)))
        values = tuple(value for value in map(str.strip, (text or "").split(",")) if value)
        if not 1 <= len(values) <= MOST:
            raise ConfigError(f"{len(values)} values for {setting}", expected=f"1 .. {MOST}, between commas, as in 0, 0.5, 1")
        return cls(setting, values)

    def label(self, value: str) -> str:
        """What stands beside the pictures of a value."""
        name = self.setting.removeprefix(STRENGTH)
        return f"{name} {SCHEDULERS[value][1] if value in SCHEDULERS else value}".strip()

    def apply(self, stack: Stack, value: str) -> Stack:
        """Return the stack with the setting at a value. Raises `ConfigError` for a value that it cannot have."""
        if not self.setting:
            return stack
        if self.setting == "sampler":
            known = {label.casefold(): name for name, (_, label) in SCHEDULERS.items()}
            return replace(stack, scheduler=known.get(value.casefold(), value))
        number = self._number(value)
        if self.setting in ("steps", "seed"):
            if not number.is_integer():
                raise ConfigError(f"{self.setting} = {value}", expected="a whole number")
            return replace(stack, **{self.setting: int(number)})
        if self.setting in ("guidance", "change"):
            return replace(stack, **{self.setting: number})
        name = self.setting.removeprefix(STRENGTH)
        if all(use.file != name for use in stack.deltas):
            return replace(stack, deltas=(*stack.deltas, DeltaUse(file=name, strength=number)))
        deltas = tuple(replace(use, strength=number) if use.file == name else use for use in stack.deltas)
        return replace(stack, deltas=deltas)

    def _number(self, value: str) -> float:
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f'"{value[:40]}" for {self.setting}', expected="a number") from None


@dataclass(frozen=True)
class Plot:
    """Two axes over a stack; `across` may be nothing or `down`, not both."""

    across: Axis
    down: Axis

    def __post_init__(self) -> None:
        if not self.across.setting and not self.down.setting:
            raise ConfigError("nothing to vary", fix="choose a setting for the columns, and perhaps another for the rows")
        if self.across.setting == self.down.setting:
            raise ConfigError(f"{self.across.setting} is varied twice", fix="choose another setting for the rows, or none")

    def cells(self, stack: Stack) -> list[list[Stack]]:
        """The stack of every cell, row by row; all have the same seed unless it is what is varied."""
        one = replace(stack, count=1)
        return [[self.across.apply(self.down.apply(one, low), high) for high in self.across.values] for low in self.down.values]


def draw_plot(engine: Engine, stack: Stack, plot: Plot, on_step: "OnStep | None" = None) -> Drawn | None:
    """Draw all cells and keep the sheet; cells that were not drawn because `on_step` said so stay empty, and without any
    there is no sheet. Every cell is checked before the first is drawn."""
    cells = [cell for row in plot.cells(stack) for cell in row]
    for cell in cells:
        engine.shelf.placed(cell)
    pictures: list[Picture] = []
    notices: dict[str, None] = {}
    for i, cell in enumerate(cells):
        drawn = engine.render(cell, _counting(i, len(cells), on_step), notices.setdefault)
        if not drawn:
            break
        pictures += drawn
    if not pictures:
        return None
    across, down = plot.across, plot.down
    rows = _rows([picture.image for picture in pictures], len(across.values))
    labels = [down.label(v) for v in down.values][: len(rows)]
    sheet = grid(rows, [across.label(v) for v in across.values], labels, caption=stack.prompt[:300])
    said = " by ".join(axis.setting for axis in (across, down) if axis.setting)
    text = f"A grid over {said}. Its first picture:\n{parameters(pictures[0].stack)}"
    return Drawn(engine.keep_sheet(sheet, {"parameters": text}), text, tuple(notices))


def _rows(pictures: "Sequence[Image.Image]", columns: int) -> "list[list[Image.Image | None]]":
    rows: list[list[Image.Image | None]] = [list(pictures[i : i + columns]) for i in range(0, len(pictures), columns)]
    rows[-1] += [None] * (columns - len(rows[-1]))
    return rows


def _counting(done: int, total: int, on_step: "OnStep | None") -> "Callable[[Progress], bool | None]":
    """Tell of a step as one of all the pictures of the grid."""

    def step(progress: "Progress") -> bool | None:
        return None if on_step is None else on_step(replace(progress, picture=done + 1, pictures=total))

    return step
