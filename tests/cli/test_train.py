"""`vgm-train`: flags to configuration, one clear line for bad input, nothing heavy for `--help`."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.ground import files, picture, tiny_base
from vgm_peft.cli import main
from vgm_peft.config import parse_setting


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    tiny_base("sd15").pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for i in range(2):
        picture(tmp_path / "me" / f"{i}.png", i)
    return tmp_path / "me"


SMALL = ["--steps", "2", "--set", "data.batch=1", "--set", "task.class_images=0", "--set", "preview.count=1"]
SMALL += ["--set", "preview.steps=2", "--set", "delta.rank=2", "--set", "compute.precision=no"]


def test_pictures_are_all_it_needs(
    base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["dreambooth", "--images", "me", "--base", str(base), "--class-prompt", "a robot", "--export", "kohya,diffusers"]
    assert main("train", [*command, *SMALL]) == 0
    run = tmp_path / "runs" / "dreambooth-me-1"
    names = {"delta.safetensors", "run.toml", "manifest.json", "metrics.jsonl", "exports/kohya.safetensors"}
    assert names <= set(files(run)) and not (run / ".lock").exists()
    out = capsys.readouterr().out
    assert "dreambooth-lora-sd15.toml" in out  # found by the family of a base whose name says nothing
    assert "weights   step 2, the last\n" in out
    assert "runs/dreambooth-me-1/delta.safetensors" in out and "vgm-generate --base" in out and "'a sks robot'" in out
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["base"]["name"] == "tiny" and len(manifest["base"]["sha256"]) == 64
    assert str(tmp_path) not in json.dumps(manifest)

    monkeypatch.chdir(images)
    assert main("train", ["--recipe", str(run / "run.toml"), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "delta.safetensors").read_bytes() == (run / "delta.safetensors").read_bytes()

    monkeypatch.chdir(tmp_path)
    before = files(run)
    assert main("train", [*command, *SMALL, "--output", str(run)]) == 2
    assert "not empty" in capsys.readouterr().err and files(run) == before


def test_a_run_that_learned_nothing_leaves_with_an_error(
    base: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["finetune", "--images", str(images), "--base", str(base), "--output", str(tmp_path / "run"), "--steps", "5"]
    for setting in ("optimiser.lr=0.0", "optimiser.warmup=0", "delta.rank=2", "data.batch=1", "compute.precision=no"):
        command += ["--set", setting]
    for i in range(2):
        (images / f"{i}.txt").write_text("a robot")
    assert main("train", [*command, "--set", "preview.count=0"]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vgm-train:")]
    assert len(err) == 1 and "nothing was learned at" in err[0] and "unet." in err[0]
    assert not (tmp_path / "run" / "delta.safetensors").exists()
    assert "none yet" in (tmp_path / "run" / "report.html").read_text()


def _empty(folder: Path) -> None:
    (folder / "2.png").write_bytes(b"")


def _truncated(folder: Path) -> None:
    whole = (folder / "0.png").read_bytes()
    (folder / "2.png").write_bytes(whole[: len(whole) // 2])


def _not_a_picture(folder: Path) -> None:
    (folder / "2.png").write_text("hello")


def _stranger(folder: Path) -> None:
    (folder / "notes.docx").write_text("hello")


def _orphan(folder: Path) -> None:
    (folder / "other.txt").write_text("a caption")


def _none(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _missing(folder: Path) -> None:
    _none(folder)
    folder.rmdir()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_empty, "2.png is empty"),
        (_truncated, "2.png cannot be read"),
        (_not_a_picture, "2.png cannot be read as a picture"),
        (_stranger, "notes.docx is neither"),
        (_orphan, "other.txt is a caption without a picture"),
        (_none, "no picture"),
        (_missing, "does not exist"),
    ],
)
def test_bad_pictures_get_one_line(
    spoil: Callable[[Path], None], says: str, base: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(images)
    out = tmp_path / "out"
    assert main("train", ["dreambooth", "--images", str(images), "--base", str(base), "--output", str(out), *SMALL]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vgm-train:")]
    assert len(err) == 1 and says in err[0]
    left = files(out) if out.exists() else {}
    assert set(left) <= {"data.md"} and (not left or says in left["data.md"].decode())  # and nothing else to keep


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["dreambooth", "--image", "me"], "--images"),
        (["dreambooth"], "no pictures are named"),
        ([], "no task is named"),
        (["dreamboth", "--images", "me"], 'did you mean "dreambooth"'),
        (["dreambooth", "--images", "me", "--delta", "lroa"], 'did you mean "lora"'),
        (["dreambooth", "--images", "me", "--set", "optimizer.lr=1"], 'did you mean "optimiser"'),
        (["dreambooth", "--images", "me", "--set", "delta.rnak=1"], 'did you mean "rank"'),
        (["dreambooth", "--images", "me", "--set", "nonsense"], "section.key=value"),
        (["finetune", "--images", "me", "--class-prompt", "a robot"], "task.class_prompt"),
        (["dreambooth", "--images", "me", "--steps", "0"], "steps = 0"),
        (["--recipe", "nowhere.toml"], "no such file"),
        (["--resume", "nowhere"], "holds no run"),
        (["dreambooth", "--images", "me", "--base", "no/such/base/at/all"], "base"),
    ],
)
def test_mistakes_in_the_command_get_one_line(
    command: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main("train", command) == 2
    err = capsys.readouterr().err.strip()
    assert says in err and err.count("\n") == 0 and not list(tmp_path.iterdir())


def test_a_mistake_in_a_recipe_names_file_and_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my.toml").write_text("[optimiser]\nlearning_rate = 1.0\n")
    assert main("train", ["--recipe", str(tmp_path / "my.toml")]) == 2
    err = capsys.readouterr().err
    assert "my.toml" in err and "optimiser.learning_rate" in err


def test_every_flag_reaches_its_setting(images: Path) -> None:
    import argparse

    from vgm_peft.cli import Parser
    from vgm_peft.cli.train import _table, add_flags

    parser = Parser()
    add_flags(parser)
    _, common, thing, beside = (group._group_actions for group in parser._action_groups)
    assert len([a for a in common if a.dest not in ("help", "set")]) <= 12  # for every run; what only some take stands apart
    assert (len(thing), len(beside)) == (4, 2)
    args: argparse.Namespace = parser.parse_args(
        "dreambooth --images me --base b --delta d --class-prompt c --token t --steps 3 --seed 4 --output o "
        "--export x,y --vectors 2 --init-word w".split()
    )
    assert _table(args) == {
        "task": {"name": "dreambooth", "class_prompt": "c", "token": "t", "vectors": 2, "init_word": "w"},
        "data": {"images": "me"},
        "base": "b",
        "delta": {"kind": "d"},
        "steps": 3,
        "seed": 4,
        "output": "o",
        "exports": ["x", "y"],
    }
    args = parser.parse_args("t2i-adapter --data d --network light --annotator canny".split())
    assert _table(args) == {"task": {"name": "t2i-adapter", "network": "light"}, "data": {"images": "d", "annotator": "canny"}}
    assert parse_setting("delta.rank=16") == {"delta": {"rank": 16}}


def test_the_help_names_every_task() -> None:
    from vgm_peft.cli.train import TASKS
    from vgm_peft.train.tasks import TABLE

    assert set(TASKS) == set(TABLE)


def test_help_needs_no_torch() -> None:
    code = "import sys; from vgm_peft.cli import main\ntry: main('train', ['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "--images" in done.stdout and done.stdout.rstrip().endswith("False"), done.stderr
