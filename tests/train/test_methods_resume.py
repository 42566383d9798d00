"""Every method and every task goes on exactly, on bases of either make: with the chance that it uses in training, from the
step at which it was stopped.
"""

import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from tests.train.ground import FAMILIES, SMALL, tiny_base
from tests.train.killed import kept
from vgm_peft.config import Table, merge, to_table
from vgm_peft.deltas import TABLE
from vgm_peft.train import train
from vgm_peft.train.config import RunConfig, bind
from vgm_peft.train.tasks import TABLE as TASKS

Make = Callable[..., RunConfig]
CHANCE: Table = {"dropout": 0.3, "rank_dropout": 0.3, "module_dropout": 0.3}
TWO_STEPS: Table = {"steps": 2, "data": {"batch": 1}, "checkpoint": {"every": 1}, "optimiser": {"lr": 1e-3}}
LIKE_SDXL = ("dora", "glora")
"""Two that look at the base's own weights; no method knows more of the base than that."""
CASES = [("sd15", kind) for kind in TABLE] + [("sdxl", kind) for kind in LIKE_SDXL]


def _goes_on_exactly(config: RunConfig, family: str) -> None:
    folder = Path(config.output)
    result = train(config, base=tiny_base(family))
    assert result.delta is not None
    expected = kept(folder)
    shutil.rmtree(folder / "checkpoints" / "step-000002")
    shutil.rmtree(result.delta) if result.delta.is_dir() else result.delta.unlink()
    train(config, resume=folder, base=tiny_base(family))
    assert kept(folder) == expected


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_every_method_goes_on_exactly(family: str, kind: str, pictures: Path, tmp_path: Path) -> None:
    method, folder = TABLE[kind], tmp_path / "run"
    chance = {f.name: CHANCE[f.name] for f in fields(method.Options) if f.name in CHANCE}
    delta = merge(to_table(method.examples[0]), chance, {"kind": kind})
    own: Table = {"task": {"name": "finetune"}, "data": {"images": str(pictures)}, "output": str(folder), "delta": delta}
    _goes_on_exactly(bind(merge(SMALL, TWO_STEPS, own)), family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", [name for name in TASKS if name != "finetune"])
def test_every_task_goes_on_exactly(task: str, family: str, config: Make) -> None:
    """Also on the base that is told more: of two text encoders, with sizes."""
    chance: Table = {"data": {"flip": True, "caption_dropout": 0.3}, "loss": {"noise_offset": 0.1}}
    # The deepest level of the tiny base is one place: where each norm group is one channel, torch wants more than one picture.
    several: Table = {"data": {"batch": 2}} if task == "controlnet-xs" else {}
    _goes_on_exactly(config(task, "run", TWO_STEPS, chance, several), family)


def test_a_word_that_rests_before_the_weights_do_goes_on_exactly(config: Make) -> None:
    word: Table = {"token": "<me>", "init_word": "robot", "vectors": 2, "norm": "pull", "word_until": 0.5}
    _goes_on_exactly(config("dreambooth", "run", TWO_STEPS, {"task": word}), "sd15")
