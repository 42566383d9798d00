"""Webdataset shards: read where they lie, as if each were a folder; and what a hostile one can be."""

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.test_companions import LAYOUTS, paired
from vgm_peft.data import Source, load_control, load_pixels, plan_crops, scan, scan_all, shards
from vgm_peft.data.member import Member
from vgm_peft.data.report import Report
from vgm_peft.errors import DataError

Spoil = Callable[[tarfile.TarFile], object]


def put(shard: tarfile.TarFile, name: str, raw: bytes = b"x", **more: object) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(raw)
    for key, value in more.items():
        setattr(entry, key, value)
    shard.addfile(entry, io.BytesIO(raw))


def png(seed: int) -> bytes:
    made = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(made, "PNG")
    return made.getvalue()


def pairs(path: Path, seed: int = 0, spoil: Spoil = lambda shard: None, form: int = tarfile.PAX_FORMAT) -> Path:
    """Two pictures with captions and control pictures, under the same keys in every shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as shard:
        for number in range(2):
            put(shard, f"./{number:04}.png", png(seed + number))
            put(shard, f"./{number:04}.json", f'{{"caption": "picture {seed + number}", "key": {number}}}'.encode())
            put(shard, f"./{number:04}.conditioning_image.png", png(100 + seed + number))
        spoil(shard)
    return path


def read(folder: Path, *allow: str) -> Report:
    return scan_all([Source(folder=folder, require_captions=True, require_controls=True)], frozenset(allow))


def test_a_shard_gives_what_its_files_unpacked_give(tmp_path: Path) -> None:
    made = paired(tmp_path / "made", LAYOUTS["unpacked webdataset"])
    (tmp_path / "packed").mkdir()
    with tarfile.open(tmp_path / "packed" / "shard.tar", "w") as shard:
        for path in sorted(made.iterdir(), reverse=True):
            shard.add(path, path.name)
    there, here = read(made).examples, read(tmp_path / "packed").examples
    assert [(e.path.name, e.caption, e.digest, e.control_digest) for e in here] == [
        (e.path.name, e.caption, e.digest, e.control_digest) for e in there
    ]
    crop = plan_crops([(48, 40)], 40, 8)[0]
    for mine, theirs in zip(here, there, strict=True):
        assert isinstance(mine.path, Member)
        for load in (load_pixels, load_control):
            assert torch.equal(load(mine, crop), load(theirs, crop))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and path.parent != made] == ["shard.tar"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_keys_are_those_of_a_shard_and_names_of_any_length(form: int, tmp_path: Path) -> None:
    long = f"{'a' * 80}/{'b' * 80}"

    def more(shard: tarfile.TarFile) -> None:
        put(shard, "folder", b"", type=tarfile.DIRTYPE)
        put(shard, "._0000.png", b"of a Macintosh")
        put(shard, f"{long}.png", png(50))
        put(shard, f"{long}.txt", b"deep")
        put(shard, f"{long}.control.png", png(51))
        put(shard, "metadata.jsonl", f'{{"file_name": "{long}.png", "control": "{long}.control.png"}}\n'.encode())

    pairs(tmp_path / "one.tar", spoil=more, form=form)
    pairs(tmp_path / "train" / "two.tar", 10, form=form)
    report = read(tmp_path)
    assert [e.caption for e in report.examples] == ["picture 0", "picture 1", "deep", "picture 10", "picture 11"]
    assert report.folders == (tmp_path,) and report.counts["shard"] == 2
    assert report.files["one.tar/._0000.png"] == "ignored: hidden" and report.files["train/two.tar/0001.png"] == "picture"


def test_faults_in_a_shard_say_in_which(tmp_path: Path) -> None:
    pairs(tmp_path / "one.tar")
    pairs(tmp_path / "two.tar", 10, lambda shard: put(shard, "0009.png", png(60)))
    with pytest.raises(DataError, match=r"two\.tar: 0009\.png has no control picture"):
        read(tmp_path)
    pairs(tmp_path / "two.tar", 1)
    with pytest.raises(DataError, match=r"the same picture more than once: one\.tar/0001\.png, two\.tar/0000\.png"):
        read(tmp_path)


HOSTILE: dict[str, tuple[Spoil, str]] = {
    "link": (lambda t: put(t, "0002.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "0002.png is a link"),
    "hard link": (lambda t: put(t, "0002.png", b"", type=tarfile.LNKTYPE, linkname="../../a"), "0002.png is a link"),
    "device": (lambda t: put(t, "0002.png", b"", type=tarfile.CHRTYPE), "0002.png is a device"),
    "absolute": (lambda t: put(t, "/etc/0002.png", png(9)), "/etc/0002.png is not named as a file within it"),
    "upwards": (lambda t: put(t, "a/../../0002.png", png(9)), "a/../../0002.png is not named as a file within it"),
    "no text": (lambda t: put(t, "a\udcff.png", png(9)), "'a\\udcff.png' is not named as a file within it"),
    "twice": (lambda t: put(t, "0001.png", png(9)), "0001.png is there twice"),
    "holes": (lambda t: put(t, "0002.png", png(9), pax_headers={"GNU.sparse.major": "1"}), "0002.png is a file with holes"),
    "no picture": (lambda t: put(t, "0002.npy", b"x"), "0002.npy is neither a picture nor a caption"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_member_is_named_and_leaves_the_others_whole(name: str, tmp_path: Path) -> None:
    spoil, says = HOSTILE[name]
    pairs(tmp_path / "a.tar", spoil=spoil)
    kind = "stray" if name == "no picture" else "unreadable"
    with pytest.raises(DataError) as error:
        read(tmp_path)
    assert f"a.tar: {says}" in str(error.value) and f"--allow {kind}" in str(error.value)
    assert [e.caption for e in read(tmp_path, kind).examples] == ["picture 0", "picture 1"]


def cut(after: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[: raw.index(b"./0001.cond") + after]


LONG = {f"pax {i}": "x" * 2**14 for i in range(8)}
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut in a picture": (lambda p: p.write_bytes(cut(600)(p.read_bytes())), "ends within ./0001.conditioning_image.png"),
    "cut in a header": (lambda p: p.write_bytes(cut(100)(p.read_bytes())), "it ends within a header"),
    "damaged": (lambda p: p.write_bytes(p.read_bytes().replace(b"./0001.cond", b"./0002.cond")), "whose sum is wrong"),
    "no tar": (lambda p: p.write_bytes(b"x"), "it ends within a header"),
    "packed": (lambda p: p.write_bytes(gzip.compress(p.read_bytes() + bytes(9))), "a header that is none"),
    "long header": (lambda p: pairs(p, spoil=lambda t: put(t, "2.png", pax_headers=LONG)), "a name of 131"),
    "false size": (lambda p: pairs(p, spoil=lambda t: put(t, "2.txt", pax_headers={"size": str(2**62)})), "within 2.txt"),
    "no kind": (lambda p: pairs(p, spoil=lambda t: put(t, "2.txt", type=b"Q")), "a member of kind b'Q'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_shard_is_left_out_whole(name: str, tmp_path: Path) -> None:
    """Where it breaks, what came before may be no less wrong."""
    spoil, says = BROKEN[name]
    pairs(tmp_path / "good.tar", 10)
    spoil(pairs(tmp_path / "a.tar"))
    with pytest.raises(DataError, match=r"a\.tar cannot be read to its end as a tar file") as error:
        read(tmp_path)
    assert says in str(error.value)
    report = read(tmp_path, "unreadable")
    assert len(report.examples) == 2 and report.files["a.tar"] == "left out: cannot be read"


def test_a_shard_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(10240))
    with pytest.raises(DataError, match="there is no picture in it"):
        read(tmp_path)
    pairs(tmp_path / "a.tar")
    monkeypatch.setattr(shards, "MAX_MEMBERS", 2)
    with pytest.raises(DataError, match="more than 2 members"):
        read(tmp_path)


def test_a_shard_that_changed_since_is_noticed(tmp_path: Path) -> None:
    path = pairs(tmp_path / "a.tar")
    example, crop = read(tmp_path).examples[1], plan_crops([(48, 40)], 40, 8)[0]
    raw = path.read_bytes()
    path.write_bytes(raw.replace(png(1), png(2)[: len(png(1))].ljust(len(png(1)))))
    with pytest.raises(DataError, match="0001.png has changed since"):
        load_pixels(example, crop)
    path.write_bytes(raw[:600])
    with pytest.raises(DataError, match=r"0001\.png cannot be opened \(a\.tar is cut off\)"):
        load_pixels(example, crop)


def test_shards_lie_beside_loose_pictures(tmp_path: Path) -> None:
    pairs(tmp_path / "a.tar")
    (tmp_path / "b.png").write_bytes(png(70))
    (tmp_path / "b.txt").write_text("loose")
    with pytest.raises(DataError, match="b.png has no control picture"):
        read(tmp_path)
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "b.png").write_bytes(png(71))
    assert [e.caption for e in read(tmp_path).examples] == ["loose", "picture 0", "picture 1"]
    (tmp_path / "c.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match="c.tar.gz is an archive that is not read; if it is a shard, unpack it to a .tar"):
        read(tmp_path)


def test_plain_pictures_in_a_shard(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        put(shard, "0.png", png(0))
    assert [e.caption for e in scan(tmp_path, caption="a duck").examples] == ["a duck"]
