"""Several processes draw different shards and take one step together: two of them equal two micro-batches of one."""

import multiprocessing
from collections.abc import Callable

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState

from tests.train.ground import tiny_base
from vgm_peft.config import Table
from vgm_peft.formats import read
from vgm_peft.train import train
from vgm_peft.train.config import RunConfig

SHARED: Table = {"steps": 2, "data": {"batch": 1, "flip": True}, "optimiser": {"lr": 1e-3}, "checkpoint": {"every": 1}}


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the launcher forks")
def test_two_processes_equal_two_micro_batches(config: Callable[..., RunConfig]) -> None:
    alone = train(config("finetune", "alone", SHARED, {"accumulation": 2}), base=tiny_base("sd15"))
    together = config("finetune", "together", SHARED)
    debug_launcher(_train, args=(together,), num_processes=2)
    assert alone.delta is not None
    one, two = read(alone.delta), read(alone.folder.with_name("together"))
    for (name, a), (_, b) in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def _train(config: RunConfig) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # the fork brought that of the one process
    train(config, base=tiny_base("sd15"))
