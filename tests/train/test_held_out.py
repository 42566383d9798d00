"""Knowing when to stop: what is measured is never trained on, the best step is the result, and a kill changes nothing of it."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from tests.train.ground import tiny_base
from vgm_peft.config import Table
from vgm_peft.data import Cache, scan
from vgm_peft.errors import ConfigError
from vgm_peft.formats import read
from vgm_peft.train import train
from vgm_peft.train.config import RunConfig, bind
from vgm_peft.train.pictures import Pictures, held_out
from vgm_peft.train.task import Setup, Turn

Make = Callable[..., RunConfig]
TOO_LONG: Table = {
    "steps": 12,
    "data": {"batch": 1},
    "delta": {"sites": ["cross-attention"], "dropout": 0.2},
    "optimiser": {"lr": 0.3, "clip": 0.0},
    "checkpoint": {"every": 4},
}
"""A rate at which a run soon gets worse."""


@pytest.mark.parametrize("more", [{}, {"ema": 0.5}, {"optimiser": {"name": "schedule-free"}}], ids=["plain", "ema", "own"])
def test_a_run_that_goes_on_too_long_stops_and_returns_its_best(more: Table, config: Make) -> None:
    """Also where what is used are averages, which must be those of that step."""
    watched: Table = {"held_out": {"every": 1, "draws": 2, "stop_when_worse": 3}}
    result = train(config("finetune", "watched", TOO_LONG, watched, more), base=tiny_base("sd15"))
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["held_out"] for line in lines]
    best = losses.index(min(losses)) + 1
    assert best + 3 == len(losses) == result.steps < 12 and result.finished
    assert result.weights == f"step {best} of {len(losses)}, which had the lowest held-out loss: {min(losses):.4g}"
    assert [p.name for p in (result.folder / "checkpoints" / "best").iterdir()] == [f"step-{best:06d}"]
    assert f"step-{result.steps:06d}" in {p.name for p in (result.folder / "checkpoints").iterdir()}

    plain = train(config("finetune", "plain", TOO_LONG, {"steps": best}, more), base=tiny_base("sd15"))
    assert plain.delta is not None and result.delta is not None
    ours, theirs = (dict(read(path).parameters()) for path in (result.delta, plain.delta))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert any("no pictures are kept back" in notice for notice in result.notices)
    assert best < 12 and f"at step {best}" in (result.folder / "report.html").read_text()


def test_a_subject_of_the_toybox_is_overlearned_soon_and_the_earlier_delta_is_returned(tmp_path: Path) -> None:
    """Four pictures are learned by heart within some ten steps; the fifth, which is kept back, tells."""
    settings: Table = {
        "task": {"name": "dreambooth", "class_prompt": "a robot", "prior_weight": 0.0},
        "base": "toybox",
        "output": str(tmp_path / "run"),
        "steps": 60,
        "data": {"images": str(Path(__file__).parents[2] / "assets" / "subjects" / "robot"), "batch": 2},
        "delta": {"rank": 4, "sites": ["all"]},
        "optimiser": {"lr": 0.01, "weight_decay": 0.0},
        "loss": {"stratified": True},
        "preview": {"count": 0},
        "held_out": {"every": 5, "pictures": 1, "draws": 8, "stop_when_worse": 2},
        "checkpoint": {"every": 60},
    }
    result = train(bind(settings))
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["held_out"] for line in lines if "held_out" in line}
    best = min(losses, key=lambda step: losses[step])
    assert best + 10 == result.steps < 60 and losses[result.steps] > losses[best] and result.delta is not None
    kept = load_file(result.folder / "checkpoints" / "best" / f"step-{best:06d}" / "state.safetensors")
    last = load_file(result.folder / "checkpoints" / f"step-{result.steps:06d}" / "state.safetensors")
    values = dict(read(result.delta).parameters())
    assert all(torch.equal(p, kept[f"parameter/{name}"]) for name, p in values.items())
    assert not any(torch.equal(p, last[f"parameter/{name}"]) for name, p in values.items())


def test_measuring_changes_nothing_of_the_training(config: Make) -> None:
    """Without it, every step has the same loss to the last bit."""
    short: Table = {"steps": 3, "optimiser": {"lr": 1e-2}}
    losses: list[list[float]] = []
    for name, more in (("plain", {}), ("watched", {"held_out": {"every": 1, "draws": 2}})):
        folder = train(config("finetune", name, TOO_LONG, short, more), base=tiny_base("sd15")).folder
        losses.append([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("repeats", [1, 3])
def test_pictures_kept_back_are_measured_and_never_trained_on(repeats: int, config: Make) -> None:
    settings = config("finetune", "run", {"data": {"flip": True, "batch": 1}, "held_out": {"every": 1, "pictures": 1}})
    with ExitStack() as cleanup:
        setup = Setup(settings, tiny_base("sd15"), Cache(), Accelerator(), cleanup)
        pictures = Pictures(scan(Path(settings.data.images)).examples, setup)
    back = held_out(3, settings)
    trained = {cut.example for number in range(40) for cut in pictures.draw(Turn(repeats, number)).cuts}
    measured = {cut.example for number in range(10) for cut in pictures.draw(Turn(repeats, number, held_out=True)).cuts}
    assert len(back) == 1 and measured == back and trained == {0, 1, 2} - back


def test_training_needs_pictures_too(config: Make) -> None:
    with pytest.raises(ConfigError, match=r"held_out.pictures = 3 of 3 pictures"):
        train(config("finetune", "run", {"held_out": {"every": 1, "pictures": 3}}), base=tiny_base("sd15"))
    for unmeasured in ({"pictures": 1}, {"stop_when_worse": 2}):
        with pytest.raises(ConfigError, match="nothing is measured"):
            bind({"held_out": unmeasured})
