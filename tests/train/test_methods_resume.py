"""Every method goes on exactly: with the chance that it uses in training, from the step at which it was stopped."""

import shutil
from dataclasses import fields
from pathlib import Path

import pytest

from tests.train.ground import SMALL, tiny_base
from tests.train.killed import kept
from vgm_peft.config import Table, merge, to_table
from vgm_peft.deltas import TABLE
from vgm_peft.train import train
from vgm_peft.train.config import bind

CHANCE: Table = {"dropout": 0.3, "rank_dropout": 0.3, "module_dropout": 0.3}
TWO_STEPS: Table = {
    "steps": 2,
    "task": {"name": "finetune"},
    "data": {"batch": 1},
    "checkpoint": {"every": 1},
    "optimiser": {"lr": 1e-3},
}


@pytest.mark.parametrize("kind", TABLE)
def test_every_method_goes_on_exactly(kind: str, pictures: Path, tmp_path: Path) -> None:
    method, folder = TABLE[kind], tmp_path / "run"
    chance = {f.name: CHANCE[f.name] for f in fields(method.Options) if f.name in CHANCE}
    delta = merge(to_table(method.examples[0]), chance, {"kind": kind})
    places: Table = {"data": {"images": str(pictures)}, "output": str(folder), "delta": delta}
    config = bind(merge(SMALL, TWO_STEPS, places))
    train(config, base=tiny_base("sd15"))
    expected = kept(folder)
    shutil.rmtree(folder / "checkpoints" / "step-000002")
    (folder / "delta.safetensors").unlink()
    train(config, resume=folder, base=tiny_base("sd15"))
    assert kept(folder) == expected
