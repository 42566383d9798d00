import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vgm_peft.data.cache import Cache, key_of
from vgm_peft.folders import cache_folder

VALUES = {"mean": torch.arange(12.0).view(3, 4), "half": torch.ones(2, dtype=torch.bfloat16), "none": torch.zeros(0)}


def entry(cache: Cache, key: str) -> Path:
    return cache.root / key[:2] / f"{key}.safetensors"


def same(a: dict[str, torch.Tensor] | None, b: dict[str, torch.Tensor]) -> bool:
    return a is not None and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_what_was_put_is_got_back_exactly(tmp_path: Path) -> None:
    cache, key = Cache(tmp_path / "new"), key_of("test", "a")
    assert cache.get(key) is None
    cache.put(key, VALUES)
    assert same(cache.get(key), VALUES) and same(Cache(tmp_path / "new").get(key), VALUES)
    assert [p.name for p in (tmp_path / "new").glob("??/*")] == [f"{key}.safetensors"]


def test_keys_differ_wherever_anything_does() -> None:
    keys = [
        key_of("a"),
        key_of("b"),
        key_of("a", "x"),
        key_of("a", "x", "y"),
        key_of("a", "xy"),
        key_of("a", "y", "x"),
        key_of("a", b"x"),
        key_of("a", "1"),
        key_of("a", 1),
        key_of("a", "x "),
        key_of("a", "\u00e9"),
        key_of("a", "e\u0301"),
        key_of("a", "\udcff"),
    ]
    assert len(set(keys)) == len(keys)
    assert key_of("a", "x", 1) == key_of("a", "x", 1)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    cache, key = Cache(tmp_path), key_of("test", "a")
    cache.put(key, VALUES)
    whole = entry(cache, key).read_bytes()
    for place in range(len(whole)):
        hurt = bytearray(whole)
        hurt[place] ^= 1 << place % 8
        entry(cache, key).write_bytes(bytes(hurt))
        found = Cache(tmp_path).get(key)
        # A bit of the header's padding may mean nothing; the values are never others.
        assert found is None or same(found, VALUES), place
    assert whole.count(b" ") < 8


@pytest.mark.parametrize("raw", [b"", b"\0" * 7, b"\xff" * 100, b"\x80\x04K\x01.", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_damaged_or_foreign_entry_is_made_again_and_said(
    tmp_path: Path, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    cache, key = Cache(tmp_path), key_of("test", "a")
    cache.put(key, VALUES)
    entry(cache, key).write_bytes(raw)
    with caplog.at_level(logging.WARNING):
        assert cache.get(key) is None
    assert "is damaged; it is computed again" in caplog.text and len(cache.notes) == 1
    cache.put(key, VALUES)
    assert same(cache.get(key), VALUES)


def test_entries_without_our_checksum_or_under_another_name_are_refused(tmp_path: Path) -> None:
    cache, key, other = Cache(tmp_path), key_of("test", "a"), key_of("test", "b")
    cache.put(key, VALUES)
    entry(cache, other).parent.mkdir(exist_ok=True)
    entry(cache, key).rename(entry(cache, other))
    assert cache.get(other) is None
    entry(cache, key).parent.mkdir(exist_ok=True)
    save_file(VALUES, entry(cache, key))
    assert cache.get(key) is None


def test_a_value_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    cache, key = Cache(tmp_path), key_of("test", "a")
    cache.put(key, VALUES)
    assert cache.get(key, lambda found: "std" in found) is None and cache.notes


def test_a_place_that_cannot_be_used_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = Cache(tmp_path / "file" / "below")
    assert cache.get(key_of("x")) is None
    cache.put(key_of("x"), VALUES)
    cache.put(key_of("y"), VALUES)
    assert len([note for note in cache.notes if "going on without it" in note]) == 1


def test_a_full_disk_leaves_no_half_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    cache = Cache(tmp_path)
    monkeypatch.setattr(os, "replace", full)
    cache.put(key_of("x"), VALUES)
    assert cache.notes == [f"cache {tmp_path} cannot be written (No space left on device); going on without it"]
    assert list(tmp_path.glob("??/*")) == list(tmp_path.glob("??/.*")) == []


def test_a_cache_that_is_off_touches_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "off", enabled=False)
    cache.put(key_of("x"), VALUES)
    assert cache.get(key_of("x")) is None and not (tmp_path / "off").exists() and not cache.notes


def test_the_default_place_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Cache().root == cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "vgm_peft"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the XDG specification
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/vgm_peft")


WRITER = """
import sys, torch
from pathlib import Path
from vgm_peft.data.cache import Cache, key_of
cache = Cache(Path(sys.argv[1]))
print("ready", flush=True)
number = 0
while True:
    cache.put(key_of("n", number % 8), {"x": torch.full((64, 64), float(number % 8))})
    number += 1
"""


def test_writers_at_once_and_one_killed_leave_nothing_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        cache = Cache(tmp_path)
        for turn in range(50):
            for number in range(8):
                values = cache.get(key_of("n", number))
                assert values is None or bool((values["x"] == number).all())
                if (turn + number) % 3 == 0:
                    cache.put(key_of("n", number), {"x": torch.full((64, 64), float(number))})
        other.kill()
    assert not cache.notes
    assert all(Cache(tmp_path).get(key_of("n", number)) for number in range(8))
