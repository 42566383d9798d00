"""What a checkpoint must agree with to be gone on with: every setting that changes the result, the pictures and the base."""

from collections.abc import Mapping
from pathlib import Path

from vgm_peft.config import to_table
from vgm_peft.errors import TrainError
from vgm_peft.train.config import RunConfig, table

HARMLESS = ("output", "exports", "preview", "checkpoint", "base", "data.images", "data.allow", "data.cache_gib")
"""Settings that may differ when a run is resumed; base and pictures are compared by content instead."""
ENDLESS = ("constant", "inverse_sqrt")
"""Schedules that do not look at the end of the run: more steps may be asked for."""
Origin = Mapping[str, object]


def origin(config: RunConfig, base: str, data: object) -> dict[str, object]:
    """The settings by dotted name, the digest of the base, and what is known of the pictures by content."""
    flat: dict[str, object] = {}
    for key, value in table(config).items():
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}": v for inner, v in value.items()})
        else:
            flat[key] = value
    flat["concept"] = [{k: v for k, v in to_table(concept).items() if k != "images"} for concept in config.concept]
    if config.optimiser.schedule in ENDLESS:
        del flat["steps"]
    flat = {k: v for k, v in flat.items() if k not in HARMLESS and k.split(".")[0] not in HARMLESS}
    return {**flat, "the base (SHA-256)": base, "the data": data}


def differences(saved: Origin, now: Origin) -> list[str]:
    """Every entry that is not the same, each as `name old -> new`, in order of their names."""
    changed = [key for key in sorted({*saved, *now}) if saved.get(key) != now.get(key)]
    return [f"{key} {_shown(saved.get(key))} -> {_shown(now.get(key))}" for key in changed]


def demand_same(folder: Path, saved: Origin, now: Origin) -> None:
    """Raise `TrainError` with all differences of a checkpoint's folder from what is asked now."""
    changed = differences(saved, now)
    if changed:
        raise TrainError(
            f"{folder.parent.parent.name} was made otherwise (then -> now): {', '.join(changed)}",
            expected="the run that is resumed, unchanged",
            fix="set it back, or start a new run",
        )


def _shown(value: object) -> str:
    return "unset" if value is None else repr(value)
