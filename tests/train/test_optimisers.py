"""Every optimiser by name: it lowers a loss, a checkpoint restores it to the last bit, and what is missing is said."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.train.ground import tiny_base
from vgm_peft.errors import ConfigError
from vgm_peft.train import train
from vgm_peft.train.checkpoint import State, restore, save
from vgm_peft.train.config import RunConfig, bind
from vgm_peft.train.config_learning import OptimiserConfig
from vgm_peft.train.optim import MovingAverage, OwnAverage, set_rates
from vgm_peft.train.optimisers import TABLE, build_optimiser, check_optimiser, effective
from vgm_peft.train.task import Group

RATES = {"prodigy": 1.0, "adafactor": 0.1, "came": 0.02, "lion": 0.02}


def _there(name: str) -> bool:
    return not TABLE[name].device and importlib.util.find_spec(TABLE[name].module.split(".")[0]) is not None


NAMES = [pytest.param(n, marks=pytest.mark.skipif(not _there(n), reason=f"{TABLE[n].module} is not here")) for n in TABLE]
SHAPES = {"a/w": (4, 3), "b/w": (3, 4, 3, 3), "b/bias": (3,)}


def _made(name: str) -> tuple[State, OptimiserConfig]:
    """Two groups as LoRA+ has them: one learns sixteen times as fast, where the optimiser allows for it."""
    config = OptimiserConfig(name=name, lr=RATES.get(name, 0.05), warmup=0 if TABLE[name].averages else 2)
    generator = torch.Generator().manual_seed(0)
    parameters = {n: nn.Parameter(torch.randn(shape, generator=generator)) for n, shape in SHAPES.items()}
    first = {n: p for n, p in parameters.items() if n.startswith("a")}
    more = {n: p for n, p in parameters.items() if not n.startswith("a")}
    faster = config.lr * (1 if TABLE[name].one_rate else 16 if name == "adamw" else 2)
    optimiser = build_optimiser([Group(config.lr, first), Group(faster, more)], config)
    own = OwnAverage(list(parameters.values()), optimiser) if TABLE[name].averages else MovingAverage([], 0.0)
    return State(parameters, optimiser, own, origin={}), config


def _walk(state: State, config: OptimiserConfig, until: int) -> list[float]:
    losses: list[float] = []
    while state.step < until:
        set_rates(state.optimiser, config, state.step, 40)
        loss = torch.stack([((p - 0.5) ** 2 * (1 + state.step % 3)).mean() for p in state.parameters.values()]).sum()
        loss.backward()
        state.optimiser.step()
        state.optimiser.zero_grad()
        state.step += 1
        losses.append(float(loss.detach()) / (1 + (state.step - 1) % 3))
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_and_a_resumed_run_is_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    whole, config = _made(name)
    losses = _walk(whole, config, 40)
    assert losses[-1] < losses[0]
    first, _ = _made(name)
    _walk(first, config, 13)
    save(tmp_path, first, 1)
    again, _ = _made(name)
    restore(tmp_path, again, pytest.fail)
    _walk(again, config, 40)
    save(tmp_path / "whole", whole, 1)
    save(tmp_path / "again", again, 1)
    for file in ("state.safetensors", "state.json"):
        one, other = ((tmp_path / place / "step-000040" / file).read_bytes() for place in ("whole", "again"))
        assert one == other, file
    assert effective(again.optimiser) == effective(whole.optimiser)


@pytest.mark.skipif(not _there("schedule-free"), reason="schedulefree is not here")
def test_what_schedule_free_shows_is_its_average_and_leaves_no_trace() -> None:
    state, config = _made("schedule-free")
    _walk(state, config, 10)
    before = [p.detach().clone() for p in state.parameters.values()]
    with state.average.in_place():
        shown = [p.detach().clone() for p in state.parameters.values()]
    assert all(torch.equal(p, b) for p, b in zip(state.parameters.values(), before, strict=True))
    assert not any(torch.equal(s, b) for s, b in zip(shown, before, strict=True))
    with pytest.raises(ConfigError, match="averages and slows down by itself"):
        check_optimiser(config, "cpu", ema=0.99)


@pytest.mark.skipif(not _there("schedule-free"), reason="schedulefree is not here")
def test_a_whole_run_with_schedule_free_saves_what_it_shows(config: Callable[..., RunConfig]) -> None:
    """Previews on the way change nothing."""
    own = {"steps": 3, "optimiser": {"name": "schedule-free"}, "data": {"batch": 1}, "delta": {"sites": ["cross-attention"]}}
    plain = train(config("finetune", "plain", own), base=tiny_base("sd15"))
    drawn = train(config("finetune", "drawn", own, {"preview": {"every": 1, "count": 1, "steps": 1}}), base=tiny_base("sd15"))
    assert plain.delta is not None and drawn.delta is not None
    assert plain.delta.read_bytes() == drawn.delta.read_bytes()


@pytest.mark.parametrize("name", [n for n in TABLE if TABLE[n].extra])
def test_a_missing_library_names_the_extra_that_brings_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, TABLE[name].module.split(".")[0], None)
    monkeypatch.setitem(sys.modules, TABLE[name].module, None)
    with pytest.raises(ConfigError, match=rf'pip install "vgm_peft\[{TABLE[name].extra}\]"'):
        check_optimiser(OptimiserConfig(name=name), "cpu", 0.0)


def test_every_extra_is_one_of_the_package() -> None:
    import tomllib

    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {kind.extra for kind in TABLE.values()} - {""} <= set(extras)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"name": "adamv"}, 'did you mean "adamw"'),
        ({"options": {"amsgrid": True}}, 'did you mean "amsgrad"'),
        ({"name": "adafactor", "options": {"d": -1.0}}, "refuses its settings"),
    ],
)
def test_a_mistake_is_named(given: dict[str, object], says: str) -> None:
    config = bind({"optimiser": given}).optimiser  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=says):
        check_optimiser(config, "cpu", 0.0)
        build_optimiser([Group(0.1, {"a/w": nn.Parameter(torch.zeros(1))})], config)


@pytest.mark.skipif(not _there("prodigy"), reason="prodigyopt is not here")
def test_an_optimiser_of_one_rate_refuses_two() -> None:
    groups = [Group(rate, {f"{rate}/w": nn.Parameter(torch.zeros(1))}) for rate in (0.1, 0.2)]
    with pytest.raises(ConfigError, match="one rate for all, but the parts have 2: 0.1, 0.2"):
        build_optimiser(groups, OptimiserConfig(name="prodigy"))
