"""Schedules, the moving average, timesteps, prompts with a token, journals: the small parts by themselves."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn

from tests.train.ground import tiny_base
from vgm_peft.config import Table
from vgm_peft.deltas import TABLE as DELTAS
from vgm_peft.errors import ConfigError, SaveError
from vgm_peft.train.config import DeltaConfig, bind, table
from vgm_peft.train.config_learning import LossConfig, OptimiserConfig
from vgm_peft.train.journal import Journal, Taken
from vgm_peft.train.losses import timesteps
from vgm_peft.train.objective import Lesson, Objective
from vgm_peft.train.optim import MovingAverage, rate_factor, set_rates
from vgm_peft.train.recipes import read_recipe, resolve, shipped_folder, shipped_recipe
from vgm_peft.train.task import Turn
from vgm_peft.train.tasks import TABLE
from vgm_peft.train.tasks.dreambooth import common_start, noun_of, with_token


@pytest.mark.parametrize(("ours", "theirs"), [("constant", "constant"), ("linear", "linear"), ("cosine", "cosine")])
def test_schedules_are_those_of_diffusers(ours: str, theirs: str) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([parameter], lr=1.0)
    reference = get_scheduler(theirs, optimiser, num_warmup_steps=0, num_training_steps=20)
    for step in range(20):
        assert rate_factor(ours, step, 20) == pytest.approx(optimiser.param_groups[0]["lr"], abs=1e-12)  # type: ignore[arg-type]
        optimiser.step()
        reference.step()


def test_warm_up_reaches_the_peak_and_never_starts_at_nothing() -> None:
    factors = [rate_factor("cosine", step, 10, warmup=4) for step in range(10)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and factors[-1] > 0 and factors == sorted(factors[:4]) + factors[4:]
    assert rate_factor("polynomial", 5, 10) == 0.25
    assert rate_factor("inverse_sqrt", 12, 100, warmup=4) == pytest.approx(math.sqrt(4 / 12))


def test_rates_follow_each_groups_peak() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr, "peak": lr} for lr in (1.0, 0.1)]
    optimiser = torch.optim.AdamW(groups)
    assert set_rates(optimiser, OptimiserConfig(schedule="linear"), 5, 10) == 0.5
    assert [g["lr"] for g in optimiser.param_groups] == [0.5, 0.05]


def test_moving_average_equals_its_closed_form() -> None:
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    average, expected = MovingAverage([parameter], 0.8), torch.zeros(2, dtype=torch.float64)
    for step in range(1, 20):
        with torch.no_grad():
            parameter.copy_(torch.tensor([step, step**2]))
        average.update(step)
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter.detach()
    with average.in_place():
        assert torch.allclose(parameter, expected, rtol=1e-12)
    assert parameter.tolist() == [19.0, 361.0]


def test_turns_are_independent_and_repeatable() -> None:
    assert Turn(0, 1).value("a") == Turn(0, 1).value("a")
    values = {Turn(seed, number).value(purpose) for seed in range(3) for number in range(50) for purpose in ("", "a")}
    assert len(values) == 300 and all(0 <= v < 2**63 for v in values)


def test_stratified_timesteps_cover_the_schedule() -> None:
    objective = Objective.of(tiny_base("sd15"), LossConfig(stratified=True))
    for seed in range(20):
        t = timesteps(8, torch.Generator().manual_seed(seed), objective.process, objective.config)
        assert sorted((t // 125).tolist()) == list(range(8))


def test_min_snr_and_offset_change_the_loss_as_they_say() -> None:
    base, turn = tiny_base("sd15"), Turn(0, 0)
    x0 = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        condition = base.family.encode_prompt(base, ["a robot"] * 4)
        losses = {
            name: Objective.of(base, config).losses(Lesson(x0, condition, torch.zeros(4, 6)), turn)
            for name, config in {
                "plain": LossConfig(),
                "snr": LossConfig(min_snr=5.0),
                "offset": LossConfig(noise_offset=0.1),
            }.items()
        }
    t = timesteps(4, _after_noise(turn, x0.shape), base.process, LossConfig())
    assert torch.allclose(losses["snr"], losses["plain"] * base.process.weight(t, 5.0))
    assert not torch.equal(losses["offset"], losses["plain"])


def _after_noise(turn: Turn, shape: torch.Size) -> torch.Generator:
    generator = turn.generator("noise")
    torch.randn(shape, generator=generator)
    return generator


@pytest.mark.parametrize(
    ("text", "noun", "expected"),
    [
        ("a robot", "", "a sks robot"),
        ("a photo of a red robot", "", "a photo of a sks red robot"),
        ("robot", "", "sks robot"),
        ("", "", "sks"),
        ("a big robot on the grass", "robot", "a big sks robot on the grass"),
        ("Robots and a Robot", "robot", "Robots and a sks Robot"),
    ],
)
def test_the_token_goes_before_the_noun(text: str, noun: str, expected: str) -> None:
    assert with_token(text, "sks", noun) == expected


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (["a photo of a car on sand", "a photo of a car in the sky"], "a photo of a car"),
        (["a photo of a car on sand", "a photo of a car on grass"], "a photo of a car"),
        (["a car", "a car"], "a car"),
        (["a car", "the car"], ""),
    ],
)
def test_what_all_captions_begin_with(captions: list[str], expected: str) -> None:
    assert common_start(captions) == expected


def test_the_noun_of_a_class_prompt() -> None:
    assert [noun_of(t) for t in ("a robot", "a photo of an old robot", "robot")] == ["robot", "old robot", "robot"]


def test_a_journal_goes_on_where_the_run_does(tmp_path: Path) -> None:
    with Journal(tmp_path, 0, 5) as journal:
        for step in range(1, 5):
            journal.step(step, Taken(0.5, 0.1, 1.0))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    with Journal(tmp_path, 2, 5) as journal:
        journal.step(3, Taken(0.25, 0.1, 1.0))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 0.5), (3, 0.25)]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert {e.step: e.value for e in events.Scalars("train/loss")}[3] == 0.25


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_journal_on_a_full_disk_says_so(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="disk is full"), Journal(tmp_path, 0, 5) as journal:
        journal._file = open("/dev/full", "w")
        journal.step(1, Taken(0.5, 0.1, 1.0))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"stepz": 3}, 'did you mean "steps"'),
        ({"optimiser": {"learning_rate": 3}}, "optimiser.learning_rate"),
        ({"delta": {"rnak": 3}}, 'did you mean "rank"'),
        ({"delta": {"kind": "lroa"}}, 'did you mean "lora"'),
        ({"task": {"name": "dreamboth"}}, 'did you mean "dreambooth"'),
        ({"task": {"toke": "x"}}, 'did you mean "token"'),
        ({"task": {"name": "textual-inversion"}, "delta": {"rank": 3}}, "trains no delta"),
        ({"steps": 0}, "steps = 0"),
        ({"steps": "many"}, "a whole number"),
        ({"optimiser": {"lr": float("nan")}}, "optimiser.*lr = nan"),
        ({"steps": 3, "optimiser": {"warmup": 3}}, "warmup"),
        ({"compute": {"precision": "fp8"}}, "'bf16'"),
    ],
)
def test_a_mistake_in_the_configuration_is_named(given: Table, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        bind(given)


def test_recipes_extend_and_their_paths_are_their_own(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.toml").write_text('steps = 7\nseed = 1\n[data]\nimages = "me"\n[task]\nname = "finetune"\n')
    (tmp_path / "sub" / "over.toml").write_text('extends = "../base.toml"\nseed = 2\n')
    found = read_recipe(tmp_path / "sub" / "over.toml")
    assert found == {"steps": 7, "seed": 2, "data": {"images": str(tmp_path / "me")}, "task": {"name": "finetune"}}
    (tmp_path / "base.toml").write_text('extends = "sub/over.toml"\n')
    with pytest.raises(ConfigError, match="extends itself"):
        read_recipe(tmp_path / "sub" / "over.toml")


def test_a_recipes_warm_up_gives_way_to_fewer_steps_and_the_users_own_does_not(tmp_path: Path) -> None:
    recipe = tmp_path / "long.toml"
    recipe.write_text('steps = 1000\n[task]\nname = "finetune"\n[optimiser]\nwarmup = 100\n')
    for steps, warmup in ((1, 0), (50, 5), (100, 10)):
        found = resolve({"steps": steps}, recipe)
        assert (found.config.steps, found.config.optimiser.warmup) == (steps, warmup)
        assert len(found.notices) == 1 and f"warm-up of 100 steps is cut to {warmup}" in found.notices[0]
    fitting: list[tuple[Table, int]] = [({}, 100), ({"steps": 101}, 100), ({"steps": 50, "optimiser": {"warmup": 7}}, 7)]
    for flags, warmup in fitting:
        found = resolve(flags, recipe)
        assert found.config.optimiser.warmup == warmup and not found.notices
    wrong: list[Table] = [{"steps": 50, "optimiser": {"warmup": 50}}, {"optimiser": {"warmup": 1000}}, {"steps": 0}]
    for flags in wrong:
        with pytest.raises(ConfigError, match="warmup = |steps = 0"):
            resolve(flags, recipe)
    recipe.write_text('steps = 100\n[task]\nname = "finetune"\n[optimiser]\nwarmup = 100\n')
    with pytest.raises(ConfigError, match="long.toml: optimiser.warmup = 100 of 100 steps"):
        resolve({"steps": 50}, recipe)


def test_a_recipe_for_another_method_takes_nothing_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "low.toml").write_text('[delta]\nkind = "lora"\nsites = ["all"]\nrank = 3\n[optimiser]\nlr = 0.5\n')
    (tmp_path / "more.toml").write_text('extends = "low.toml"\n[delta]\nrank = 5\n')
    (tmp_path / "other.toml").write_text('extends = "low.toml"\n[delta]\nkind = "ia3"\n')
    assert read_recipe(tmp_path / "more.toml")["delta"] == {"kind": "lora", "sites": ["all"], "rank": 5}
    assert read_recipe(tmp_path / "other.toml") == {"delta": {"kind": "ia3"}, "optimiser": {"lr": 0.5}}


@pytest.mark.parametrize("kind", DELTAS)
def test_every_method_has_a_recipe_on_the_embedded_base(kind: str) -> None:
    found = shipped_recipe("dreambooth", DeltaConfig(kind=kind), ["toybox"])
    assert found is not None and found[1]


def test_shipped_recipes_bind_and_are_found() -> None:
    folder = shipped_folder()
    assert folder is not None
    recipes = sorted(folder.glob("*.toml"))
    assert recipes
    for path in recipes:
        config = bind(read_recipe(path))
        assert path.name.startswith(config.task.name)
        assert bind(table(config)) == config
    for task in TABLE:
        config = bind({"task": {"name": task}})
        found = shipped_recipe(
            task, config.delta or (bind({}).delta if TABLE[task].trains_delta == "always" else None), ["toybox"]
        )
        assert found is not None, f"no recipe for {task} on the embedded base"
