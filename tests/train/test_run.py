"""A run: same command, same bytes; resumed, the same bytes; stopped, saved; a folder is one run's only."""

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from tests.train.ground import files, tiny_base
from vgm_peft.attachment import Attachment
from vgm_peft.config import Table, merge
from vgm_peft.data import Cache, scan
from vgm_peft.errors import SaveError, TrainError
from vgm_peft.families import family_named
from vgm_peft.family import Base
from vgm_peft.formats import read
from vgm_peft.train import train
from vgm_peft.train.config import RunConfig, bind, table
from vgm_peft.train.learner import Learner
from vgm_peft.train.objective import Lesson, Objective
from vgm_peft.train.pictures import Pictures
from vgm_peft.train.recipes import resolve
from vgm_peft.train.task import Setup, Turn

Make = Callable[..., RunConfig]

PLAIN: Table = {"steps": 6, "delta": {"dropout": 0.3}, "data": {"caption_dropout": 0.3, "flip": True}}
RICH: Table = {
    "steps": 6,
    "accumulation": 2,
    "ema": 0.9,
    "data": {"batch": 1},
    "delta": {"text": True, "rank_dropout": 0.2, "module_dropout": 0.8},
    "optimiser": {"schedule": "cosine", "warmup": 2, "text_lr": 1e-3},
    "loss": {"min_snr": 5.0, "noise_offset": 0.05, "stratified": True},
}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("settings", [PLAIN, RICH], ids=["plain", "rich"])
def test_a_resumed_run_is_the_uninterrupted_one(settings: Table, config: Make) -> None:
    every: Table = {"checkpoint": {"every": 3}}
    whole = train(config("dreambooth", "whole", settings, every), base=tiny_base("sd15"))
    parts = config("dreambooth", "parts", settings, every)
    stopped = _interrupted(parts, after=2)
    assert not stopped.finished and stopped.delta is None and 2 <= stopped.steps < 6
    torch.rand(7)  # the caller's chance plays no part
    resumed = train(parts, resume=stopped.folder, base=tiny_base("sd15"))

    assert resumed.finished and resumed.delta is not None and whole.delta is not None
    assert digest(resumed.delta) == digest(whole.delta)
    last = Path("checkpoints", "step-000006", "state.safetensors")
    assert digest(resumed.folder / last) == digest(whole.folder / last)
    assert _losses(resumed.folder) == _losses(whole.folder)


def _interrupted(config: RunConfig, after: int):  # noqa: ANN202
    """Run in this process until `after` steps are recorded, then send it Ctrl-C."""
    metrics = Path(config.output, "metrics.jsonl")

    def press() -> None:
        for _ in range(6000):
            if metrics.exists() and metrics.read_text().count("\n") >= after:
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=press)
    thread.start()
    try:
        return train(config, base=tiny_base("sd15"))
    finally:
        thread.join()


def _losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def test_the_resolved_recipe_repeats_the_run(config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(config(), base=tiny_base("sd15"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = resolve({"output": "again"}, first.folder / "run.toml").config
    second = train(again, base=tiny_base("sd15"))
    assert first.delta is not None and second.delta is not None
    assert digest(first.delta) == digest(second.delta)
    assert str(tmp_path) not in (first.folder / "run.toml").read_text() + (first.folder / "manifest.json").read_text()
    other = train(config("dreambooth", "other", {"seed": 1}), base=tiny_base("sd15"))
    assert other.delta is not None and digest(other.delta) != digest(first.delta)


def test_configurations_survive_their_table(config: Make) -> None:
    made = config("dreambooth", "run", RICH)
    assert bind(table(made)) == made


def test_a_folder_is_one_runs_only(config: Make, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("mine")
    with pytest.raises(TrainError, match="not empty"):
        train(config(), base=tiny_base("sd15"))
    assert files(tmp_path / "run") == {"precious": b"mine"}


@pytest.mark.parametrize(
    ("change", "named"),
    [({"optimiser": {"lr": 0.02}}, "optimiser.lr"), ({"seed": 3}, "seed"), ({"data": {"batch": 1}}, "data.batch")],
)
def test_resuming_with_another_configuration_is_refused(change: Table, named: str, config: Make) -> None:
    saved = config("dreambooth", "saved", {"steps": 1, "checkpoint": {"every": 1}})
    folder = train(saved, base=tiny_base("sd15")).folder
    with pytest.raises(TrainError, match=named):
        train(bind(merge(table(saved), {"steps": 2}, change)), resume=folder, base=tiny_base("sd15"))
    further = train(bind(merge(table(saved), {"steps": 2, "preview": {"count": 0}})), resume=folder, base=tiny_base("sd15"))
    assert further.finished and further.steps == 2


def test_a_damaged_checkpoint_is_passed_over(config: Make) -> None:
    saved = config("dreambooth", "saved", {"steps": 2, "checkpoint": {"every": 1}})
    folder = train(saved, base=tiny_base("sd15")).folder
    newest = folder / "checkpoints" / "step-000002" / "state.safetensors"
    raw = bytearray(newest.read_bytes())
    raw[-7] ^= 1
    newest.write_bytes(raw)
    again = train(saved, resume=folder, base=tiny_base("sd15"))
    assert any("step-000002 is passed over" in notice for notice in again.notices) and again.steps == 2
    assert digest(folder / "checkpoints" / "step-000002" / "state.safetensors") != hashlib.sha256(raw).hexdigest()
    for file in folder.glob("checkpoints/*/state.json"):
        file.write_text("{")
    with pytest.raises(TrainError, match="no whole checkpoint"):
        train(saved, resume=folder, base=tiny_base("sd15"))


def test_a_full_disk_leaves_the_last_checkpoint(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = config("dreambooth", "saved", {"steps": 4, "checkpoint": {"every": 2}})
    real, calls = os.fsync, 0

    def fsync(number: int) -> None:
        nonlocal calls
        second = any(Path(saved.output, "checkpoints").glob("*step-000004*"))
        calls += second
        if second:
            raise OSError(28, "No space left on device")
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(SaveError, match="disk is full"):
        train(saved, base=tiny_base("sd15"))
    assert calls
    monkeypatch.undo()
    left = sorted(p.name for p in Path(saved.output, "checkpoints").iterdir())
    assert left == ["step-000002"]
    assert train(saved, resume=Path(saved.output), base=tiny_base("sd15")).finished


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"optimiser": {"lr": 0.0}}, "nothing was learned"),
        ({"optimiser": {"lr": 100.0, "clip": 0.0}}, "loss of step|gradient of step|not finite"),
    ],
)
def test_a_run_that_learned_nothing_does_not_end_well(settings: Table, says: str, config: Make) -> None:
    with pytest.raises(TrainError, match=says):
        train(config("dreambooth", "run", settings), base=tiny_base("sd15"))
    assert not Path(config().output, "delta.safetensors").exists()


def test_a_dead_part_is_named(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text encoder whose prompts come from the cache gets no gradient; weight decay must not hide that."""
    monkeypatch.setattr(Learner, "trains_text", False)
    with pytest.raises(TrainError, match=r"at \d+ of \d+ places \(text_encoder\."):
        train(config("dreambooth", "run", {"delta": {"text": True}}), base=tiny_base("sd15"))


def test_the_delta_lowers_the_loss_it_was_trained_on(config: Make) -> None:
    base, settings = tiny_base("sd15"), config("finetune", "run", {"steps": 12, "delta": {"sites": ["all"]}})
    with ExitStack() as cleanup:
        setup = Setup(settings, base, Cache(), Accelerator(), cleanup)
        pictures = Pictures(scan(Path(settings.data.images)).examples, setup)
    result = train(settings, base=base)
    assert result.delta is not None

    def loss() -> float:
        objective, total = Objective.of(base, settings.loss), 0.0
        for number in range(1000, 1008):  # noise that training never saw
            turn = Turn(7, number)
            shown = pictures.draw(turn)
            condition = base.family.encode_prompt(base, shown.captions)
            total += float(objective.losses(Lesson(shown.x0, condition, shown.sizes), turn).mean())
        return total / 8

    with torch.no_grad():
        before = loss()
        with Attachment(base.parts, read(result.delta, base)):
            after = loss()
    assert after < 0.97 * before


@pytest.mark.parametrize(
    ("task", "delta"), [("finetune", "lora"), ("controlnet", ""), ("controlnet-xs", ""), ("dreambooth", "tlora")]
)
def test_checkpointing_activations_changes_nothing_but_memory(task: str, delta: str, config: Make) -> None:
    """Not even where the base is asked as a teacher in between, at other timesteps, and the delta follows these."""
    more: Table = {"steps": 2, **({"delta": {"kind": delta, "rank": 2}} if delta else {})}
    plain = train(config(task, "plain", more), base=tiny_base("sd15"))
    lean = train(config(task, "lean", more, {"compute": {"gradient_checkpointing": True}}), base=tiny_base("sd15"))
    for (_, a), (_, b) in zip(_losses(plain.folder), _losses(lean.folder), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in tiny_base("sd15").denoiser.modules())


def test_bf16_keeps_the_trained_values_in_float32(config: Make) -> None:
    found = family_named("sd15")
    base = Base(found.tiny(), found, "tiny")
    result = train(
        config("dreambooth", "run", {"steps": 2, "compute": {"precision": "bf16"}, "preview": {"count": 1}}), base=base
    )
    assert next(base.denoiser.parameters()).dtype == torch.bfloat16 and result.delta is not None
    assert {p.dtype for _, p in read(result.delta).parameters()} == {torch.float32}


def test_the_callers_chance_is_left_alone(config: Make) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(config("dreambooth", "run", {"steps": 1, "preview": {"count": 1}}), base=tiny_base("sd15"))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_of_the_class_nothing_is_asked_but_to_stay(family: str, text: bool, config: Make) -> None:
    """A fresh delta has nothing to unlearn: whatever the prior weighs, the first loss is the same; the paper's is not."""

    def first(prior: str, weight: float) -> float:
        task: Table = {"prior": prior, "prior_weight": weight}
        more: Table = {"steps": 2, "task": task, "delta": {"text": text}}
        return _losses(train(config("dreambooth", f"{prior}-{weight}", more), base=tiny_base(family)).folder)[0][1]

    assert first("base", 1.0) == pytest.approx(first("base", 1000.0), rel=1e-4)
    assert first("pictures", 1000.0) > 100 * first("pictures", 1.0)


def test_no_more_checkpoints_are_left_than_are_kept(config: Callable[..., RunConfig]) -> None:
    """Found by a kill between the last checkpoint and the removal of the one before: nothing is saved again after that."""
    made = [config("finetune", "run", {"checkpoint": {"every": 1, "keep": keep, "leave": 2}}) for keep in (2, 1)]
    train(made[0], base=tiny_base("sd15"))
    folder = Path(made[0].output)
    assert len(list((folder / "checkpoints").glob("step-*"))) == 2
    train(made[1], resume=folder, base=tiny_base("sd15"))
    assert [p.name for p in (folder / "checkpoints").glob("step-*")] == ["step-000004"]
