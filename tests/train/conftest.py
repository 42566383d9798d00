import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.ground import OWN, SMALL, picture
from vgm_peft.config import Table, merge
from vgm_peft.train.config import RunConfig, bind


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


@pytest.fixture
def config(pictures: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """`config(task, output, table...)`: a small run's configuration."""

    def make(task: str = "dreambooth", output: str = "run", *more: Table) -> RunConfig:
        places: Table = {"data": {"images": str(pictures)}, "output": str(tmp_path / output), "task": {"name": task}}
        return bind(merge(SMALL, places, OWN.get(task, {}), *more))

    return make
