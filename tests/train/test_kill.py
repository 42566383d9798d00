"""`kill -9` at any moment: a run goes on to the same bytes, and a checkpoint is the old one or the new one, never neither."""

import errno
import itertools
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.train.forge import Forge, at_call
from tests.train.ground import tiny_base
from tests.train.killed import KILLED, SETTINGS, kept, restored, save_and_die, small_state, tensors_of
from vgm_peft.errors import SaveError, TrainError
from vgm_peft.train.checkpoint import save, thin
from vgm_peft.train.config import RunConfig, table

WORK = "tests.train.killed"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="fork and SIGKILL")


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forge]:
    with Forge(tmp_path_factory.mktemp("forge") / "log.txt") as forge:
        yield forge


def killed_again_and_again(forge: Forge, make: Callable[[str], RunConfig], tmp: Path, kills: int, seed: int) -> int:
    """Kill runs until there were `kills`, at moments drawn evenly over a whole run, half of them where files change; compare
    each with the uninterrupted one when it ends. Returns how many ended."""
    counts: dict[bool, int] = {}
    for files in (False, True):
        whole = make("whole")
        shutil.rmtree(whole.output, ignore_errors=True)
        assert forge.call(f"{WORK}:run", table=table(whole), files=files, count=str(tmp / "count")) == 0
        counts[files] = int((tmp / "count").read_text())
    expected, draw, done = kept(Path(make("whole").output)), random.Random(seed), 0
    for ended in itertools.count():
        config = make(f"killed-{ended}")
        for attempt in itertools.count():
            files = draw.random() < 0.5
            die = draw.randint(1, counts[files]) if done < kills else 0
            resume = config.output if attempt else ""
            status = forge.call(f"{WORK}:run", table=table(config), resume=resume, die=die, files=files)
            done += status == KILLED
            if status != KILLED:
                break
        assert status == 0, forge.log.read_text()[-3000:]
        found = kept(Path(config.output))
        odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        assert not odd, f"run {ended} of seed {seed}, killed {attempt} times"
        if done >= kills:
            return ended + 1
    raise AssertionError


@pytest.mark.parametrize(("settings", "kills"), [("plain", 10), ("rich", 10), ("scored", 4)])
def test_a_run_killed_again_and_again_ends_in_the_same_bytes(
    settings: str, kills: int, forge: Forge, config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Weights, optimiser, averages, record, scores, best step, previews, manifest and the file that is handed on."""

    def make(name: str) -> RunConfig:
        return config("finetune", name, SETTINGS[settings])

    assert killed_again_and_again(forge, make, tmp_path, kills, seed=0)
    if settings == "scored":  # what is returned is neither the last step nor the first, and when to stop was known too
        assert sorted(p.name for p in (tmp_path / "whole" / "checkpoints").rglob("step-*")) == ["step-000002", "step-000003"]


def test_the_plain_command_killed_in_the_middle_goes_on_where_nobody_asked_for_checkpoints(
    forge: Forge, pictures: Path, tmp_path: Path
) -> None:
    tiny_base("sd15").pipe.save_pretrained(tmp_path / "base")
    plain = ["finetune", f"--images={pictures}", f"--base={tmp_path / 'base'}", "--steps=52"]
    cheap = ["data.resolution=64", "data.batch=1", "compute.precision=no", "preview.count=0"]
    plain += [f"--set={setting}" for setting in (*cheap, 'delta.sites=["unet.mid_block.*to_v"]')]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert forge.call(f"{WORK}:command", arguments=[*plain, f"--output={whole}"]) == 0, forge.log.read_text()[-3000:]
    assert forge.call(f"{WORK}:command", arguments=[*plain, f"--output={run}"], die=51) == KILLED
    assert [p.name for p in (run / "checkpoints").glob("*")] == ["step-000050"] and not (run / "delta.safetensors").exists()
    told = forge.log.stat().st_size
    assert forge.call(f"{WORK}:command", arguments=[f"--resume={run}"]) == 0
    assert kept(run) == kept(whole)
    assert [p.name for p in (run / "checkpoints").glob("*")] == ["step-000052"], "what is left of a run that ended well"
    assert "every = 50\nkeep = 2\nleave = 1" in (run / "run.toml").read_text()
    assert json.loads((run / "manifest.json").read_text())["settings"]["checkpoint"]["every"] == 50
    assert "begins again" not in forge.log.read_text()[told:]


def test_ending_well_leaves_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, small_state(step), 9)
    (tmp_path / "step-000003" / "state.json").write_text("{")
    thin(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"] and restored(tmp_path).step == 2


def test_a_save_killed_at_any_call_leaves_the_old_checkpoint_or_the_new(forge: Forge, tmp_path: Path) -> None:
    """Also while the old one is removed, which only then may go."""
    old, new = tensors_of(small_state(1)), tensors_of(small_state(2))
    seen: list[int] = []
    for die in itertools.count(1):
        root = tmp_path / str(die)
        save(root, small_state(1), 1)
        status = forge.call(f"{WORK}:save_and_die", root=str(root), step=2, keep=1, die=die)
        said: list[str] = []
        state = restored(root, said)
        expected = new if state.step == 2 else old
        assert all(torch.equal(value, expected[name]) for name, value in tensors_of(state).items())
        assert not said, "what was cut short has no name of a checkpoint"
        save_and_die(str(root), 2, 1, 0)
        assert sorted(p.name for p in root.iterdir()) == ["step-000002"]
        seen.append(state.step)
        if status == 0:
            break
        assert status == KILLED, forge.log.read_text()[-3000:]
    assert len(seen) > 20 and seen == sorted(seen) and set(seen) == {1, 2}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_save_that_fails_at_any_call_says_so_and_leaves_the_old_checkpoint(code: int, tmp_path: Path) -> None:
    old, new, failed = tensors_of(small_state(1)), tensors_of(small_state(2)), 0

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    for number in itertools.count(1):
        root = tmp_path / str(number)
        save(root, small_state(1), 2)
        state = small_state(2)
        count = at_call(number, True, fail)
        try:
            save(root, state, 2)
        except SaveError as error:
            failed += 1
            assert ("disk is full" if code == errno.ENOSPC else os.strerror(code)) in str(error)
        finally:
            sys.setprofile(None)
        found = restored(root)
        expected = new if found.step == 2 else old
        assert all(torch.equal(value, expected[name]) for name, value in tensors_of(found).items())
        if count[0] < number:
            break
    assert failed > 15


def test_every_flipped_bit_is_found_and_the_checkpoint_before_it_taken(tmp_path: Path) -> None:
    draw = random.Random(0)
    for step in (1, 2):
        save(tmp_path, small_state(step), 2)
    newest, old = tmp_path / "step-000002", tensors_of(small_state(1))
    for path in sorted(newest.iterdir()):
        whole = path.read_bytes()
        for offset in sorted({0, len(whole) - 1, *draw.sample(range(len(whole)), 100)}):
            raw = bytearray(whole)
            raw[offset] ^= 1 << draw.randrange(8)
            path.write_bytes(raw)
            _passed_over(tmp_path, old, path.name)
        path.write_bytes(whole)
    assert restored(tmp_path).step == 2


def _passed_over(root: Path, old: dict[str, torch.Tensor], what: str) -> None:
    said: list[str] = []
    state = restored(root, said)
    assert state.step == 1 and all(torch.equal(value, old[name]) for name, value in tensors_of(state).items()), what
    assert len(said) == 1 and "step-000002 is passed over" in said[0]


def _cut(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def _longer(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def _missing(path: Path, other: Path) -> None:
    path.unlink()


def _swapped(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("spoil", [_cut, _empty, _longer, _missing, _swapped])
def test_a_file_cut_lengthened_or_of_another_checkpoint_is_refused(
    spoil: Callable[[Path, Path], None], name: str, tmp_path: Path
) -> None:
    for step in (1, 2):
        save(tmp_path, small_state(step), 2)
    spoil(tmp_path / "step-000002" / name, tmp_path / "step-000001" / name)
    _passed_over(tmp_path, tensors_of(small_state(1)), name)


def test_a_whole_checkpoint_under_another_steps_name_is_refused(tmp_path: Path) -> None:
    save(tmp_path, small_state(1), 2)
    shutil.copytree(tmp_path / "step-000001", tmp_path / "step-000002")
    _passed_over(tmp_path, tensors_of(small_state(1)), "name")


def test_the_newest_is_that_of_the_latest_step_whatever_the_clock_says(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, small_state(step), 9)
        os.utime(tmp_path / f"step-00000{step}", (1e9 - step, 1e9 - step))
    assert restored(tmp_path).step == 3


def test_removing_old_ones_never_counts_a_damaged_one_as_kept(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, small_state(step), 2)
    (tmp_path / "step-000002" / "state.json").write_text("{")
    assert restored(tmp_path).step == 1  # the run went back, and now takes shorter steps between two checkpoints
    save(tmp_path, small_state(1), 1)
    assert restored(tmp_path).step == 1


def test_another_machine_is_said(tmp_path: Path) -> None:
    save(tmp_path, small_state(1), 2)
    threads, said = torch.get_num_threads(), list[str]()
    torch.set_num_threads(threads + 1)
    try:
        assert restored(tmp_path, said).step == 1
    finally:
        torch.set_num_threads(threads)
    assert len(said) == 1 and f"threads {threads} -> {threads + 1}; the result may differ in its last digits" in said[0]


def test_when_all_are_damaged_that_is_said(tmp_path: Path) -> None:
    save(tmp_path, small_state(1), 2)
    (tmp_path / "step-000001" / "manifest.json").unlink()
    with pytest.raises(TrainError, match="no whole checkpoint: checkpoint step-000001 .* it has no manifest.json"):
        restored(tmp_path)
