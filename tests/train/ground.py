"""What the tests of this room stand on: tiny bases, pictures, small configurations."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.contract.ground import tiny_eye
from vgm_peft.config import Table
from vgm_peft.families import family_named
from vgm_peft.family import Base

FAMILIES = ("sd15", "sdxl")
_bases: dict[str, Base] = {}


def tiny_base(family: str) -> Base:
    """One base per family for all tests: a run gives it back as it was, which `test_run.py` proves."""
    if family not in _bases:
        found = family_named(family)
        pipe = found.tiny()
        pipe.register_modules(image_encoder=tiny_eye())
        _bases[family] = Base(pipe, found, "tiny", digest="0" * 64)
    return _bases[family]


def picture(path: Path, seed: int, width: int = 64, height: int = 64) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def paired_pictures(folder: Path) -> Path:
    """Three pictures of two proportions, with captions and control pictures: fit for every task."""
    rows: list[dict[str, object]] = []
    for i, width in enumerate((64, 64, 96)):
        picture(folder / f"{i}.png", i, width)
        picture(folder / "control" / f"{i}.png", 10 + i, width)
        rows.append({"file_name": f"{i}.png", "text": f"a robot, picture {i}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


SMALL: Table = {
    "steps": 4,
    "data": {"resolution": 64, "batch": 2},
    "optimiser": {"lr": 1e-2},
    "preview": {"count": 0, "steps": 2},
    "checkpoint": {"every": 0, "leave": 2},
}
OWN: dict[str, Table] = {
    "dreambooth": {"task": {"class_prompt": "a robot", "class_images": 2, "class_steps": 2}, "delta": {"rank": 2}},
    "finetune": {"delta": {"rank": 2}},
    "textual-inversion": {"task": {"init_word": "robot"}},
}


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
