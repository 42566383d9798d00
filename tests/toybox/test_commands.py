"""`python -m vgm_peft.toybox`."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from vgm_peft.toybox.__main__ import main


def test_render_writes_pictures_with_captions(tmp_path: Path) -> None:
    assert main(["render", "--output", str(tmp_path), "--count", "3", "--seed", "1"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"0{i}.{e}" for i in (1, 2, 3) for e in ("png", "txt")]
    with Image.open(tmp_path / "01.png") as picture:
        assert picture.size == (64, 64) and picture.mode == "RGB"


def test_a_subject_is_captioned_by_its_class(tmp_path: Path) -> None:
    assert main(["render", "--output", str(tmp_path), "--subject", "duck", "--count", "2"]) == 0
    assert (tmp_path / "01.txt").read_text().startswith("a photo of a duck ")


def test_the_committed_subjects_and_styles_are_what_the_command_makes(tmp_path: Path) -> None:
    assets = Path(__file__).resolve().parents[2] / "assets"
    assert main(["render", "--output", str(tmp_path / "s"), "--subject", "robot", "--count", "5"]) == 0
    assert main(["render", "--output", str(tmp_path / "t"), "--style", "toon", "--count", "12"]) == 0
    for made, kept in ((tmp_path / "s", assets / "subjects/robot"), (tmp_path / "t", assets / "styles/toon")):
        names = sorted(p.name for p in kept.iterdir())
        assert sorted(p.name for p in made.iterdir()) == names
        for name in names:
            assert name.endswith(".png") or (made / name).read_text() == (kept / name).read_text()


def test_unknown_names_end_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "--output", str(tmp_path), "--subject", "dog"]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and 'unknown Toybox subject "dog"' in text


def test_a_file_in_the_way_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    assert main(["render", "--output", str(tmp_path / "taken"), "--count", "1"]) == 2
    assert "taken" in capsys.readouterr().err


def test_help_answers_at_once() -> None:
    code = "import sys; from vgm_peft.toybox.__main__ import main\ntry: main(['render', '--help'])\nexcept SystemExit: pass\n"
    start = time.perf_counter()
    out = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip().endswith("False")
    assert time.perf_counter() - start < 2  # some 0.15 s; generous for a loaded machine
