import json
import os
from pathlib import Path

import pytest

from tests.data.makers import save
from vgm_peft.data import Source, scan, scan_all
from vgm_peft.errors import DataError

ROOT = Path(__file__).parents[2]


def rows(folder: Path, *lines: dict[str, object] | str) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text)


def test_captions_come_from_files_beside_the_picture(tmp_path: Path) -> None:
    for index, (name, suffix) in enumerate([("a.png", ".txt"), ("b.JPG", ".caption"), ("c.webp", ".webp.txt")]):
        save(tmp_path / name, 40 + index, 32, index)
        (tmp_path / name).with_suffix(suffix).write_text(f"picture {index}")
    report = scan(tmp_path, require_captions=True)
    assert [(e.path.name, e.caption, e.width, e.height) for e in report.examples] == [
        ("a.png", "picture 0", 40, 32),
        ("b.JPG", "picture 1", 41, 32),
        ("c.webp", "picture 2", 42, 32),
    ]
    assert len({e.digest for e in report.examples}) == 3 and report.notes == ()


def test_the_common_caption_is_for_those_without_and_that_is_said(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "b.png", seed=1)
    assert [e.caption for e in scan(tmp_path).examples] == ["", ""]
    report = scan(tmp_path, caption="a photo of tok")
    assert [e.caption for e in report.examples] == ["a photo of tok"] * 2 and report.notes == ()
    (tmp_path / "a.txt").write_text("mine")
    report = scan(tmp_path, caption="a photo of tok")
    assert [e.caption for e in report.examples] == ["mine", "a photo of tok"]
    assert report.notes == ('1 of 2 pictures have captions of their own, the other 1 get "a photo of tok"',)
    with pytest.raises(DataError, match=r"no caption for b\.png"):
        scan(tmp_path)


def test_metadata_names_captions_controls_and_repeats(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "more" / "b.png", seed=1)
    save(tmp_path / "a_edges.png", seed=2)
    save(tmp_path / "steer" / "b.png", 80, 64, seed=3)
    rows(
        tmp_path,
        {"file_name": "a.png", "text": "one", "control": "a_edges.png", "repeats": 3},
        {"file_name": "more/b.png", "text": "two", "conditioning_image": "steer/b.png", "author": "me"},
    )
    report = scan(tmp_path)
    first, second = report.examples
    assert (first.caption, first.control, first.repeats) == ("one", tmp_path / "a_edges.png", 3)
    assert (second.caption, second.control, second.repeats) == ("two", tmp_path / "steer" / "b.png", 1)
    assert report.notes == ("metadata.jsonl: columns not used: author",)


def test_a_control_folder_is_matched_by_name(tmp_path: Path) -> None:
    for index, name in enumerate(["a.png", "b.jpg", "control/a.jpg", "control/b.png"]):
        save(tmp_path / name, seed=index)
    assert [e.control for e in scan(tmp_path).examples] == [tmp_path / "control" / "a.jpg", tmp_path / "control" / "b.png"]
    (tmp_path / "control" / "b.png").rename(tmp_path / "control" / "c.png")
    with pytest.raises(DataError) as error:
        scan(tmp_path)
    assert "b.jpg has no control picture" in str(
        error.value
    ) and "control/c.png is a control picture that belongs to no picture" in str(error.value)


def test_a_control_of_other_proportions_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 40, 32)
    save(tmp_path / "control" / "a.png", 40, 40)
    with pytest.raises(DataError, match=r"control/a\.png is 40 x 40, a\.png 40 x 32"):
        scan(tmp_path)


def test_what_plays_no_part_is_listed_with_the_reason(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    for name in (".DS_Store", "Thumbs.db", "README.md"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".git").mkdir()
    report = scan(tmp_path)
    assert report.ignored == {
        ".DS_Store": "hidden",
        ".git": "hidden",
        "README.md": "left by another program",
        "Thumbs.db": "left by another program",
    }
    assert "plays no part: .DS_Store (hidden)" in str(report)


def test_all_faults_are_told_together(tmp_path: Path) -> None:
    save(tmp_path / "good.png")
    (tmp_path / "good.txt").write_text("fine")
    (tmp_path / "empty.png").touch()
    (tmp_path / "fake.jpg").write_text("hello")
    (tmp_path / "moving.gif").write_bytes(b"GIF89a")
    (tmp_path / "orphan.txt").write_text("nobody's")
    (tmp_path / "good.text").write_text("wrong suffix")
    save(tmp_path / "sub" / "lost.png")
    os.symlink("/etc/hostname", tmp_path / "out.png")
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling.png")
    os.symlink(tmp_path, tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError) as error:
        scan(tmp_path)
    text = str(error.value)
    for said in [
        "empty.png is empty",
        "fake.jpg cannot be read as a picture",
        "moving.gif is in a format that is not read",
        "orphan.txt is a caption without a picture",
        "good.text is neither a picture nor a caption",
        "sub/ is a subfolder of 1 files that nothing names",
        "out.png is a link out of the folder",
        "dangling.png is a link to nothing",
        "loop is a link to a folder",
        "pipe.png is a pipe, socket or device",
        "no caption for empty.png, fake.jpg",
    ]:
        assert said in text
    assert "11 things are wrong" in text and "good.png" not in text.replace("a.png", "")


@pytest.mark.parametrize(
    ("raw", "outcome"),
    [
        (b"\xef\xbb\xbfa red car\r\n", "a red car"),
        (b"a red car \r\n\r\n on a hill\n", "a red car on a hill"),
        ("ein grünes Auto 🚗".encode(), "ein grünes Auto 🚗"),
        (b"\xff\xfea\0", "is not UTF-8"),
        (b"a\0b", "U+0000"),
        ("safe \u202e evil".encode(), "U+202E"),
        (b" \n\t\n", "is an empty caption"),
        (b"", "is an empty caption"),
        (b"x" * 2**20, "is too long"),
        (b"x" * 10_001, "is too long"),
    ],
)
def test_caption_bytes_have_a_stated_outcome(tmp_path: Path, raw: bytes, outcome: str) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(raw)
    if outcome.startswith(("a red", "ein")):
        assert scan(tmp_path).examples[0].caption == outcome
    else:
        with pytest.raises(DataError) as error:
            scan(tmp_path)
        assert "a.txt" in str(error.value) and outcome in str(error.value)


def test_one_caption_for_two_pictures_is_settled_by_its_name(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "a.jpg", seed=1)
    (tmp_path / "a.txt").write_text("which?")
    with pytest.raises(DataError, match=r"a\.txt could be the caption of a\.jpg and a\.png; name it a\.jpg\.txt"):
        scan(tmp_path, caption="x")
    (tmp_path / "a.txt").rename(tmp_path / "a.png.txt")
    assert [e.caption for e in scan(tmp_path, caption="x").examples] == ["x", "which?"]


def test_two_captions_for_one_picture_are_refused_unless_equal(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one")
    rows(tmp_path, {"file_name": "a.png", "text": "one"})
    assert scan(tmp_path).examples[0].caption == "one"
    (tmp_path / "a.caption").write_text("two")
    with pytest.raises(DataError, match=r"a\.png has more than one caption: a\.caption and a\.txt and metadata\.jsonl line 1"):
        scan(tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{not json", "line 1 is not JSON"),
        ("[1]", "line 1 is not an object"),
        ("[" * 100_000, "line 1 is not JSON"),
        ({"text": "x"}, 'line 1 has no "file_name"'),
        ({"file_name": "b.png", "text": "x"}, 'line 1: b.png is not in the folder; did you mean "a.png"?'),
        ({"file_name": "../a.png", "text": "x"}, "expected a file inside the image folder"),
        ({"file_name": "/a.png", "text": "x"}, "expected a file inside the image folder"),
        ({"file_name": "C:\\a.png", "text": "x"}, "expected a file inside the image folder"),
        ({"file_name": "a.png", "caption": "x"}, 'rename the key "caption" to "text"'),
        ({"file_name": "a.png", "text": 3}, '"text" is 3'),
        ({"file_name": "a.png", "text": " "}, "is an empty caption"),
        ({"file_name": "a.png", "text": "x", "repeats": 0}, '"repeats" is 0'),
        ({"file_name": "a.png", "text": "x", "repeats": True}, '"repeats" is true'),
        ({"file_name": "a.png", "text": "x", "control": "gone.png"}, "gone.png is not in the folder"),
    ],
)
def test_bad_metadata_is_named_by_its_line(tmp_path: Path, line: dict[str, object] | str, said: str) -> None:
    save(tmp_path / "a.png")
    rows(tmp_path, line)
    with pytest.raises(DataError) as error:
        scan(tmp_path)
    assert said in str(error.value)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        scan(tmp_path / "gone")
    with pytest.raises(DataError, match="is not a folder"):
        scan(save(tmp_path / "a.png"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there is no picture in it"):
        scan(tmp_path / "empty")


@pytest.mark.parametrize(
    "name", ["--flag.png", "-a.png", "it's $(touch x).png", "new\nline.png", "x" * 251 + ".png", "e\u0301.png"]
)
def test_strange_names_are_trained_and_shown(tmp_path: Path, name: str) -> None:
    save(tmp_path / name)
    (tmp_path / name).with_suffix(".txt").write_text("named")
    report = scan(tmp_path, require_captions=True)
    assert report.examples[0].path.name == name and report.examples[0].caption == "named"
    assert len(str(report).splitlines()) == 3


def test_names_that_differ_only_in_unicode_form_meet(tmp_path: Path) -> None:
    save(tmp_path / "\u00e9.png")
    (tmp_path / "e\u0301.txt").write_text("composed")
    assert scan(tmp_path).examples[0].caption == "composed"


def test_metadata_finds_a_name_in_any_unicode_form(tmp_path: Path) -> None:
    save(tmp_path / "e\u0301.png")
    rows(tmp_path, {"file_name": "\u00e9.png", "text": "composed"})
    assert scan(tmp_path).examples[0].caption == "composed"


@pytest.mark.parametrize(
    "name", ["control/notes.txt", "captions.json", "sub/metadata.jsonl", "a.png.bak", "no_suffix", "masks/a.png"]
)
def test_no_stray_file_passes_unseen(tmp_path: Path, name: str) -> None:
    save(tmp_path / "a.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(DataError) as error:
        scan(tmp_path, caption="x")
    assert name.split("/")[0] in str(error.value)


def test_two_rows_for_one_picture_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    rows(tmp_path, {"file_name": "a.png", "text": "x"}, {"file_name": "a.png", "text": "y"})
    with pytest.raises(DataError, match=r"lines 1 and 2 are both for a\.png"):
        scan(tmp_path)


def test_a_large_folder_is_read_in_linear_time(tmp_path: Path) -> None:
    raw = save(tmp_path / "0.png", 16, 16).read_bytes()
    for index in range(1000):
        (tmp_path / f"{index}.png").write_bytes(raw)
        (tmp_path / f"{index}.txt").write_text(f"picture {index}")
    rows(tmp_path, *({"file_name": f"{index}.png", "repeats": 2} for index in range(1000)))
    report = scan_all([Source(folder=tmp_path)], allow={"duplicate"})
    assert {e.path.stem: e.caption for e in report.examples} == {str(i): f"picture {i}" for i in range(1000)}
    assert len(report.notes) == 1 and len(report.notes[0]) < 300 and "and 980 more" in report.notes[0]
    assert report.counts == {"picture": 1000, "caption": 1000, "metadata": 1}


SHIPPED = sorted(p for kind in ("subjects", "styles") for p in (ROOT / "assets" / kind).glob("*/"))


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda p: p.name)
def test_the_pictures_that_we_ship_are_in_order(folder: Path) -> None:
    report = scan(folder, require_captions=True)
    assert len(report.examples) >= 5 and report.notes == () and not report.ignored


def test_the_report_is_a_short_table(tmp_path: Path) -> None:
    for index in range(20):
        save(tmp_path / f"{index:02}.png", seed=index)
    text = str(scan(tmp_path, caption="word " * 50))
    assert "20 pictures in" in text and "... and 8 more" in text
    assert max(map(len, text.splitlines()[1:])) < 100
