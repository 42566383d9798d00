"""Which settings a resumed run may change: those that play no part in the result, and no others."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.killed import restored, small_state
from vgm_peft.config import Table, Value, merge
from vgm_peft.errors import TrainError
from vgm_peft.train.checkpoint import save
from vgm_peft.train.config import RunConfig, bind, table
from vgm_peft.train.origin import HARMLESS, demand_same, differences, origin

GIVEN: Table = {"task": {"name": "dreambooth"}, "data": {"images": "me"}, "optimiser": {"schedule": "cosine"}}
OPTIONAL: Table = {
    "optimiser": {"text_lr": 1.0},
    "loss": {"min_snr": 5.0, "zero_terminal_snr": False},
    "preview": {"guidance": 3.0},
    "data": {"cache_gib": 1.0},
    "task": {"class_guidance": 2.0},
    "scores": {"by": "clip", "guidance": 2.0},
}
"""Settings that are unset until they are set."""


def _of(config: RunConfig) -> dict[str, object]:
    return origin(config, "base", {"pictures": 3, "sha256": "0"})


def _changes() -> Iterator[tuple[str, Table]]:
    """Every setting of a run, with a value that it does not have."""
    for section, inner in merge(table(bind(GIVEN)), OPTIONAL).items():
        for key, value in inner.items() if isinstance(inner, dict) else [("", inner)]:
            unset = isinstance(OPTIONAL.get(section), dict) and key in OPTIONAL[section]
            new = value if unset else _other(f"{section}.{key}".rstrip("."), value)
            if new is not None:
                yield f"{section}.{key}".rstrip("."), {section: {key: new}} if key else {section: new}


def _other(name: str, value: Value) -> Value | None:
    others: dict[str, Value] = {
        "task.name": "finetune",
        "optimiser.name": "adafactor",
        "optimiser.schedule": "linear",
        "loss.kind": "huber",
        "loss.huber_schedule": "constant",
        "loss.timesteps": "cubic",
        "loss.timestep_range": [0.0, 0.5],
        "compute.precision": "bf16",
        "data.masks": "alpha",
        "task.prior": "pictures",
        "delta.kind": "krona",
        "delta.sites": ["all"],
        "data.more_resolutions": [128],
        "optimiser.betas": [0.8, 0.9],
        "loss.debiased": True,
        "ema": 0.5,
        "delta.init": "gaussian",
        "task.init": "mean",
        "task.norm": "clamp",
    }
    alone = {"concept", "data.allow", "data.zoom", "data.keep_tokens", "held_out.pictures", "held_out.stop_when_worse"}
    alone |= {"scores.stop_when_worse", "data.annotator", "data.annotator_weights", "data.control_dropout", "data.both_dropout"}
    alone |= {"task.start"}
    if name in alone or isinstance(value, (dict, list)) and name not in others:
        return None  # settings that stand only beside others; the test below has some of them
    if name in others:
        return others[name]
    if isinstance(value, bool):
        return not value
    return f"{value}x" if isinstance(value, str) else value + 1 if isinstance(value, int) else value * 0.5 + 0.01


CHANGES = list(_changes())


def test_there_are_enough_of_them() -> None:
    assert len(CHANGES) >= 50


@pytest.mark.parametrize(("name", "change"), CHANGES, ids=[name for name, _ in CHANGES])
def test_a_changed_setting_is_refused_by_name_or_harmless(name: str, change: Table) -> None:
    before, after = bind(GIVEN), bind(merge(GIVEN, {"delta": {}} if name == "task.name" else {}, change))
    assert before != after
    found = differences(_of(before), _of(after))
    if name in HARMLESS or name.split(".")[0] in HARMLESS:
        assert not found
    else:
        assert any(entry.startswith(f"{name} ") for entry in found), found


def test_all_differences_are_said_at_once(tmp_path) -> None:  # noqa: ANN001
    save(tmp_path / "run" / "checkpoints", small_state(1), 1)
    state = small_state(0)
    changed: Table = {"seed": 3, "optimiser": {"lr": 0.5, "schedule": "cosine"}, "loss": {"min_snr": 5.0}}
    with pytest.raises(TrainError) as refused:
        demand_same(tmp_path / "run" / "checkpoints" / "step-1", _of(bind(GIVEN)), _of(bind(merge(GIVEN, changed))))
    text = str(refused.value)
    assert all(part in text for part in ("run was made otherwise", "seed 0 -> 3", "optimiser.lr 0.0001 -> 0.5"))
    assert "loss.min_snr unset -> 5.0" in text
    assert restored(tmp_path / "run" / "checkpoints").step == 1 and state.step == 0


def test_other_pictures_or_another_base_are_refused() -> None:
    config = bind(GIVEN)
    now = origin(config, "other", {"pictures": 4, "sha256": "1"})
    assert [entry.split(" ")[1] for entry in differences(_of(config), now)] == ["base", "data"]


def test_more_steps_may_be_asked_for_where_the_schedule_does_not_look_ahead() -> None:
    longer: Table = {"steps": 4000}
    for schedule, refused in (("constant", False), ("inverse_sqrt", False), ("cosine", True), ("linear", True)):
        given = merge(GIVEN, {"optimiser": {"schedule": schedule}})
        assert bool(differences(_of(bind(given)), _of(bind(merge(given, longer))))) == refused


def test_a_setting_that_came_later_is_no_difference_until_it_is_used(tmp_path: Path) -> None:
    saved = {name: value for name, value in _of(bind(GIVEN)).items() if name not in ("loss.p2", "data.crops")}
    folder = tmp_path / "run" / "checkpoints" / "step-1"
    demand_same(folder, saved, _of(bind(GIVEN)))
    with pytest.raises(TrainError, match=r"\(then -> now\): loss.p2 unset -> 0.5;"):
        demand_same(folder, saved, _of(bind(merge(GIVEN, {"loss": {"p2": 0.5}}))))
    with pytest.raises(TrainError, match="loss.min_snr unset -> 5.0"):  # off is not unknown
        demand_same(folder, saved, _of(bind(merge(GIVEN, {"loss": {"min_snr": 5.0}}))))
    with pytest.raises(TrainError, match="loss.p2 0.0 -> unset"):  # one that is no longer known may have meant something
        demand_same(folder, _of(bind(GIVEN)), saved)
