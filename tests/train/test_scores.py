"""Scores of drawn pictures: they decide when to stop, change nothing of the training, and go on exactly after a kill."""

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.scorer_makers import SUBJECTS, model_of
from tests.train.ground import tiny_base
from tests.train.killed import kept
from vgm_peft.config import Table, merge
from vgm_peft.errors import ConfigError, VgmError
from vgm_peft.formats import read
from vgm_peft.scores.clip import ClipScorer
from vgm_peft.train import train
from vgm_peft.train.config import RunConfig, bind
from vgm_peft.train.exam import PLACES, Exam
from vgm_peft.train.journal import Journal, Taken
from vgm_peft.train.origin import differences, origin
from vgm_peft.train.recipes import portable

Make = Callable[..., RunConfig]
SPOILT: Table = {
    "steps": 4,
    "data": {"batch": 2},
    "delta": {"sites": ["cross-attention"], "dropout": 0.2},
    "optimiser": {"lr": 0.3, "clip": 0.0},
    "checkpoint": {"every": 0, "leave": 9},
}
"""A rate at which pictures change with every step."""
SCORED: Table = {"scores": {"every": 1, "by": "clip", "pictures": 2, "steps": 1}}


def scored(*more: Table) -> Table:
    return merge(SPOILT, SCORED, {"scores": {"model": model_of("clip")}}, *more)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def totals_of(folder: Path) -> dict[int, float]:
    return {line["step"]: line["scores"]["total"] for line in lines_of(folder) if "scores" in line}


def test_the_best_step_by_the_scores_is_the_result_and_a_killed_run_finds_the_same(config: Make, tmp_path: Path) -> None:
    """Also one that is killed after it measured, before that is recorded or saved; and nothing of the training is changed."""
    settings = scored({"checkpoint": {"every": 2}})
    whole = train(config("dreambooth", "whole", settings), base=tiny_base("sd15"))
    totals = totals_of(whole.folder)
    best = max(totals, key=lambda step: totals[step])
    assert list(totals) == [1, 2, 3, 4] and len(set(totals.values())) == 4 and best < 4
    facts = json.loads((whole.folder / "manifest.json").read_text())
    manifest = facts["scores"]
    assert whole.weights == facts["weights"] == f"step {best} of 4, whose pictures scored best: total {totals[best]:.4g}"
    assert manifest["by"] == "clip" and manifest["base"]["drift"] == 0.0 and len(manifest["sha256"]) == 64
    page = (whole.folder / "report.html").read_text()
    assert f"step {best} of 4 measured" in page and "scores by step" in page

    plain = train(config("dreambooth", "plain", SPOILT, {"steps": best}), base=tiny_base("sd15"))
    assert plain.delta is not None and whole.delta is not None and plain.weights == f"step {best}, the last"
    ours, theirs = (dict(read(path).parameters()) for path in (whole.delta, plain.delta))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    both = [[line["loss"] for line in lines_of(run.folder)[:best]] for run in (whole, plain)]
    assert both[0] == both[1]

    broken = config("dreambooth", "broken", settings)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Journal, "step", dying_at(3))
        train(broken, base=tiny_base("sd15"))
    resumed = train(broken, resume=tmp_path / "broken", base=tiny_base("sd15"))
    assert kept(resumed.folder) == kept(whole.folder)
    state = json.loads((whole.folder / "checkpoints" / "best" / f"step-{best:06d}" / "state.json").read_text())
    assert state["origin"]["the scorer (SHA-256)"] == manifest["sha256"]


class Killed(BaseException):
    """Nothing in the package catches it."""


def dying_at(step: int) -> Callable[[Journal, int, Taken], None]:
    """A record that is never written for this step."""
    record = Journal.step

    def last(journal: Journal, number: int, taken: Taken) -> None:
        if number == step:
            raise Killed
        record(journal, number, taken)

    return last


def test_scores_that_do_not_decide_leave_that_to_the_held_out_loss(config: Make) -> None:
    more: Table = {"scores": {"decide": False}, "held_out": {"every": 1, "draws": 1, "stop_when_worse": 1}}
    run = train(config("finetune", "run", scored({"optimiser": {"lr": 1.0}}, more)), base=tiny_base("sd15")).folder
    lines = lines_of(run)
    losses = [line["held_out"] for line in lines]
    assert len(lines) < 4 and losses[-1] >= min(losses) == losses[-2]
    assert [p.name for p in (run / "checkpoints" / "best").iterdir()] == [f"step-{len(lines) - 1:06d}"]
    assert "drift" not in lines[-1]["scores"]  # a fine-tune may change all there is


def test_scores_that_have_not_left_zero_yet_stop_nothing(config: Make) -> None:
    """Of a subject that nothing shows yet, the oracles say exactly 0."""
    plan: Table = {"every": 1, "by": "oracles", "pictures": 1, "steps": 1, "stop_when_worse": 1}
    word: Table = {"task": {"token": "<toy>", "init_word": "robot"}, "steps": 2, "scores": plan}
    result = train(config("textual-inversion", "run", word), base=tiny_base("sd15"))
    assert totals_of(result.folder) == {1: 0.0, 2: 0.0}
    assert [p.name for p in (result.folder / "checkpoints" / "best").iterdir()] == ["step-000002"]


def test_a_style_of_the_toybox_is_returned_as_it_was_when_it_was_drawn_best(tmp_path: Path) -> None:
    """At a rate that learns the style in some eight steps and then spoils the base, of which the training loss says nothing."""
    settings: Table = {
        "task": {"name": "finetune"},
        "output": str(tmp_path / "run"),
        "steps": 20,
        "data": {"images": str(SUBJECTS.parent / "styles" / "toon"), "batch": 2},
        "delta": {"rank": 4, "sites": ["all"]},
        "optimiser": {"lr": 0.02, "weight_decay": 0.0},
        "loss": {"stratified": True},
        "preview": {"count": 0},
        "scores": {"every": 4, "pictures": 3, "steps": 6, "stop_when_worse": 1},
        "checkpoint": {"every": 20},
    }
    result = train(bind(settings))
    totals = totals_of(result.folder)
    best = max(totals, key=lambda step: totals[step])
    base = json.loads((result.folder / "manifest.json").read_text())["scores"]["base"]["total"]
    assert best + 4 == result.steps < 20 and totals[best] > base + 0.2 and result.delta is not None
    kept_then = load_file(result.folder / "checkpoints" / "best" / f"step-{best:06d}" / "state.safetensors")
    last = load_file(result.folder / "checkpoints" / f"step-{result.steps:06d}" / "state.safetensors")
    values = dict(read(result.delta).parameters())
    assert all(torch.equal(p, kept_then[f"parameter/{name}"]) for name, p in values.items())
    assert not any(torch.equal(p, last[f"parameter/{name}"]) for name, p in values.items())


def test_mistakes_are_told_before_a_base_is_read(config: Make, tmp_path: Path) -> None:
    """The base does not exist, and nothing gets as far as to notice."""
    on: Table = {"base": str(tmp_path / "no base"), "scores": {"every": 1}}
    for more, error in (
        ({}, "not what scores pictures of .*no base; expected scores.by = one of oracles, clip, dino"),
        ({"scores": {"by": "clip"}}, "no model is named to score by clip"),
        ({"scores": {"by": "dino", "model": model_of("clip")}}, "a model of type 'clip'; expected dinov2"),
        ({"scores": {"by": "clip", "model": str(tmp_path / "gone")}}, "gone.: no such folder"),
    ):
        with pytest.raises(VgmError, match=error):
            train(config("dreambooth", "run", on, more))
    with pytest.raises(ConfigError, match="controlnet runs have no scores"):
        train(config("controlnet", "run", {"scores": {"every": 1}}))
    for more, error in (
        ({"scores": {"by": "clop"}}, 'scores: unknown scorer "clop"'),
        ({"scores": {"stop_when_worse": 1}}, "nothing is measured"),
        ({"scores": {"every": 1, "decide": False, "stop_when_worse": 1}}, "the scores do not decide"),
        ({"scores": {"every": 1}, "held_out": {"every": 1, "stop_when_worse": 1}}, "but the scores decide"),
    ):
        with pytest.raises(ConfigError, match=error):
            config("dreambooth", "run", more)
    assert config("dreambooth", "run", {"scores": {"every": 1}}).scores.by == "oracles"


def test_a_scorer_may_lie_elsewhere_but_be_no_other(config: Make, tmp_path: Path) -> None:
    shutil.copytree(model_of("clip"), tmp_path / "here")
    here, elsewhere = (config("finetune", "run", scored({"scores": {"model": m}})) for m in (str(tmp_path / "here"), "a/b"))
    said = portable(here, tmp_path / "run")
    assert tomllib.loads(said)["scores"]["model"] == "../here"
    assert tomllib.loads(portable(elsewhere, tmp_path / "run"))["scores"]["model"] == "a/b"
    first, second = (ClipScorer.load(str(tmp_path / "here")).digest, "0" * 64)
    assert not differences(origin(here, "base", {}, first), origin(elsewhere, "base", {}, first))
    (found,) = differences(origin(here, "base", {}, first), origin(here, "base", {}, second))
    assert found.startswith("the scorer (SHA-256) ")


def test_prompts_are_told_without_words_that_no_scorer_knows() -> None:
    exam = Exam([], words=[("sks", ""), ("<toy>", "robot"), ("", "")])
    assert exam.told("a photo of a sks car, on grass") == "a photo of a car, on grass"
    assert exam.told("a <toy> at night") == "a robot at night" and exam.told("sksy") == "sksy"
    assert exam.concepts("a <toy> and sks") == {0, 1} and exam.concepts("a car") == {0, 1, 2}
    assert len(set(PLACES)) == 6
