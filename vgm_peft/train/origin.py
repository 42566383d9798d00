"""What a checkpoint must agree with to be gone on with: every setting that changes the result, the pictures and the base."""

from collections.abc import Mapping
from pathlib import Path

from vgm_peft.config import Table, to_table
from vgm_peft.errors import TrainError
from vgm_peft.train.config import RunConfig, bind, table

COMPARED = ("base", "task.start", "data.images", "scores.model")
"""Settings that say where something is; it is compared by content."""
HARMLESS = (*COMPARED, "output", "exports", "preview", "checkpoint", "data.allow", "data.cache_gib")
"""Settings that may differ when a run is resumed."""
ENDLESS = ("constant", "inverse_sqrt")
"""Schedules that do not look at the end of the run: more steps may be asked for."""
Origin = Mapping[str, object]


def origin(config: RunConfig, base: str, data: object, scorer: str = "") -> dict[str, object]:
    """The settings by dotted name, the digests of the base and the scorer, and what is known of the pictures by content."""
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
    return {**flat, "the base (SHA-256)": base, "the data": data, **({"the scorer (SHA-256)": scorer} if scorer else {})}


def differences(saved: Origin, now: Origin) -> list[str]:
    """Every entry that is not the same, as `name old -> new`, by name; settings that came later and are left alone are none."""
    before = {**_new_since(saved, now), **saved}
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    return [f"{key} {_shown(before.get(key))} -> {_shown(now.get(key))}" for key in changed]


def demand_same(folder: Path, saved: Origin, now: Origin) -> None:
    """Raise `TrainError` with all differences of a checkpoint's folder from what is asked now."""
    changed = differences(saved, now)
    if changed:
        raise TrainError(
            f"{folder.parent.parent.name} was made otherwise (then -> now): {', '.join(changed)}",
            expected="the run that is resumed, unchanged",
            fix="set it back, or start a new run",
        )


def _new_since(saved: Origin, now: Origin) -> Origin:
    """Settings that came after the version which saved and have their defaults, which are what was done before there was a
    choice. (One that is merely unset is in none of these tables, so it is never taken for one of them.)
    """
    task, kind = now.get("task.name"), now.get("delta.kind")
    if not isinstance(task, str):
        return {}
    usual: Table = {"task": {"name": task}, **({"delta": {"kind": kind}} if isinstance(kind, str) else {})}
    return {k: v for k, v in origin(bind(usual), "", None).items() if k not in saved and now.get(k) == v}


def _shown(value: object) -> str:
    return "unset" if value is None else repr(value)
