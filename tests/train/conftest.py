import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vgm_peft.config import Table, merge
from vgm_peft.families import family_named
from vgm_peft.family import Base
from vgm_peft.train.config import RunConfig, bind

FAMILIES = ("sd15", "sdxl")
_bases: dict[str, Base] = {}


def tiny_base(family: str) -> Base:
    """One base per family for all tests: a run gives it back as it was, which `test_run.py` proves."""
    if family not in _bases:
        found = family_named(family)
        _bases[family] = Base(found.tiny(), found, "tiny", digest="0" * 64)
    return _bases[family]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def picture(path: Path, seed: int, width: int = 64, height: int = 64) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures of two proportions, with captions and control pictures: fit for every task."""
    folder = tmp_path / "me"
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
}
OWN: dict[str, Table] = {
    "dreambooth": {"task": {"class_prompt": "a robot", "class_images": 2, "class_steps": 2}, "delta": {"rank": 2}},
    "finetune": {"delta": {"rank": 2}},
}


@pytest.fixture
def config(pictures: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """`config(task, output, table...)`: a small run's configuration."""

    def make(task: str = "dreambooth", output: str = "run", *more: Table) -> RunConfig:
        places: Table = {"data": {"images": str(pictures)}, "output": str(tmp_path / output), "task": {"name": task}}
        return bind(merge(SMALL, places, OWN.get(task, {}), *more))

    return make


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


os.environ.setdefault("HF_HUB_OFFLINE", "1")
