"""Every command that a page shows is one that exists and takes these arguments; those for any machine are run."""

import importlib
import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest

from vgm_peft.cli import Parser, main

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "pipelines/*.md", "benchmarks/*.md", "assets/*/README.md")
    for path in ROOT.glob(pattern)
)
SHELL = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def shown(page: Path) -> list[str]:
    """The commands in a page's shell blocks, one line each, without comments."""
    lines = "\n".join(SHELL.findall(page.read_text(encoding="utf-8"))).replace("\\\n", " ").splitlines()
    return [line for line in (shlex.join(shlex.split(raw, comments=True)) for raw in lines) if line]


CASES = [pytest.param(line, id=f"{page.name}: {line[:60]}") for page in PAGES for line in shown(page)]


def test_pages_show_commands() -> None:
    assert len([line for line in shown(ROOT / "README.md") if line.startswith("vgm-")]) >= 5


@pytest.mark.parametrize("line", CASES)
def test_a_shown_command_exists_and_parses(line: str) -> None:
    words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    program = words[0].removeprefix(".venv/bin/")
    if program.startswith("vgm-"):
        name = program.removeprefix("vgm-")
        parser = Parser(prog=program)
        importlib.import_module(f"vgm_peft.cli.{name}").add_flags(parser)
        parser.parse_args(words[1:])
    elif program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif program in ("python", "python3") and words[1] == "-m":
        assert importlib.util.find_spec(words[2]) is not None
        if words[2] == "vgm_peft.toybox":
            importlib.import_module("vgm_peft.toybox.__main__")._parser(words[3]).parse_args(words[3:])
    elif program in ("python", "python3", "gradio", "bash"):
        assert (ROOT / words[1]).is_file()
    else:
        assert program in ("git", "source", "cd", "pip", "pytest", "ruff", "pyright", "pre-commit", "accelerate", "torchrun")


def test_the_readme_s_first_run_works_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two steps in place of its hundred."""
    (line,) = [line for line in shown(ROOT / "README.md") if line.startswith("vgm-train dreambooth --images assets/")]
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    assert main("train", [*shlex.split(line)[1:], "--steps", "2"]) == 0
    (delta,) = tmp_path.glob("runs/*/delta.safetensors")
    shutil.copy(delta, tmp_path / "mine.safetensors")
    drawn = ["--delta", "mine.safetensors:0.9", "--prompt", "a photo of a sks robot", "--steps", "2", "--output", "new.png"]
    assert main("generate", drawn) == 0
    assert main("delta", ["inspect", "mine.safetensors"]) == 0
    assert main("delta", ["export", "mine.safetensors", "--for", "comfyui", "-o", "comfy.safetensors"]) == 0
