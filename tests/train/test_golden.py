"""Checkpoints of every version there ever was are gone on with, or refused by their version and left as they are."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.train.ground import files, tiny_base
from vgm_peft.errors import TrainError
from vgm_peft.formats import read
from vgm_peft.train import train
from vgm_peft.train.checkpoint import VERSION
from vgm_peft.train.recipes import resolve

GOLDEN = Path(__file__).parents[1] / "golden"
VERSIONS = sorted(int(path.name.removeprefix("checkpoint-")) for path in GOLDEN.glob("checkpoint-*"))


def test_there_is_one_of_this_version() -> None:
    assert VERSION in VERSIONS, "run python -m tests.golden.make_checkpoint, and keep what it makes"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_kept_checkpoint_is_gone_on_with_or_refused_by_its_version(version: int, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / f"checkpoint-{version}", tmp_path / "kept")
    run = tmp_path / "kept" / "run"
    config = resolve({"output": str(run)}, run / "run.toml").config
    if version != VERSION:
        before = files(run)
        with pytest.raises(TrainError, match=rf"is of version {version}, expected {VERSION}: go on with the vgm_peft that"):
            train(config, resume=run, base=tiny_base("sd15"))
        assert files(run) == before
        return
    result = train(config, resume=run, base=tiny_base("sd15"))
    assert result.steps == 4 and result.delta is not None and not result.notices
    found, expected = dict(read(result.delta).parameters()), dict(read(tmp_path / "kept" / "delta.safetensors").parameters())
    assert found.keys() == expected.keys()
    for name, value in expected.items():  # another processor may round otherwise
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
