"""Seeded faults: what other trainers get wrong without a word is done here on purpose, and must be caught each time."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.ground import tiny_base
from tests.train.killed import kept
from vgm_peft.config import Table, merge
from vgm_peft.data.order import Order
from vgm_peft.errors import DeltaError, SaveError, TrainError, VgmError
from vgm_peft.formats import canonical, native
from vgm_peft.train import checkpoint, loop, optimisers, train
from vgm_peft.train.config import RunConfig, bind, table
from vgm_peft.train.learner import Learner
from vgm_peft.train.optim import MovingAverage
from vgm_peft.train.task import Turn
from vgm_peft.train.tasks.finetune import FineTune

Make = Callable[..., RunConfig]
Patch = pytest.MonkeyPatch
QUICK: Table = {
    "steps": 5,
    "ema": 0.9,
    "data": {"batch": 1, "flip": True, "caption_dropout": 0.3},
    "delta": {"sites": ["cross-attention"], "dropout": 0.3},
    "optimiser": {"schedule": "linear", "warmup": 1},
    "checkpoint": {"every": 2, "keep": 9, "leave": 9},
}


def _last_good(folder: Path) -> str:
    return max(p.name for p in (folder / "checkpoints").glob("step-*"))


def test_a_rate_of_zero(config: Make) -> None:
    quick = config("finetune", "run", QUICK, {"optimiser": {"lr": 0.0}})
    with pytest.raises(TrainError, match=r"nothing was learned at (\d+) of \1 places"):
        train(quick, base=tiny_base("sd15"))
    assert not Path(quick.output, "delta.safetensors").exists()


def test_a_parameter_that_the_optimiser_was_not_given(config: Make, monkeypatch: Patch) -> None:
    whole = optimisers.build_optimiser

    def forgetful(groups: Any, settings: Any) -> torch.optim.Optimizer:
        optimiser = whole(groups, settings)
        del optimiser.param_groups[0]["params"][-2:]
        return optimiser

    monkeypatch.setattr(loop, "build_optimiser", forgetful)
    with pytest.raises(TrainError, match=r"nothing was learned at 1 of \d+ places \(unet\.mid_block\.attentions"):
        train(config("finetune", "run", QUICK), base=tiny_base("sd15"))


def test_a_part_cut_off_from_the_loss_is_told_on_the_way_and_refused_at_the_end(
    config: Make, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Learner, "trains_text", False)  # its prompts come from the cache
    quick = config("finetune", "run", QUICK, {"delta": {"text": True}})
    with pytest.raises(TrainError, match=r"places \(text_encoder\."):
        train(quick, base=tiny_base("sd15"))
    assert "warning: step 4: no gradient has reached 8 of" in capsys.readouterr().out
    lines = [json.loads(line) for line in Path(quick.output, "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "warnings" in line] == [4]


def test_a_loss_that_is_no_number(config: Make, monkeypatch: Patch) -> None:
    plain = FineTune.loss

    def poisoned(self: FineTune, batch: Any, turn: Turn) -> Tensor:
        return plain(self, batch, turn) * (float("nan") if turn.number == 3 and not turn.held_out else 1.0)

    monkeypatch.setattr(FineTune, "loss", poisoned)
    quick = config("finetune", "run", QUICK)
    with pytest.raises(TrainError, match="the loss of step 4 is nan"):
        train(quick, base=tiny_base("sd15"))
    _goes_on_from(quick, "step-000002", monkeypatch)


def test_one_gradient_that_is_infinite_is_named(config: Make, monkeypatch: Patch) -> None:
    plain, name = loop._backward, ""

    def poisoned(desk: loop.Desk, micro: int) -> Tensor:
        nonlocal name
        loss = plain(desk, micro)
        if desk.state.step == 4:
            name, parameter = list(desk.state.parameters.items())[7]
            assert parameter.grad is not None
            parameter.grad.view(-1)[0] = float("inf")
        return loss

    monkeypatch.setattr(loop, "_backward", poisoned)
    quick = config("finetune", "run", QUICK)
    with pytest.raises(TrainError) as refused:
        train(quick, base=tiny_base("sd15"))
    assert f"the gradient of step 5 is inf, in {name};" in str(refused.value)
    _goes_on_from(quick, "step-000004", monkeypatch)


def _goes_on_from(quick: RunConfig, last: str, monkeypatch: Patch) -> None:
    """The last good checkpoint is there, nothing was handed on, and without the fault the run ends well."""
    folder = Path(quick.output)
    assert _last_good(folder) == last and not (folder / "delta.safetensors").exists()
    monkeypatch.undo()
    assert train(quick, resume=folder, base=tiny_base("sd15")).finished


def test_parameters_that_move_but_play_no_part(config: Make, monkeypatch: Patch) -> None:
    """As when the scale of a delta is lost between training and use."""
    plain = Learner.evaluating

    def silent(self: Learner) -> Any:
        assert self.attachment is not None
        self.attachment.strength = 0.0
        return plain(self)

    monkeypatch.setattr(Learner, "evaluating", silent)

    def loud(self: FineTune, batch: Any, turn: Turn) -> Tensor:
        if not turn.held_out and self.learner.attachment is not None:
            self.learner.attachment.strength = 1.0
        return plain_loss(self, batch, turn)

    plain_loss = FineTune.loss
    monkeypatch.setattr(FineTune, "loss", loud)
    with pytest.raises(TrainError, match="predicts exactly what it did before the run"):
        train(config("finetune", "run", QUICK), base=tiny_base("sd15"))


def test_alpha_lost_in_the_file(config: Make, monkeypatch: Patch) -> None:
    plain = native._json

    def forgetful(value: Any) -> str:
        return plain({**value, "options": {**value["options"], "alpha": 1.0}} if "options" in value else value)

    monkeypatch.setattr(native, "_json", forgetful)
    quick = config("finetune", "run", QUICK, {"delta": {"alpha": 8.0}})
    with pytest.raises((SaveError, DeltaError)):
        train(quick, base=tiny_base("sd15"))
    assert not Path(quick.output, "delta.safetensors").exists()


def test_a_delta_of_zeros_in_the_file(config: Make, monkeypatch: Patch) -> None:
    plain = canonical.save_file

    def zeros(tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Path:
        return plain({name: torch.zeros_like(t) for name, t in tensors.items()}, *args, **kwargs)

    monkeypatch.setattr("vgm_peft.formats.save_file", zeros, raising=False)
    monkeypatch.setattr("vgm_peft.formats.format.save_file", zeros, raising=False)
    quick = config("finetune", "run", QUICK)
    with pytest.raises(VgmError):
        train(quick, base=tiny_base("sd15"))
    assert not Path(quick.output, "delta.safetensors").exists()


def _no_schedule(patch: Patch) -> None:
    plain = loop.set_rates
    patch.setattr(loop, "set_rates", lambda o, c, step, steps: plain(o, c, step - 2, steps))


def _no_chance(patch: Patch) -> None:
    plain = Turn.value
    patch.setattr(Turn, "value", lambda self, purpose="": plain(Turn(self.seed, self.number - 2, self.held_out), purpose))


def _no_dropout_chance(patch: Patch) -> None:
    plain = torch.manual_seed
    patch.setattr(torch, "manual_seed", lambda seed: plain(seed + 1))


def _no_order(patch: Patch) -> None:
    plain = Order.batch
    patch.setattr(Order, "batch", lambda self, step: plain(self, max(0, step - 1)))


def _no_optimiser(patch: Patch) -> None:
    plain = checkpoint._read

    def read(folder: Path) -> Any:
        facts, tensors = plain(folder)
        return facts, {n: t.zero_() if n.endswith("/exp_avg") else t for n, t in tensors.items()}

    patch.setattr(checkpoint, "_read", read)


def _no_average(patch: Patch) -> None:
    plain = checkpoint._put

    def put(folder: Path, state: Any, tensors: Any) -> None:
        plain(folder, state, tensors)
        for shadow in state.average.shadow:
            shadow.add_(1e-3)

    patch.setattr(checkpoint, "_put", put)


def _no_count_of_the_average(patch: Patch) -> None:
    plain = MovingAverage.update
    patch.setattr(MovingAverage, "update", lambda self, steps: plain(self, steps - 2))


def _one_step_twice(patch: Patch) -> None:
    plain = checkpoint._apply

    def apply(folder: Path, state: Any, *rest: Any) -> None:
        plain(folder, state, *rest)
        state.step -= 1

    patch.setattr(checkpoint, "_apply", apply)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    """Filled by the first test that needs it: the uninterrupted run, and its folder as it was after two steps."""
    return {}


@pytest.mark.parametrize(
    "fault",
    [
        None,
        _no_schedule,
        _no_chance,
        _no_dropout_chance,
        _no_order,
        _no_optimiser,
        _no_average,
        _no_count_of_the_average,
        _one_step_twice,
    ],
)
def test_what_is_not_restored_shows_in_the_bytes(
    fault: "Callable[[Patch], None] | None", whole: dict[str, RunConfig], config: Make, monkeypatch: Patch
) -> None:
    """The comparison that the tests of `kill -9` make tells each of these apart; without a fault there is nothing to tell."""
    if not whole:
        made = config("finetune", "whole", QUICK)
        train(made, base=tiny_base("sd15"))
        whole["run"] = made
    made = whole["run"]
    halves = bind(merge(table(made), {"output": made.output + "-half"}))
    shutil.rmtree(halves.output, ignore_errors=True)
    shutil.copytree(made.output, halves.output)
    for later in ("checkpoints/step-000004", "checkpoints/step-000005"):
        shutil.rmtree(Path(halves.output, later))
    Path(halves.output, "delta.safetensors").unlink()
    if fault is not None:
        fault(monkeypatch)
    train(halves, resume=Path(halves.output), base=tiny_base("sd15"))
    monkeypatch.undo()
    same = kept(Path(halves.output)) == kept(Path(made.output))
    assert same == (fault is None)


def test_the_base_comes_back_after_a_fault(config: Make, monkeypatch: Patch) -> None:
    base = tiny_base("sd15")
    before = {name: t.clone() for name, t in base.denoiser.state_dict().items()}
    monkeypatch.setattr(FineTune, "loss", lambda self, batch, turn: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(TrainError):
        train(config("finetune", "run", QUICK), base=base)
    assert all(torch.equal(before[n], t) for n, t in base.denoiser.state_dict().items())
    assert not any(m._forward_hooks for m in base.denoiser.modules())
