"""The one check that all settings share: a number lies where it makes sense."""

import math

from vgm_peft.errors import ConfigError


def within(name: str, value: float, low: float, high: float) -> None:
    """Raise `ConfigError` unless `low <= value <= high` (so never for what is not a number)."""
    if not (math.isfinite(value) and low <= value <= high):
        raise ConfigError(f"{name} = {value}", expected=f"{low:g} .. {high:g}" if high < 1e4 else f"at least {low:g}")
