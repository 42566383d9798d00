"""Same command, same bytes: in another process, with another hash seed, in another place, language, time zone and umask."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.train.ground import paired_pictures, tiny_base
from tests.train.killed import kept
from vgm_peft.cli import main

COMMAND = ["finetune", "--images", "me", "--base", "base", "--steps", "2", "--export", "kohya", "--seed", "3"]
for setting in ("data.batch=1", "data.resolution=64", "preview.count=1", "preview.steps=1", "delta.rank=2", "held_out.every=1"):
    COMMAND += ["--set", setting]
COMMAND += ["--set", "compute.precision=no", "--set", "checkpoint.every=1", "--set", "optimiser.warmup=0"]


def test_another_process_makes_the_same_files(tmp_path: Path, monkeypatch) -> None:  # noqa: ANN001
    folders = [tmp_path / "here", tmp_path / "an other" / "plâce"]
    for folder in folders:
        paired_pictures(folder / "me")
        tiny_base("sd15").pipe.save_pretrained(folder / "base")
    monkeypatch.chdir(folders[0])
    assert main("train", [*COMMAND, "--output", "run"]) == 0
    own = {"PYTHONHASHSEED": "12345", "LC_ALL": "C", "TZ": "Asia/Tokyo", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    code = "import os, sys; os.umask(0o077); from vgm_peft.cli import main; sys.exit(main('train', sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *COMMAND, "--output", "run"],
        cwd=folders[1],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    here, there = (kept(folder / "run") for folder in folders)
    assert here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == []
    assert {"delta.safetensors", "exports/kohya.safetensors", "report.html", "manifest.json", "run.toml"} <= here.keys()

    manifest = json.loads((folders[0] / "run" / "manifest.json").read_text())
    assert manifest["settings"]["optimiser"]["weight_decay"] == 0.01 and manifest["settings"]["held_out"]["draws"] == 8
    assert manifest["optimiser"][0]["betas"] == [0.9, 0.999] and manifest["settings"]["data"]["images"] == "me"
    assert str(tmp_path) not in json.dumps(manifest)
