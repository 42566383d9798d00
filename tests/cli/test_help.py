"""The commands answer `--help` at once, and a slip of the finger with one line and status 2."""

import json
import subprocess
import sys

import pytest

from vgm_peft.cli import main

COMMANDS = ("train", "generate", "delta", "studio", "bench")
HEAVY = ("torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "gradio", "safetensors", "PIL")
PROGRAM = """
import json, sys, time
from vgm_peft.cli import main
try:
    main(sys.argv[1], sys.argv[2:])
except SystemExit as done:
    status = done.code
print(json.dumps({"status": status, "seconds": time.process_time(), "modules": sorted(sys.modules)}), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [(name,) for name in COMMANDS] + [("delta", "inspect"), ("delta", "export"), ("bench", "methods")],
    ids=" ".join,
)
def test_help_is_quick_and_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments, "--help"], capture_output=True, text=True, check=True)
    told = json.loads(done.stderr)
    assert told["status"] in (0, None) and done.stdout.startswith(f"usage: vgm-{arguments[0]}")
    assert not {name.split(".")[0] for name in told["modules"]} & set(HEAVY)
    assert told["seconds"] < 0.5  # of processor time, the start of Python included: the machine may be busy


@pytest.mark.parametrize("name", COMMANDS)
def test_the_installed_command_is_there(name: str) -> None:
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="console_scripts", name=f"vgm-{name}")
    assert entry.value == f"vgm_peft.cli:{name}"


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_flag_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"delta": ["inspect", "x.safetensors"], "train": ["dreambooth"], "bench": ["methods"]}.get(name, [])
    assert main(name, [*arguments, "--no-such-flag"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vgm-{name}: ") and error.count("\n") == 1 and "--no-such-flag" in error


@pytest.mark.parametrize(
    "arguments,message",
    (
        (["inspect", "x.safetensors", "--jsn"], 'unknown flag "--jsn"; did you mean "--json"?'),
        (["inspect", "x.safetensors", "y.safetensors"], 'unexpected argument "y.safetensors"'),
        (["inspct", "x.safetensors"], 'did you mean "inspect"?'),
        (["export", "x.safetensors"], "--for"),
        (["export", "x.safetensors", "--fo", "kohya"], "--for"),
        ([], "VERB"),
    ),
)
def test_slips_are_told_what_was_meant(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("delta", arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_interrupt_leaves_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import vgm_peft.cli.delta as command

    def run(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", run)
    assert main("delta", ["inspect", "x"]) == 130
    assert capsys.readouterr().err == "vgm-delta: interrupted\n"


def test_a_fault_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    import vgm_peft.cli.delta as command

    def run(args: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(command, "run", run)
    with pytest.raises(ZeroDivisionError):
        main("delta", ["inspect", "x"])
