"""Comparing: the same seeds with each delta and with none, a training's previews by step, scores where oracles can tell."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from vgm_peft.errors import ConfigError
from vgm_peft.stack.recipe import Stack
from vgm_peft.studio.compare import BASE, compare_deltas, compare_steps, runs_of
from vgm_peft.studio.engine import Engine
from vgm_peft.studio.jobs import Desk
from vgm_peft.studio.settings import Settings

if TYPE_CHECKING:
    from vgm_peft.studio.app import Studio

STACK = Stack(prompt="a red robot on grass", steps=1, seed=3)


def test_every_row_is_what_drawing_it_alone_gives(studio: "Studio") -> None:
    engine = studio.engine
    engine.base()
    seen: list[tuple[int, int]] = []
    found = compare_deltas(
        engine, STACK, ["robot", "style", "robot"], 2, lambda p: seen.append((p.picture, p.pictures)) or True
    )
    assert list(found.scores) == [BASE, "robot", "style"] and not any(found.scores.values())  # no oracles for this base
    assert seen == [(i, 6) for i in range(1, 7)]
    assert found.sheet.parent == studio.settings.pictures.absolute() and Image.open(found.sheet).width > 2 * 64
    stopped = compare_deltas(engine, STACK, ["robot", "style"], 2, lambda p: p.picture < 4)
    assert list(stopped.scores) == [BASE, "robot"]  # what was drawn so far
    for names, seeds, message in (([], 2, "0 deltas"), (["robot"], 9, "9 seeds"), (["../base"], 1, 'no delta "../base"')):
        with pytest.raises(ConfigError, match=message):
            compare_deltas(engine, STACK, names, seeds)


def test_previews_are_put_side_by_side_by_step(studio: "Studio", tmp_path: Path) -> None:
    desk = Desk(Settings(base=studio.settings.base, runs=tmp_path / "runs"))
    samples = tmp_path / "runs" / "me" / "samples"
    samples.mkdir(parents=True)
    with pytest.raises(ConfigError, match='no training "me"'):
        compare_steps(studio.engine, desk, "me")
    for step in range(10, 210, 10):
        for i in range(2):
            Image.new("RGB", (32, 32), (step, 0, 100 * i)).save(samples / f"step-{step:06d}-{i}.png")
    (samples.parent / "metrics.jsonl").write_text('{"step": 200, "loss": 0.25, "scores": {"total": 0.5}}\n')
    assert runs_of(desk) == ["me"]
    found = compare_steps(studio.engine, desk, "me")
    assert len(found.scores) == 8 and list(found.scores)[0] == "step 10" and found.scores["step 200"] == {"total": 0.5}
    with pytest.raises(ConfigError, match="no training"):
        compare_steps(studio.engine, desk, "../runs/me")


def test_the_oracles_score_what_the_embedded_base_draws(tmp_path: Path) -> None:
    engine = Engine(Settings(runs=tmp_path / "runs", pictures=tmp_path / "pictures"))
    found = compare_deltas(engine, STACK, ["toon"], 1)
    assert list(found.scores) == [BASE, "toon"]
    assert all(0.0 <= row["prompt"] <= 1.0 for row in found.scores.values())
    nothing: dict[str, Any] = compare_deltas(engine, Stack(prompt="xyz", steps=1), ["toon"], 1).scores
    assert nothing == {BASE: {}, "toon": {}}  # a prompt that names nothing of that world
