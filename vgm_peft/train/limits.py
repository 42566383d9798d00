"""What settings share: a number lies where it makes sense, and `every` is a number of steps."""

import math

from vgm_peft.errors import ConfigError


def within(name: str, value: float, low: float, high: float) -> None:
    """Raise `ConfigError` unless `low <= value <= high` (so never for what is not a number)."""
    if not (math.isfinite(value) and low <= value <= high):
        raise ConfigError(f"{name} = {value}", expected=f"{low:g} .. {high:g}" if high < 1e4 else f"at least {low:g}")


def due(every: int | None, step: int, last: bool = False) -> bool:
    """Whether what is done `every` so many steps is due after step `step`, the `last` one included; what is unset never is."""
    return bool(every) and (last or step % every == 0)
