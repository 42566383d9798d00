"""Bad data sets: each is caught before training, by name, and each kind that can be allowed then does what it says."""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tests.data.makers import encoded, pixels, save, swapped_profile
from vgm_peft.data import KINDS, Report, Source, scan_all
from vgm_peft.data.faults import check_kinds
from vgm_peft.errors import ConfigError, DataError

Spoil = Callable[[Path], object]


def good(folder: Path) -> Path:
    """Three sound, captioned pictures."""
    for number in range(3):
        save(folder / f"{number}.png", 48, 40, number)
        (folder / f"{number}.txt").write_text(f"a red robot, on grass, picture {number}")
    return folder


def write(name: str, data: str | bytes) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return spoil


def remove(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def rename(old: str, new: str) -> Spoil:
    return lambda folder: (folder / old).rename(folder / new)


def rows(*lines: dict[str, object]) -> Spoil:
    return write("metadata.jsonl", "\n".join(map(json.dumps, lines)))


def picture(name: str, width: int = 48, height: int = 40, seed: int = 9) -> Spoil:
    return lambda folder: save(folder / name, width, height, seed)


def cut_out(folder: Path) -> None:
    image = pixels(48, 40, 1).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(folder / "1.png")


def moving(folder: Path) -> None:
    save(folder / "1.png", 48, 40, 1, save_all=True, append_images=[pixels(48, 40, 5)])


def long_animation(folder: Path) -> None:
    """An APNG that claims 100,000 frames beside its picture."""
    import struct
    import zlib

    raw = (folder / "1.png").read_bytes()
    body = struct.pack(">II", 100_000, 0)
    chunk = struct.pack(">I", 8) + b"acTL" + body + struct.pack(">I", zlib.crc32(b"acTL" + body))
    (folder / "1.png").write_bytes(raw[:33] + chunk + raw[33:])


def smooth(folder: Path) -> Image.Image:
    image = pixels(6, 5, 3).resize((96, 80), Image.Resampling.BICUBIC)
    image.save(folder / "big.png")
    for name in ("big", "other"):
        (folder / f"{name}.txt").write_text(name)
    return image


def saved_anew(folder: Path) -> None:
    smooth(folder).save(folder / "other.jpg", quality=60)


def halved(folder: Path) -> None:
    smooth(folder).resize((48, 40), Image.Resampling.LANCZOS).save(folder / "other.png")


def twin(folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "copy.txt").write_text("the same")


def text_bomb(folder: Path) -> None:
    """50 MB of compressed text in a PNG of 50 KB."""
    import struct
    import zlib

    raw = encoded("PNG", 48, 40)
    body = b"note\0\0" + zlib.compress(bytes(50_000_000), 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    (folder / "1.png").write_bytes(raw[:33] + chunk + raw[33:])


@dataclass(frozen=True)
class Bad:
    """How a sound folder is spoilt, what must be said of it, by which kind it may be allowed, and what is then trained."""

    spoil: Spoil
    says: str
    kind: str = ""
    left: int = 3


def half_a_control(folder: Path) -> None:
    for number in range(3):
        save(folder / "control" / f"{number}.png", 48, 40, 20 + number)
    whole = (folder / "control" / "1.png").read_bytes()
    (folder / "control" / "1.png").write_bytes(whole[: len(whole) // 2])


def lined_on_nothing(folder: Path) -> None:
    """Lines on transparent ground, as drawing programs save them: on white they would be gone."""
    for number in range(3):
        lines = pixels(48, 40, 20 + number).convert("RGBA")
        lines.putalpha(pixels(48, 40, 20 + number).convert("L") if number == 0 else 255)
        (folder / "control").mkdir(exist_ok=True)
        lines.save(folder / "control" / f"{number}.png")


CASES: dict[str, Bad] = {
    "empty file": Bad(write("1.png", b""), "1.png is empty (0 bytes)", "unreadable", 2),
    "one byte": Bad(write("1.png", b"\x89"), "1.png cannot be read as a picture", "unreadable", 2),
    "cut in half": Bad(write("1.png", encoded("PNG")[:800]), "1.png cannot be read as a picture", "unreadable", 2),
    "web page": Bad(write("1.png", "<!DOCTYPE html>404"), "1.png cannot be read as a picture (it is a web", "unreadable", 2),
    "text bomb": Bad(text_bomb, "1.png cannot be read as a picture", "unreadable", 2),
    "format not read": Bad(write("x.heic", "heic"), "x.heic is in a format that is not read", "unreadable"),
    "link out": Bad(lambda f: os.symlink("/etc/hostname", f / "x.png"), "x.png is a link out of the folder", "unreadable"),
    "link loop": Bad(lambda f: os.symlink(f, f / "loop"), "loop is a link to a folder", "unreadable"),
    "pipe": Bad(lambda f: os.mkfifo(f / "x.png"), "x.png is a pipe, socket or device", "unreadable"),
    "tiny": Bad(picture("1.png", 12, 40), "1.png has only 12 x 40 pixels", "tiny"),
    "transparent": Bad(cut_out, "1.png has transparent parts", "transparent"),
    "animated": Bad(moving, "1.png is an animation of 2 frames", "animated"),
    "endless animation": Bad(long_animation, "1.png is an animation of 100001 frames", "animated"),
    "same file twice": Bad(twin, "the same picture more than once: 0.png, copy.png", "duplicate", 4),
    "saved anew": Bad(saved_anew, "pictures that look the same: big.png, other.jpg", "near-duplicate", 5),
    "halved": Bad(halved, "pictures that look the same: big.png, other.png", "near-duplicate", 5),
    "damaged profile": Bad(
        lambda f: save(f / "1.png", 48, 40, 1, icc_profile=b"no profile"),
        "1.png has a colour profile that is damaged",
        "profile",
    ),
    "no caption": Bad(remove("1.txt"), "no caption for 1.png", "caption"),
    "wrong extension": Bad(rename("1.txt", "1.text"), "1.text is neither a picture nor a caption"),
    "wrong case": Bad(rename("1.png", "One.PNG"), "1.txt is a caption without a picture"),
    "empty caption": Bad(write("1.txt", " \r\n"), "1.txt is an empty caption", "caption"),
    "orphaned caption": Bad(write("other.txt", "nobody's"), "other.txt is a caption without a picture", "orphan"),
    "orphaned .caption": Bad(write("other.caption", "nobody's"), "other.caption is a caption without a picture", "orphan"),
    "orphaned .json": Bad(write("other.json", '{"text": "x"}'), "other.json is a caption without a picture", "orphan"),
    "orphaned row": Bad(rows({"file_name": "9.png", "text": "x"}), "line 1: 9.png is not in the folder", "orphan"),
    "bad .json": Bad(lambda f: (remove("1.txt")(f), write("1.json", "{")(f)), "1.json is not JSON"),
    "two texts in .json": Bad(
        lambda f: (remove("1.txt")(f), write("1.json", '{"text": "a", "prompt": "b"}')(f)), "1.json names text and prompt"
    ),
    "two captions": Bad(write("1.caption", "another"), "1.png has more than one caption: 1.caption and 1.txt"),
    "caption for two": Bad(picture("1.jpg"), "1.txt could be the caption of 1.jpg and 1.png"),
    "not UTF-8": Bad(write("1.txt", b"\xff\xfea\0"), "1.txt is not UTF-8 text"),
    "hidden direction": Bad(write("1.txt", "safe \u202e evil"), "1.txt holds the invisible character U+202E"),
    "stray file": Bad(write("notes.docx", "x"), "notes.docx is neither a picture nor a caption", "stray"),
    "table not read": Bad(write("captions.csv", "a,b"), "captions.csv is a table that is not read", "stray"),
    "subfolder": Bad(picture("more/x.png"), "more/ is a subfolder of 1 files that nothing names", "stray"),
    "unused masks": Bad(picture("masks/0.png"), 'masks/ holds 1 files, but data.masks is "off"', "stray"),
    "mask as picture": Bad(picture("1_mask.png"), "1_mask.png is named like a mask, but would be trained"),
    "control of nothing": Bad(
        lambda f: [save(f / "control" / f"{n}.png", 48, 40, 20 + n) for n in range(4)],
        "control/3.png is a control picture that belongs to no picture",
        "orphan",
    ),
    "control of other shape": Bad(
        lambda f: [save(f / "control" / f"{n}.png", 48, 48, 20 + n) for n in range(3)], "expected the same proportions"
    ),
    "picture without control": Bad(
        lambda f: [save(f / "control" / f"{n}.png", 48, 40, 20 + n) for n in range(2)], "2.png has no control picture"
    ),
    "two controls": Bad(
        lambda f: [save(f / "control" / name, 48, 40, 20) for name in ("0.png", "1.png", "2.png", "1.jpg")],
        "1.png has more than one control picture: control/1.jpg, control/1.png",
    ),
    "controls in two folders": Bad(
        lambda f: [save(f / d / f"{n}.png", 48, 40, 20 + n) for d in ("control", "conditioning_images") for n in range(3)],
        "0.png has more than one control picture: conditioning_images/0.png, control/0.png",
    ),
    "control in a row and in a folder": Bad(
        lambda f: (
            [save(f / "control" / f"{n}.png", 48, 40, 20 + n) for n in range(3)],
            save(f / "other" / "x.png", 48, 40, 30),
            rows({"file_name": "0.png", "control": "other/x.png"})(f),
        ),
        "0.png has more than one control picture: other/x.png, control/0.png",
    ),
    "two controls in a row": Bad(
        rows({"file_name": "0.png", "control": "a.png", "conditioning_image": "b.png"}), "line 1 names two controls"
    ),
    "control cut in half": Bad(half_a_control, "control/1.png cannot be read as a picture"),
    "control with transparent parts": Bad(lined_on_nothing, "control/0.png has transparent parts", "transparent"),
    "packed": Bad(
        write("shard-000.tar.gz", "x"), "shard-000.tar.gz is an archive that is not read; if it is a shard, unpack it", "stray"
    ),
    "parquet": Bad(write("train.parquet", "x"), "train.parquet is an archive that is not read", "stray"),
    "bad row": Bad(rows({"file_name": "0.png", "caption": "x"}), 'rename the key "caption" to "text"'),
    "repeats": Bad(rows({"file_name": "0.png", "repeats": 0}), '"repeats" is 0'),
}


def read(folder: Path, *allow: str, masks: str = "off") -> Report:
    return scan_all([Source(folder=folder, require_captions=True, masks=masks)], frozenset(allow))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CASES)
def test_a_bad_data_set_is_caught(name: str, tmp_path: Path) -> None:
    bad, folder = CASES[name], good(tmp_path / "me")
    assert len(read(folder).examples) == 3  # sound before
    bad.spoil(folder)
    with pytest.raises(DataError) as error:
        read(folder)
    text = str(error.value)
    assert bad.says in text
    if not bad.kind:
        with pytest.raises(DataError):
            read(folder, *set(KINDS) - {"stray", "orphan", "caption"})
        return
    assert f"--allow {bad.kind}" in text and KINDS[bad.kind] in text or "things are wrong" in text
    # A picture that is left out leaves its caption behind; that is told, and no fault.
    report = read(folder, bad.kind)
    assert len(report.examples) == bad.left and any(bad.kind in note for note in report.notes)
    everything = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}
    assert set(report.files) == everything and sum(report.counts.values()) == len(everything)
    assert report.counts["picture"] == bad.left


def test_every_kind_is_tested_and_a_wrong_one_is_told() -> None:
    assert {bad.kind for bad in CASES.values()} - {""} == set(KINDS) - {"mask"} and len(CASES) >= 30
    with pytest.raises(ConfigError, match='did you mean "duplicate"'):
        check_kinds(["duplicates"])


def test_allowing_names_what_is_not_allowed_still(tmp_path: Path) -> None:
    folder = good(tmp_path / "me")
    for name in ("stray file", "orphaned caption", "tiny"):
        CASES[name].spoil(folder)
    with pytest.raises(DataError) as error:
        read(folder, "stray")
    text = str(error.value)
    assert "2 things are wrong" in text and "notes.docx" not in text and "--allow orphan,tiny" in text
    assert [e.path.name for e in read(folder, "stray", "orphan", "tiny").examples] == ["0.png", "1.png", "2.png"]


def test_a_file_without_permission_is_named() -> None:
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:  # open to another user, as pytest's own folders are not
        Path(name).chmod(0o755)
        folder = good(Path(name) / "me")
        (folder / "1.png").chmod(0)
        (folder / "2.txt").chmod(0)
        try:
            if root:
                os.seteuid(65534)
            with pytest.raises(DataError) as error:
                read(folder)
        finally:
            if root:
                os.seteuid(0)
    assert "1.png cannot be opened (Permission denied)" in str(error.value)
    assert "2.txt cannot be opened (Permission denied)" in str(error.value)


def test_reading_a_folder_starts_no_program(tmp_path: Path) -> None:
    import sys

    started: list[str] = []
    armed = True

    def hook(event: str, args: tuple[object, ...]) -> None:
        if armed and event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"):
            started.append(event)

    sys.addaudithook(hook)
    folder = good(tmp_path / "me")
    for name in ("it's $(touch x).png", "--flag.png", "a;b|c.png"):
        save(folder / name, 48, 40, len(name))
        (folder / name).with_suffix(".txt").write_text(name)
    write("x.png", "%!PS-Adobe-3.0 EPSF-3.0\nshowpage")(folder)
    with pytest.raises(DataError, match="it is PostScript"):
        read(folder)
    armed = False
    assert not started


def test_masks_that_are_asked_for_must_be_there(tmp_path: Path) -> None:
    folder = good(tmp_path / "me")
    for number in range(2):
        save(folder / "masks" / f"{number}.png", 48, 40, 30 + number)
    with pytest.raises(DataError, match=r"2\.png has no mask; .*--allow mask"):
        read(folder, masks="files")
    report = read(folder, "mask", masks="files")
    assert [e.mask and e.mask.parent.name for e in report.examples] == ["masks", "masks", None]
    save(folder / "masks" / "9.png", 48, 40, 5)
    with pytest.raises(DataError, match=r"masks/9\.png is a mask that belongs to no picture"):
        read(folder, "mask", masks="files")


def test_transparency_may_be_the_mask(tmp_path: Path) -> None:
    folder = good(tmp_path / "me")
    cut_out(folder)
    report = read(folder, masks="alpha")
    assert [e.mask for e in report.examples] == [None, folder / "1.png", None]
    assert any("not transparent anywhere, so all of it counts: 0.png, 2.png" in note for note in report.notes)


def test_the_same_picture_in_two_folders_is_found(tmp_path: Path) -> None:
    first, second = good(tmp_path / "a"), good(tmp_path / "b")
    for number in range(1, 3):
        save(second / f"{number}.png", 48, 40, 40 + number)
    with pytest.raises(DataError, match=r"the same picture more than once: a/0\.png, b/0\.png"):
        scan_all([Source(folder=first), Source(folder=second)])


def test_a_profile_is_converted_and_that_is_told(tmp_path: Path) -> None:
    folder = good(tmp_path / "me")
    save(folder / "1.png", 48, 40, 1, icc_profile=swapped_profile())
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels(48, 40, 2).save(folder / "2.png", exif=exif)
    report = read(folder)
    assert report.notes == ("colour profile converted to sRGB: 1.png", "turned upright as its EXIF data say: 2.png")
    assert (report.examples[2].width, report.examples[2].height) == (40, 48)


def test_captions_may_be_json(tmp_path: Path) -> None:
    folder = good(tmp_path / "me")
    for number, text in enumerate(['"plain"', '{"caption": "named", "score": 3}']):
        remove(f"{number}.txt")(folder)
        write(f"{number}.json", text)(folder)
    assert [e.caption for e in read(folder).examples][:2] == ["plain", "named"]


def test_a_picture_of_many_text_chunks_is_read_quickly(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    folder, info = good(tmp_path / "me"), PngInfo()
    for number in range(10_000):
        info.add_text(f"key{number}", "x")
    pixels(48, 40, 1).save(folder / "1.png", pnginfo=info)
    assert len(read(folder).examples) == 3
