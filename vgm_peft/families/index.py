"""What a folder's `model_index.json` says of itself, judged before any class that it names is touched."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from vgm_peft.errors import BaseModelError
from vgm_peft.family import Family
from vgm_peft.folders import check_component, check_no_code, read_json

LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)
"""Where components may come from; `stable_diffusion` is diffusers' name for its own safety checker, which is not loaded."""


def family_of_folder(families: Mapping[str, Family], folder: Path) -> Family:
    """Find the family of a folder in diffusers' layout. Raises `BaseModelError` when it has none or would bring code."""
    index = read_json(folder / "model_index.json")
    family = family_of_index(families, index, folder)
    check_no_code(folder)
    for name in components(index):
        if (folder / name).is_dir() and name not in family.loading:
            check_component(folder / name)
    return family


def family_of_index(families: Mapping[str, Family], index: Mapping[str, Any], folder: Path) -> Family:
    """Find the family by the pipeline's class alone, refusing what would bring code of its own."""
    where, kind = folder / "model_index.json", index.get("_class_name")
    if "custom_pipeline" in index or not isinstance(kind, str):
        raise BaseModelError(f"{where}: asks for a pipeline of its own ({kind!r})", expected="a pipeline of diffusers' own")
    for name, entry in components(index).items():
        if len(entry) != 2 or entry[0] not in LIBRARIES:
            raise BaseModelError(f"{where}: {name} comes from {entry}", expected="classes of diffusers and transformers")
    for family in families.values():
        if kind in family.pipelines:
            return family
    known = ", ".join(f"{f.name} ({f.pipelines[0]})" for f in families.values())
    raise BaseModelError(f"{where}: a {kind}", expected=f"one of {known}")


def components(index: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the entries that name a component: its library and class."""
    return {name: cast("list[Any]", entry) for name, entry in index.items() if isinstance(entry, list) and name[:1] != "_"}
