"""Where the Toybox's own files are: beside the package in a checkout, inside it when installed."""

from __future__ import annotations

from pathlib import Path

from vgm_peft.errors import BaseModelError

_MAKERS = {"toybox": "train-base", "oracles": "train-oracles"}


def asset_folder(name: str, marker: str) -> Path:
    """The folder `assets/NAME` that holds the file `marker`. Raises `BaseModelError` when there is none."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "assets" / name, package / "assets" / name):
        if (folder / marker).is_file():
            return folder
    raise BaseModelError(
        f"assets/{name} is not in this installation",
        expected=f"{marker} in assets/{name} beside or inside the package",
        fix=f"reinstall, or make it: python -m vgm_peft.toybox {_MAKERS.get(name, 'render')}",
    )
