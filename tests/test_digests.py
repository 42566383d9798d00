"""Digests of files: the right ones, whatever happened to a file or to what is remembered of it."""

import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from vgm_peft import digests
from vgm_peft.digests import LARGE, Memory, digest_of_files, digests_of
from vgm_peft.train.seal import check, seal

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing is remembered there")
LIE = "f" * 64
FACTS = ("st_size", "st_mtime_ns", "st_ctime_ns", "st_ino", "st_dev")
"""What tells one file, as it is, from every other."""


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose digest is remembered although it is small and young, and a memory of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "LARGE", 1)
    monkeypatch.setattr(digests, "YOUNG", 0)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"weights, as they were")
    return path


def truth(*paths: Path) -> list[str]:
    return [sha256(path.read_bytes()).hexdigest() for path in paths]


def test_digests_are_those_of_the_files_in_order(tmp_path: Path) -> None:
    paths = [tmp_path / str(size) for size in (0, 1, LARGE + 1, 1 << 20, 5)]
    for path in paths:
        path.write_bytes(os.urandom(int(path.name)))
    assert digests_of([*paths, paths[1]]) == truth(*paths, paths[1])
    assert digest_of_files(paths) == sha256("".join(truth(*paths)).encode()).hexdigest()
    with pytest.raises(FileNotFoundError):
        digests_of([paths[0], tmp_path / "gone"])


def test_what_is_remembered_is_not_read_again(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen by a lie that is planted: it is believed. By its relative path the file is the same one."""
    assert digests_of([weights]) == truth(weights) == [Memory().recall(weights)]
    Memory().remember(weights, weights.stat(), LIE)
    monkeypatch.chdir(weights.parent)
    assert digests_of([weights, Path(weights.name)]) == [LIE, LIE]


def test_small_files_and_young_ones_are_always_read(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "LARGE", LARGE)
    assert digests_of([weights]) == truth(weights) and not Memory().folder.exists()
    Memory().remember(weights, weights.stat(), LIE)  # as if it had been large once
    assert digests_of([weights]) == truth(weights)
    Memory().entry(weights).unlink()
    Memory().folder.rmdir()
    weights.write_bytes(bytes(LARGE))
    monkeypatch.setattr(digests, "YOUNG", 2_000_000_000)
    monkeypatch.setattr("time.time_ns", lambda: weights.stat().st_ctime_ns + 1_999_999_999)
    assert digests_of([weights]) == truth(weights) and not Memory().folder.exists()
    monkeypatch.setattr("time.time_ns", lambda: weights.stat().st_ctime_ns + 2_000_000_000)
    assert digests_of([weights]) == truth(weights) == [Memory().recall(weights)]


@pytest.mark.parametrize("ahead", [-10, 10])
def test_a_file_is_as_young_as_its_latest_change(ahead: int, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be that of its content, as anybody may date it, or of anything else of it."""
    monkeypatch.setattr(digests, "YOUNG", 2_000_000_000)
    os.utime(weights, ns=(0, weights.stat().st_ctime_ns + ahead * 10**9))
    facts = weights.stat()
    latest = max(facts.st_mtime_ns, facts.st_ctime_ns)
    for age, known in ((1_999_999_999, None), (2_000_000_000, truth(weights)[0])):
        monkeypatch.setattr("time.time_ns", lambda age=age: latest + age)
        assert digests_of([weights]) == truth(weights) and Memory().recall(weights) == known


def test_a_file_does_not_grow_old_while_it_is_read(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may change in the very tick in which its reading began; when the reading ends is nothing to the point."""
    clock = [weights.stat().st_ctime_ns]
    monkeypatch.setattr(digests, "YOUNG", 2_000_000_000)
    monkeypatch.setattr("time.time_ns", lambda: clock[0])

    @contextmanager
    def slow(total: int) -> Generator[Callable[[int], None]]:
        yield lambda count: clock.append(clock.pop() + 10**10)

    monkeypatch.setattr(digests, "_progress", slow)
    assert digests_of([weights]) == truth(weights) and clock[0] >= weights.stat().st_ctime_ns + 10**10
    assert Memory().recall(weights) is None


def test_a_file_that_changes_while_it_is_read_is_hashed_anew(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def changing(total: int) -> Generator[Callable[[int], None]]:
        yield lambda count: os.truncate(weights, weights.stat().st_size - 1)

    with monkeypatch.context() as patch:
        patch.setattr(digests, "_progress", changing)
        before = truth(weights)
        assert digests_of([weights]) == before != truth(weights)
    assert Memory().recall(weights) is None and digests_of([weights]) == truth(weights)


@pytest.mark.parametrize("fact", FACTS)
def test_what_is_remembered_holds_for_a_file_of_exactly_these_facts(fact: str, weights: Path) -> None:
    facts = {name: getattr(weights.stat(), name) for name in FACTS}
    Memory().remember(weights, cast("os.stat_result", SimpleNamespace(**facts)), LIE)
    assert digests_of([weights]) == [LIE]
    facts[fact] += 1
    Memory().remember(weights, cast("os.stat_result", SimpleNamespace(**facts)), LIE)
    assert digests_of([weights]) == truth(weights)


def test_a_changed_file_of_equal_size_with_its_time_set_back_is_hashed_anew(weights: Path) -> None:
    before = weights.stat()
    digests_of([weights])
    while weights.stat().st_ctime_ns == before.st_ctime_ns:  # until the clock has ticked, for which YOUNG waits otherwise
        weights.write_bytes(b"weights, as they are.")
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = weights.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert digests_of([weights]) == truth(weights)


def test_another_file_in_its_place_is_hashed_anew(weights: Path) -> None:
    before = weights.stat()
    digests_of([weights])
    other = weights.with_name("other")
    other.write_bytes(b"weights of other make")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, weights)
    assert digests_of([weights]) == truth(weights)


def test_a_memory_copied_under_another_files_name_says_nothing(weights: Path) -> None:
    copy, link = weights.with_name("copy"), weights.with_name("link")
    os.link(weights, link)  # of which all is the same but the name
    digests_of([weights])
    shutil.copy2(Memory().entry(weights), Memory().entry(link))
    assert Memory().recall(link) is None and digests_of([link]) == truth(weights)
    shutil.copy2(weights, copy)
    copy.write_bytes(b"other weights, longer")
    shutil.copy2(Memory().entry(weights), Memory().entry(copy))
    assert Memory().recall(copy) is None and digests_of([copy]) == truth(copy)


def _flipped(entry: Path) -> None:
    entry.write_bytes(b"0" + entry.read_bytes()[1:] if entry.read_bytes()[:1] != b"0" else b"1" + entry.read_bytes()[1:])


def _cut(entry: Path) -> None:
    entry.write_bytes(entry.read_bytes()[:-2])


def _emptied(entry: Path) -> None:
    entry.write_bytes(b"")


def _no_text(entry: Path) -> None:
    entry.write_bytes(b"\xff\x00" * 65)


def _endless(entry: Path) -> None:
    os.truncate(entry, 1 << 40)


def _folder(entry: Path) -> None:
    entry.unlink()
    (entry / "full").mkdir(parents=True)


def _pipe(entry: Path) -> None:
    entry.unlink()
    os.mkfifo(entry)


def _link(entry: Path) -> None:
    entry.rename(entry.with_name("elsewhere"))
    entry.symlink_to("elsewhere")


def _of_others(entry: Path) -> None:
    entry.chmod(0o666)


@pytest.fixture
def watchdog() -> Generator[None]:
    """What would wait for ever fails instead."""

    def bark(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, bark)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("watchdog")
@pytest.mark.parametrize("spoil", [_flipped, _cut, _emptied, _no_text, _endless, _folder, _pipe, _link, _of_others])
def test_a_damaged_or_hostile_memory_costs_time_only(spoil: Callable[[Path], None], weights: Path) -> None:
    """Sealed lies among it where others could have written them: a link, a file that they may write."""
    digests_of([weights])
    entry = Memory().entry(weights)
    if spoil in (_link, _of_others):
        Memory().remember(weights, weights.stat(), LIE)
    spoil(entry)
    assert digests_of([weights]) == truth(weights)
    if spoil is not _folder:  # that one is left alone
        assert Memory().recall(weights) == truth(weights)[0] and stat.S_IMODE(entry.lstat().st_mode) == 0o600
    assert not [p for p in Memory().folder.iterdir() if p.name.startswith(".")]


def test_what_another_user_has_written_is_not_believed(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Memory().remember(weights, weights.stat(), LIE)
    monkeypatch.setattr(os, "getuid", lambda: weights.stat().st_uid + 1)
    assert digests_of([weights]) == truth(weights)


def test_where_nothing_can_be_remembered_files_are_read(weights: Path) -> None:
    (weights.parent / "cache").write_text("no folder")
    assert digests_of([weights]) == digests_of([weights]) == truth(weights)


SHARE = """
import sys
from pathlib import Path
from vgm_peft import digests
digests.LARGE, digests.YOUNG = 1, 0
print(*digests.digests_of(map(Path, sys.argv[1:])))
"""


def test_processes_at_once_share_what_is_remembered(weights: Path) -> None:
    paths = [weights.with_name(f"{number}") for number in range(20)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 100_000)
    command = [sys.executable, "-c", SHARE, *map(str, paths)]
    at_once = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [run.communicate()[0].split() for run in at_once] == [truth(*paths)] * 3
    assert [Memory().recall(path) for path in paths] == truth(*paths)
    assert len(list(Memory().folder.iterdir())) == 20


def test_checkpoints_are_always_read(weights: Path) -> None:
    """Whatever is remembered: a lie about good bytes changes nothing, nor does a lie that would cover bad ones."""
    folder = weights.parent / "step-000001"
    folder.mkdir()
    state = folder / "state"
    state.write_bytes(b"as it was")
    seal(folder, 1, 1)
    good = truth(state)[0]
    Memory().remember(state, state.stat(), LIE)
    check(folder, ["state"], 1, 1)
    state.write_bytes(b"as it is.")
    Memory().remember(state, state.stat(), good)
    with pytest.raises(ValueError, match="the bytes of state are not those"):
        check(folder, ["state"], 1, 1)
