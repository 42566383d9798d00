"""Control pictures in every layout that is read, in every size and mode that can stand for another."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.makers import pixels, save
from vgm_peft.data import Report, Source, load_control, plan_crops, scan_all
from vgm_peft.errors import DataError

LAYOUTS: dict[str, tuple[str, str]] = {
    "control folder": ("{}.png", "control/{}.png"),
    "conditioning folder": ("{}.png", "conditioning_images/{}.jpg"),
    "side by side": ("images/{}.png", "control/{}.png"),
    "side by side, conditioning": ("images/{}.jpg", "conditioning_images/{}.png"),
    "unpacked webdataset": ("{}.jpg", "{}.control.png"),
}


def paired(folder: Path, layout: tuple[str, str]) -> Path:
    for number in range(3):
        picture, control = (folder / name.format(f"00{number}") for name in layout)
        save(picture, 48, 40, number)
        save(control, 48, 40, 10 + number)
        picture.with_suffix(".txt").write_text(f"picture {number}")
    return folder


def read(folder: Path, annotator: str = "") -> Report:
    required = not annotator
    return scan_all([Source(folder=folder, require_captions=True, require_controls=required, annotator=annotator)])


def pairs(report: Report, folder: Path) -> list[tuple[str, str]]:
    return [(str(e.path.relative_to(folder)), str(e.control and e.control.relative_to(folder))) for e in report.examples]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_pairs_are_found_in_every_layout(layout: tuple[str, str], tmp_path: Path) -> None:
    report = read(paired(tmp_path, layout))
    assert pairs(report, tmp_path) == [tuple(name.format(f"00{n}") for name in layout) for n in range(3)]
    assert [e.caption for e in report.examples] == ["picture 0", "picture 1", "picture 2"]
    assert report.counts == {"picture": 3, "control": 3, "caption": 3}


@pytest.mark.parametrize("key", ("control", "conditioning_image", "conditioning_image_file_name"))
def test_a_hugging_face_image_folder_is_read(key: str, tmp_path: Path) -> None:
    rows: list[dict[str, str]] = []
    for number in range(3):
        save(tmp_path / "images" / f"{number}.png", 48, 40, number)
        save(tmp_path / "steer" / f"s{number}.png", 48, 40, 10 + number)
        rows.append({"file_name": f"images/{number}.png", "text": "x", key: f"steer/s{number}.png"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert pairs(read(tmp_path), tmp_path) == [(f"images/{n}.png", f"steer/s{n}.png") for n in range(3)]


def test_rows_may_name_the_pictures_and_the_folder_the_controls(tmp_path: Path) -> None:
    paired(tmp_path, LAYOUTS["side by side"])
    rows = [{"file_name": f"images/00{n}.png", "repeats": 2} for n in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = read(tmp_path)
    assert pairs(report, tmp_path) == [(f"images/00{n}.png", f"control/00{n}.png") for n in range(3)]
    assert [e.repeats for e in report.examples] == [2, 2, 2]


def test_a_shard_unpacked_by_tar_is_a_data_set(tmp_path: Path) -> None:
    made = paired(tmp_path / "made", LAYOUTS["unpacked webdataset"])
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for path in sorted(made.iterdir()):
            shard.add(path, path.name)
    with tarfile.open(tmp_path / "shard.tar") as shard:
        shard.extractall(tmp_path / "set", filter="data")
    assert len(read(tmp_path / "set").examples) == 3


def test_a_folder_images_alone_is_still_told_of(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png")
    with pytest.raises(DataError, match="images/ is a subfolder of 1 files that nothing names"):
        read(tmp_path, "canny")


@pytest.mark.parametrize("mode", ("L", "1", "P", "RGBA", "CMYK", "I;16"))
def test_a_control_of_any_mode_and_size_is_brought_to_its_picture(mode: str, tmp_path: Path) -> None:
    save(tmp_path / "a.png", 48, 40)
    (tmp_path / "a.txt").write_text("x")
    grey = np.tile(np.linspace(0, 255, 96), (80, 1)).astype(np.uint8)
    control = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    (tmp_path / "control").mkdir()
    control.save(tmp_path / "control" / ("a.jpg" if mode == "CMYK" else "a.png"))
    (example,) = read(tmp_path).examples
    crop = plan_crops([(48, 40)], 40, 8)[0]
    found = load_control(example, crop)
    assert found.shape == (3, crop.target[1], crop.target[0])
    columns = found.mean((0, 1))
    assert columns[0] < 0.2 and columns[-1] > 0.8
    if mode != "1":
        assert (columns.diff() > -0.01).all() and torch.allclose(found[0], found[2], atol=0.04)


def test_computed_control_pictures_are_told_and_need_none_beside(tmp_path: Path) -> None:
    for number in range(2):
        pixels(48, 40, number).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("x")
    assert read(tmp_path, "canny").notes == ("control pictures are computed from the pictures: canny",)
    save(tmp_path / "control" / "0.png", 48, 40, 8)
    save(tmp_path / "control" / "1.png", 48, 40, 9)
    with pytest.raises(DataError, match=r"control pictures for 0\.png, 1\.png, and canny is to make others"):
        read(tmp_path, "canny")
