"""Annotators: what each makes of a picture, that it is always the same, and what is said when one cannot be had."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vgm_peft.annotate import NAMES, learned, open_annotator, plain
from vgm_peft.annotate.__main__ import main
from vgm_peft.errors import ConfigError, DataError

OWN = tuple(plain.TABLE)


def scene(height: int = 96, width: int = 128, shade: int = 230) -> plain.Pixels:
    """A dark blue square on light ground."""
    out = np.full((height, width, 3), shade, np.uint8)
    out[height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = (20, 30, 120)
    return out


def outline(height: int = 96, width: int = 128, around: int = 3) -> np.ndarray:
    """Where the border of the square is, and a few pixels around."""
    inside = np.zeros((height, width), bool)
    inside[height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = True
    near = np.zeros_like(inside)
    for dy in range(-around, around + 1):
        for dx in range(-around, around + 1):
            near |= np.roll(inside, (dy, dx), (0, 1)) != inside
    return near


@pytest.mark.parametrize("name", OWN)
def test_a_control_picture_has_the_picture_s_size_and_is_always_the_same(name: str) -> None:
    annotator = open_annotator(name)
    for height, width in ((96, 128), (17, 40), (64, 64)):
        picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        before = picture.copy()
        drawn = annotator(picture)
        assert drawn.shape == picture.shape and drawn.dtype == np.uint8 and drawn.flags["C_CONTIGUOUS"]
        assert np.array_equal(picture, before) and np.array_equal(open_annotator(name)(picture), drawn)


@pytest.mark.parametrize("name", ("canny", "softedge", "scribble", "lineart-standard"))
def test_lines_are_where_the_picture_has_them(name: str) -> None:
    drawn = open_annotator(name)(scene())
    near = outline()
    assert drawn[near].max() >= 100 and drawn[~near].max() <= 8
    assert (drawn[..., 0] == drawn[..., 2]).all(), "lines have no colour"
    assert open_annotator(name)(np.full_like(scene(), 90)).max() == 0, "a plain picture has none"


def test_scribbles_are_thicker_than_edges() -> None:
    edges, strokes = (open_annotator(name)(scene(512, 512))[..., 0] > 0 for name in ("canny", "scribble"))
    assert strokes.sum() > 3 * edges.sum()


def test_the_grid_of_colours_is_of_mean_colours() -> None:
    picture = np.random.default_rng(1).integers(0, 256, (512, 1024, 3), dtype=np.uint8)
    drawn = open_annotator("colour")(picture)
    cells = picture.reshape(8, 64, 16, 64, 3).mean((1, 3))
    assert np.abs(drawn.reshape(8, 64, 16, 64, 3)[:, 0, :, 0] - cells).max() <= 1
    assert (drawn.reshape(8, 64, 16, 64, 3) == drawn.reshape(8, 64, 16, 64, 3)[:, :1, :, :1]).all()


def test_grey_keeps_how_bright_it_is() -> None:
    picture = scene()
    luma = picture @ np.array([0.299, 0.587, 0.114])
    assert np.abs(open_annotator("grey")(picture) - luma[..., None]).max() <= 1


def test_a_tile_keeps_slopes_and_loses_what_is_fine() -> None:
    slope = np.repeat(np.tile(np.linspace(0, 255, 128), (96, 1))[..., None], 3, 2).astype(np.uint8)
    assert np.abs(open_annotator("tile")(slope).astype(int) - slope)[:, 8:-8].max() <= 6
    checks = (np.indices((96, 128)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)
    assert np.abs(open_annotator("tile")(checks).astype(int) - 127).max() <= 2


def test_what_is_no_picture_is_refused() -> None:
    for bad in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)):
        with pytest.raises(DataError, match="expected an RGB picture"):
            open_annotator("canny")(bad)  # pyright: ignore[reportArgumentType]


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match='unknown annotator "cany".*did you mean "canny"'):
        open_annotator("cany")
    with pytest.raises(ConfigError, match="weights .* of canny; expected none"):
        open_annotator("canny", "somewhere")
    assert len(set(NAMES)) == len(NAMES) and not {"dwpose", "shuffle"} & set(NAMES)


@pytest.mark.skipif(importlib.util.find_spec(learned.PACKAGE) is not None, reason="it is installed")
@pytest.mark.parametrize("name", learned.TABLE)
def test_a_missing_package_is_told_how_to_install(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"annotator {name} is one of controlnet_aux.*pip install 'vgm_peft\[controlnet\]'"):
        open_annotator(name)


PACKAGE = {
    "__init__.py": "raise ImportError('everything at once')\n",
    "util.py": "GAIN = 2\n",
    "hed/__init__.py": """
import os, torch
from PIL import Image, ImageChops
from ..util import GAIN
class HEDdetector:
    def __init__(self, add): self.add = add
    @classmethod
    def from_pretrained(cls, place): return cls(int(torch.load(os.path.join(place, "ControlNetHED.pth"))["add"]))
    def __call__(self, picture, detect_resolution, image_resolution, output_type, scribble=False):
        grey = picture.convert("L").point(lambda v: v * GAIN + self.add + 50 * scribble)
        return grey.resize((image_resolution, image_resolution))
""",
    "midas/__init__.py": "import a_package_that_nobody_has\n",
}
"""A package laid out like controlnet_aux, whose whole import needs more than any one detector does."""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in PACKAGE.items():
        path = tmp_path / "site" / learned.PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in [n for n in sys.modules if n.split(".")[0] == learned.PACKAGE]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()
    weights = tmp_path / "weights"
    weights.mkdir()
    torch.save({"add": torch.tensor(5)}, weights / "ControlNetHED.pth")
    yield weights
    for name in [n for n in sys.modules if n.split(".")[0] == learned.PACKAGE]:
        del sys.modules[name]


def test_one_detector_is_imported_without_the_others(package: Path) -> None:
    annotator = open_annotator("softedge-hed", str(package))
    drawn = annotator(np.full((48, 80, 3), 60, np.uint8))
    assert drawn.shape == (48, 80, 3) and (drawn == 125).all()
    assert (open_annotator("scribble-hed", str(package))(np.full((48, 80, 3), 60, np.uint8)) == 175).all()
    assert learned.PACKAGE not in sys.modules, "whoever imports the package itself gets all of it"


def test_what_a_detector_draws_is_known_by_its_weights(package: Path) -> None:
    first = open_annotator("softedge-hed", str(package)).identity
    assert (
        first == open_annotator("softedge-hed", str(package)).identity != open_annotator("scribble-hed", str(package)).identity
    )
    torch.save({"add": torch.tensor(6)}, package / "ControlNetHED.pth")
    assert open_annotator("softedge-hed", str(package)).identity != first


def test_what_a_detector_lacks_is_said(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"depth cannot be imported \(No module named 'a_package.*pip install"):
        open_annotator("depth", str(package))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no ControlNetHED.pth there; expected the weights of softedge-hed"):
        open_annotator("softedge-hed", str(tmp_path / "empty"))
    with pytest.raises(DataError, match="no such folder"):
        open_annotator("softedge-hed", "no/such/folder")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="cannot be fetched.*go online, or name a folder"):
        open_annotator("softedge-hed")
    (package / "ControlNetHED.pth").write_bytes(b"cut")
    with pytest.raises(DataError, match="weights of softedge-hed cannot be loaded"):
        open_annotator("softedge-hed", str(package))


def test_the_command_writes_one_control_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(scene()).save(tmp_path / "a.png")
    assert main(["canny", str(tmp_path / "a.png"), str(tmp_path / "out" / "b.png")]) == 0
    with Image.open(tmp_path / "out" / "b.png") as drawn:
        assert np.array_equal(np.array(drawn), plain.canny(scene()))
    assert "canny of 128 x 96 pixels" in capsys.readouterr().out
    assert main(["grey,canny", str(tmp_path / "a.png"), str(tmp_path / "row.png")]) == 0
    with Image.open(tmp_path / "row.png") as drawn:
        assert np.array_equal(np.array(drawn), np.hstack([plain.grey(scene()), plain.canny(scene())]))
    capsys.readouterr()
    assert main(["canny", str(tmp_path / "none.png"), str(tmp_path / "b.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
