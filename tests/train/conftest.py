from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.ground import OWN, SMALL, paired_pictures
from vgm_peft.config import Table, merge
from vgm_peft.train.config import RunConfig, bind


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures, as `paired_pictures` has them."""
    return paired_pictures(tmp_path / "me")


@pytest.fixture
def config(pictures: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """`config(task, output, table...)`: a small run's configuration."""

    def make(task: str = "dreambooth", output: str = "run", *more: Table) -> RunConfig:
        places: Table = {"data": {"images": str(pictures)}, "output": str(tmp_path / output), "task": {"name": task}}
        return bind(merge(SMALL, places, OWN.get(task, {}), *more))

    return make
