"""`vgm-generate`, in its own process where the process matters and through its functions where parsing does."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from vgm_peft.cli import Parser, main
from vgm_peft.cli.generate import Places, add_flags, described, parse_control, parse_numbered
from vgm_peft.errors import ConfigError
from vgm_peft.stack.recipe import Stack, parse_size
from vgm_peft.stack.uses import ControlUse


def flags(*argv: str) -> argparse.Namespace:
    parser = Parser()
    add_flags(parser)
    return parser.parse_args(list(argv))


@pytest.mark.parametrize(
    ("text", "file", "strength"),
    [
        ("me.safetensors", "me.safetensors", None),
        ("me.safetensors:0.8", "me.safetensors", 0.8),
        ("me.safetensors:-1", "me.safetensors", -1.0),
        ("C:\\loras\\me.safetensors", "C:\\loras\\me.safetensors", None),
        ("C:\\loras\\me.safetensors:0.5", "C:\\loras\\me.safetensors", 0.5),
        ("C:/loras/me.safetensors:0.5", "C:/loras/me.safetensors", 0.5),
        ("odd:name.safetensors", "odd:name.safetensors", None),
    ],
)
def test_files_with_numbers_parse_on_every_system(text: str, file: str, strength: float | None) -> None:
    assert parse_numbered(text, "--delta", "strength") == (file, strength)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("edges:a.png", ("edges", "a.png", 1.0)),
        ("edges:/tmp/a.png:0.5", ("edges", "/tmp/a.png", 0.5)),
        ("C:\\nets\\edges:D:\\a.png:0.5", ("C:\\nets\\edges", "D:\\a.png", 0.5)),
        ("C:/nets/edges:D:/a.png", ("C:/nets/edges", "D:/a.png", 1.0)),
    ],
)
def test_controls_parse_on_every_system(text: str, parsed: tuple[str, str, float]) -> None:
    use = parse_control(text)
    assert (use.network, use.image, use.strength) == parsed and (use.start, use.end) == (0.0, 1.0)
    assert parse_control("edges:a.png:0.5:0.2-0.8") == ControlUse(
        network="edges", image="a.png", strength=0.5, start=0.2, end=0.8
    )


def test_what_does_not_parse_is_named(tmp_path: Path) -> None:
    for text in ("edges", "a:b:c", "a:b:1:d", "a:b:1:0.5-x", "a:b:1:0.2-0.5:e", ""):
        with pytest.raises(ConfigError, match="NETWORK:IMAGE"):
            parse_control(text)
    for text in ("64y64", "x64", "-1", ""):
        with pytest.raises(ConfigError, match="size"):
            parse_size(text)
    assert (parse_size("512"), parse_size("768x512")) == ((512, 512), (768, 512))
    (tmp_path / "me").touch()
    with pytest.raises(ConfigError, match='the strength "x"'):
        parse_numbered(f"{tmp_path / 'me'}:x", "--delta", "strength")


def test_flags_change_a_stack_file_and_add_to_it(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text('prompt = "a toy"\nsteps = 7\n[[deltas]]\nfile = "a.safetensors"\nstrength = 0.5\n')
    stack = described(flags("--stack", str(file), "--steps", "9", "--delta", "b.safetensors:0.3", "--size", "64x32"))
    assert (stack.prompt, stack.steps, stack.width, stack.height) == ("a toy", 9, 64, 32)
    assert [(d.file, d.strength) for d in stack.deltas] == [
        ("a.safetensors", 0.5),
        (str(Path("b.safetensors").absolute()), 0.3),
    ]
    assert stack.path("a.safetensors") == tmp_path / "a.safetensors"
    begun = described(flags("--stack", str(file), "--image", "c.png:0.4", "--paint", "m.png"))
    assert (begun.image, begun.change) == (str(Path("c.png").absolute()), 0.4) and begun.paint == str(Path("m.png").absolute())
    assert described(flags("--image", "c.png")) == Stack(image="c.png")
    assert described(flags("--prompt", "x")) == Stack(prompt="x")


def test_pictures_get_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vgm_peft.picture import Picture

    monkeypatch.chdir(tmp_path)

    def names(output: str | None, count: int) -> list[str]:
        stack = Stack(prompt="A red robot!", count=count, seed=5)
        places = Places(output, stack)
        blank = Image.new("RGB", (8, 8))
        return [places.write(Picture(blank, stack.changed({"seed": 5 + i, "count": 1}))).as_posix() for i in range(count)]

    assert names(None, 1) == ["pictures/a-red-robot-5.png"]
    assert names(None, 2) == ["pictures/a-red-robot-5-2.png", "pictures/a-red-robot-6.png"]
    assert names("me.png", 1) == names("me.png", 1) == ["me.png"]
    assert names("me.png", 2) == ["me-1.png", "me-2.png"]
    assert names("s{seed}.png", 2) == ["s5.png", "s6.png"]
    assert names("out/", 1) == ["out/a-red-robot-5.png"]
    with pytest.raises(ConfigError, match="ends in .png"):
        Places("me.jpg", Stack())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--promt", "x"], '"--prompt"'),
        (["--steps", "0"], "steps = 0"),
        (["--steps", "many"], "--steps"),
        (["--scheduler", "dpmp"], "dpmpp"),
        (["--stack", "none.toml"], "none.toml: no such file"),
        (["--stack", "none.png"], "none.png: no such file"),
        (["--output", "x.jpg"], "ends in .png"),
        (["--size", "63"], "multiple of 8"),
        (["--delta", "a", "--delta", "a"], "twice"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("generate", argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("vgm-generate: ")


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, vgm_peft.cli as c\ntry: c.main('generate', ['--help'])\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False" and "--delta FILE[:STRENGTH]" in done.stdout


def test_a_picture_from_the_command_line_and_again_from_itself(
    tmp_path: Path, tiny: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import vgm_peft
    from tests.stack_makers import make_delta

    base = tiny("sd15")  # type: ignore[operator]
    base.pipe.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    vgm_peft.write(make_delta(base), tmp_path / "me.safetensors", "kohya", base)
    common = ["--steps", "2", "--count", "2", "--seed", "3"]
    argv = ["--base", "base", "--prompt", "a toy", "--delta", "me.safetensors:0.8", *common, "--output", "p-{seed}.png"]
    assert main("generate", argv) == 0
    assert "wrote p-3.png  (64x64, seed 3" in capsys.readouterr().out
    with Image.open("p-4.png") as image:
        told = json.loads(image.text["vgm_peft"])["stack"]  # type: ignore[attr-defined]
    assert told["deltas"][0]["file"] == "me.safetensors" and told["seed"] == 4 and told["base"] == "base"
    assert main("generate", ["--stack", "p-4.png", "--base", "base", "--output", "again.png"]) == 0
    assert Path("again.png").read_bytes() == Path("p-4.png").read_bytes()
