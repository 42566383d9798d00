"""Rendered pictures as folders that training takes: 01.png, 01.txt, 02.png ..."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from vgm_peft.errors import ConfigError, SaveError
from vgm_peft.toybox.cast import style_scenes, subject_named, subject_scenes
from vgm_peft.toybox.nouns import BACKGROUND_PHRASES, Scene
from vgm_peft.toybox.render import render
from vgm_peft.toybox.world import caption

_TOGETHER = 320


def write_pictures(folder: Path | str, scenes: Sequence[Scene], captions: Sequence[str], size: int = 64) -> tuple[Path, ...]:
    """Render `scenes` into numbered PNGs with a caption beside each; returns the pictures' paths."""
    if not scenes:
        raise ConfigError("no picture to render", expected="at least one")
    folder = Path(folder)
    digits = max(2, len(str(len(scenes))))
    paths: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(scenes), _TOGETHER):
            for image in render(scenes[start : start + _TOGETHER], size).image:
                path = folder / f"{len(paths) + 1:0{digits}d}.png"
                Image.fromarray(image.numpy()).save(path, optimize=True)
                path.with_suffix(".txt").write_text(captions[len(paths)] + "\n")
                paths.append(path)
    except OSError as error:
        raise SaveError(f"{folder}: {error.strerror or error}", fix="choose a folder that can be written") from error
    return tuple(paths)


def write_subject(folder: Path | str, name: str, count: int = 5, seed: int = 0) -> tuple[Path, ...]:
    """Pictures of a subject in different scenes, captioned with its class word and no name: what a user would bring."""
    scenes, word = subject_scenes(name, count, seed), subject_named(name).class_word
    return write_pictures(folder, scenes, [f"a photo of a {word} {BACKGROUND_PHRASES[s.background]}" for s in scenes])


def write_style(folder: Path | str, style: str, count: int = 12, seed: int = 0) -> tuple[Path, ...]:
    """Pictures in a style, captioned with what they show and not with the style."""
    scenes = style_scenes(style, count, seed)
    return write_pictures(folder, scenes, [caption(scene) for scene in scenes])
