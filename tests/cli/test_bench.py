"""`vgm-bench methods` on the embedded base, with two steps in place of hundreds: records, resuming, sheets, slips."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vgm_peft.cli import main

TINY = ["--steps", "2", "--seeds", "1", "--pictures", "2", "--picture-steps", "2", "--set", "optimiser.warmup=0"]
TINY += ["--set", "task.class_images=2", "--set", "task.class_steps=2", "--set", "data.batch=1"]


def bench(output: Path, methods: str, *more: str) -> int:
    return main("bench", ["methods", "--methods", methods, "--output", str(output), *TINY, *more])


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bench") / "two"
    assert bench(output, "lora,ia3") == 0
    return output


def record(output: Path, method: str) -> dict[str, Any]:
    return json.loads((output / "runs" / f"robot-{method}-0.json").read_text())


def test_a_run_keeps_all_that_is_asked_of_it(compared: Path) -> None:
    for method in ("lora", "ia3"):
        found = record(compared, method)
        assert {"identity", "prompt", "drift"} <= found["scores"].keys()
        assert found["trained"] > 0 and found["file_bytes"] > 4 * found["trained"]
        assert found["scores"]["drift"] > 0
        settings = found["settings"]
        assert settings["delta.kind"] == method and settings["steps"] == found["steps"] == 2
        assert settings["the data"] == "robot"
    times = json.loads((compared / "times.json").read_text())
    assert times.keys() == {"lora", "ia3"} and min(times.values()) > 0 and not (compared / "timing").exists()
    assert record(compared, "lora")["settings"]["delta.rank"] == 4, "the shipped recipe's"


def test_there_is_a_picture_and_a_table(compared: Path) -> None:
    with Image.open(compared / "robot.png") as sheet:
        assert sheet.width > 3 * 176 and sheet.height > 176
    lines = (compared / "methods.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")] == ["| method", "| (base)", "| lora", "| ia3"]


def test_what_is_done_is_kept_and_what_was_interrupted_is_made_again(
    compared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (compared / "runs" / "robot-lora-0.json").stat().st_mtime_ns
    (compared / "runs" / "robot-ia3-0.json").unlink()  # trained, but not to the end of its judging
    import vgm_peft.bench.methods as methods

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(methods, "_done", stop)
        assert bench(compared, "lora,ia3") == 130
        assert "the same command goes on" in capsys.readouterr().err
    assert bench(compared, "lora,ia3") == 0
    assert "2 runs, 1 done" in capsys.readouterr().out
    assert (compared / "runs" / "robot-lora-0.json").stat().st_mtime_ns == before
    assert record(compared, "ia3")["trained"] > 0


def test_records_of_other_settings_are_not_taken_for_these(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(compared, "lora,ia3", "--set", "optimiser.lr=1e-3") == 2
    error = capsys.readouterr().err
    assert re.search(r"optimiser\.lr [\d.]+ -> 0\.001", error) and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "lroa"], 'did you mean "lora"'),
        (["--methods", "lora,lora"], "none twice"),
        (["--methods", ""], "at least one"),
        (["--subjects", "robt"], 'did you mean "robot"'),
        (["--seeds", "0"], "seeds = 0"),
        (["--set", "delta.rnak=1", "--methods", "lora"], 'did you mean "rank"'),
    ],
)
def test_slips_are_one_line_before_anything_is_trained(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("bench", ["methods", "--output", str(tmp_path / "new"), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_records_of_another_base_are_not_taken_for_these(
    compared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vgm_peft.bench import plan

    monkeypatch.setattr(plan, "_base_digest", lambda: "0" * 64)
    assert bench(compared, "lora,ia3") == 2
    assert "the base (SHA-256) " in capsys.readouterr().err
