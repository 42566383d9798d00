"""Where a configuration comes from: defaults < recipe < flags.

A recipe is a TOML file with any part of a `RunConfig`; `extends = "other.toml"` lays it over another. Paths in it are
relative to the folder it lies in. When the user names none, the shipped one for the task, the delta and the base is
taken: `<task>-<delta>-<base>.toml`, or without a delta `<task>-<base>.toml`, where base is its name or its family's.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vgm_peft.config import Table, merge, read_toml, to_toml
from vgm_peft.errors import ConfigError, nearest
from vgm_peft.train.config import DeltaConfig, RunConfig, bind, table

SHIPPED = "training"
HEAD = "# The whole configuration of this run; `vgm-train --recipe run.toml` repeats it. Paths begin at this folder.\n"


def shipped_folder() -> Path | None:
    """The folder of the recipes that come with the package: beside it in a checkout, inside it once installed."""
    places = (Path(__file__).parents[2] / SHIPPED, Path(__file__).parents[1] / SHIPPED)
    return next((place for place in places if place.is_dir()), None)


@dataclass(frozen=True)
class Resolved:
    """A complete configuration, and where it came from."""

    config: RunConfig
    recipe: Path | None
    notices: tuple[str, ...] = ()


def resolve(flags: Table, recipe: Path | None = None) -> Resolved:
    """Lay the flags over a recipe, the user's or the one shipped for this task, delta and base.

    Raises `ConfigError` for a mistake in the flags before anything is loaded.
    """
    if recipe is not None:
        layer, notices = with_room(read_recipe(recipe), flags)
        return Resolved(bind(laid_over(layer, flags)), recipe, notices)
    if not isinstance(task := flags.get("task"), dict) or "name" not in task:
        raise ConfigError("no task is named", expected="vgm-train TASK, --recipe or --resume", fix=nearest("", _tasks()))
    asked = bind(flags)
    _ = asked.concepts  # that there are pictures is known before anything is loaded
    found = shipped_recipe(asked.task.name, asked.delta, [asked.base])
    if found is None:
        from vgm_peft.families import outline

        found = shipped_recipe(asked.task.name, asked.delta, [asked.base, outline(asked.base).family])
    if found is None:
        return Resolved(asked, None, ("no recipe is shipped for this: the settings are the plain defaults",))
    path, exact = found
    layer, notices = with_room(read_recipe(path), flags)
    if not exact and asked.delta is not None:
        layer = {k: v for k, v in layer.items() if k != "delta"}
        notices += (f"no recipe is shipped for {asked.delta.kind} here: all but [delta] is from {path.name}",)
    return Resolved(bind(merge(layer, flags)), path, notices)


def _tasks() -> list[str]:
    from vgm_peft.train.tasks import TABLE

    return list(TABLE)


def read_recipe(path: Path, _seen: tuple[Path, ...] = ()) -> Table:
    """Read a recipe and those it extends as one table, its paths made relative to here. Raises `ConfigError`."""
    path = _found(path)
    if path.resolve() in _seen:
        raise ConfigError(f"{path}: extends itself, by way of {' and '.join(p.name for p in _seen)}")
    layer = read_toml(path)
    below = layer.pop("extends", None)
    try:
        bind(layer)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    layer = _moved(layer, lambda name: os.path.normpath(path.parent / name), lambda name: (path.parent / name).exists())
    if below is None:
        return layer
    if not isinstance(below, str):
        raise ConfigError(f"{path}: extends = {below!r}", expected="the file name of another recipe")
    return laid_over(read_recipe(path.parent / below, (*_seen, path.resolve())), layer)


def laid_over(below: Table, layer: Table) -> Table:
    """Lay settings over others; a method takes nothing of `[delta]` from below that was said of another."""
    old, new = below.get("delta"), layer.get("delta")
    if isinstance(old, dict) and isinstance(new, dict) and "kind" in new and new["kind"] != old.get("kind", DeltaConfig().kind):
        below = {key: value for key, value in below.items() if key != "delta"}
    return merge(below, layer)


def with_room(layer: Table, flags: Table) -> tuple[Table, tuple[str, ...]]:
    """Shorten a recipe's warm-up, in proportion, where the flags ask for too few steps for it; and say so.

    A warm-up that the flags name themselves is left as it is, and so is one that its own recipe has no room for: both are
    mistakes, which `bind` names.
    """
    recipe, wanted = bind(layer), flags.get("steps")
    named = isinstance(asked := flags.get("optimiser"), dict) and "warmup" in asked
    warmup = recipe.optimiser.warmup
    if named or type(wanted) is not int or not 0 < wanted <= warmup:
        return layer, ()
    shorter = warmup * wanted // recipe.steps
    notice = f"the recipe's warm-up of {warmup} steps is cut to {shorter}, in proportion to the {wanted} steps asked for"
    return merge(layer, {"optimiser": {"warmup": shorter}}), (f"{notice}; --set optimiser.warmup says another",)


def shipped_recipe(task: str, delta: DeltaConfig | None, bases: Sequence[str]) -> tuple[Path, bool] | None:
    """The shipped recipe that fits best, and whether it is for this kind of delta; `None` when there is none.

    `bases` are names of the base, the most particular first.
    """
    folder = shipped_folder()
    if folder is None:
        return None
    kinds = [f"-{delta.kind}", f"-{DeltaConfig().kind}", ""] if delta else [""]
    for kind in kinds:
        for base in bases:
            path = folder / f"{task}{kind}-{base}.toml"
            if "/" not in base and path.is_file():
                return path, kind == kinds[0]
    return None


def portable(config: RunConfig, folder: Path) -> str:
    """The resolved configuration as the text of a recipe in `folder`, which repeats the run from wherever it is read."""
    whole = table(config)
    del whole["output"]
    return HEAD + to_toml(_moved(whole, lambda name: _relative(name, folder), lambda name: Path(name).exists()))


def _moved(layer: Table, move: Callable[[str], str], is_path: Callable[[str], bool]) -> Table:
    """Return a table with its paths moved: the folders of pictures, and the base where that is a path and no name."""
    out = dict(layer)
    data, base, concepts = out.get("data"), out.get("base"), out.get("concept")
    if isinstance(data, dict):
        if isinstance(images := data.get("images"), str) and images:
            data = {**data, "images": move(images)}
        if isinstance(weights := data.get("annotator_weights"), str) and weights and is_path(weights):
            data = {**data, "annotator_weights": move(weights)}
        out["data"] = data
    if isinstance(concepts, list):
        out["concept"] = [
            {**c, "images": move(images)} if isinstance(c, dict) and isinstance(images := c.get("images"), str) else c
            for c in concepts
        ]
    if isinstance(scores := out.get("scores"), dict) and isinstance(model := scores.get("model"), str):
        out["scores"] = {**scores, "model": move(model) if model and is_path(model) else model}
    if isinstance(task := out.get("task"), dict) and isinstance(start := task.get("start"), str) and start:
        out["task"] = {**task, "start": move(start)}
    if isinstance(base, str) and base != "toybox" and is_path(base):
        out["base"] = move(base)
    return out


def _relative(name: str, folder: Path) -> str:
    try:
        return Path(os.path.relpath(name, folder)).as_posix()
    except ValueError:  # another drive of Windows
        return str(Path(name).resolve())


def _found(path: Path) -> Path:
    """The file itself, or the shipped recipe of that name."""
    folder = shipped_folder()
    if not path.exists() and folder is not None:
        for name in (path.name, f"{path.name}.toml"):
            if (folder / name).is_file():
                return folder / name
    return path
