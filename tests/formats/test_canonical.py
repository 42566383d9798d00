"""The writer: same content, same bytes, whole or not at all. The reader of headers: strict, bounded, one class of error."""

import errno
import os
import resource
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save_file as stock_save
from torch import Tensor

from tests.formats.hostile_headers import F, raw
from vgm_peft.errors import DeltaError, SaveError
from vgm_peft.formats.canonical import DTYPES, data_digest, open_header, read_tensors, save_file

METADATA = {"b": "2", "a": "ü\n", "c": ""}


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    many = {f"t.{name}": torch.rand(3, 5, generator=generator).mul(100).to(dtype) for name, dtype in DTYPES.items()}
    return {
        **many,
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "view": torch.rand(4, 6, generator=generator).T[1:],
    }


def test_stock_library_reads_it_back_exactly(tmp_path: Path) -> None:
    tensors = some_tensors()
    path = save_file(tensors, tmp_path / "a.safetensors", METADATA)
    with safe_open(path, "pt") as stock:
        assert stock.metadata() == METADATA
    ours, theirs = read_tensors(open_header(path)), load_file(path)
    assert set(ours) == set(theirs) == set(tensors)
    for name, tensor in tensors.items():
        for found in (ours[name], theirs[name]):
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8))


def test_every_tensor_is_aligned_to_its_dtype(tmp_path: Path) -> None:
    tensors = some_tensors()
    for name, entry in open_header(save_file(tensors, tmp_path / "a.safetensors", METADATA)).tensors.items():
        assert entry.start % tensors[name].element_size() == 0


def test_same_content_gives_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    program = (
        "import sys, torch; from vgm_peft.formats.canonical import save_file\n"
        "names = set('abcdefghij')\n"
        "save_file({n: torch.full((2,), ord(n)) for n in names}, sys.argv[1], {n: n for n in names})"
    )
    theirs = tmp_path / "theirs.safetensors"
    subprocess.run([sys.executable, "-c", program, str(theirs)], check=True, env={**os.environ, "PYTHONHASHSEED": "1"})
    names = "jabcdefghi"
    tensors, metadata = {n: torch.full((2,), ord(n)) for n in names}, {n: n for n in names}
    assert theirs.read_bytes() == save_file(tensors, tmp_path / "ours.safetensors", metadata).read_bytes()


def test_digest_is_that_of_the_data_region(tmp_path: Path) -> None:
    import hashlib

    tensors = some_tensors()
    raw = save_file(tensors, tmp_path / "a.safetensors", METADATA).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert data_digest(tensors) == hashlib.sha256(raw[8 + length :]).hexdigest()


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    before = path.read_bytes()

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match="disk is full"):
        save_file({"a": torch.zeros(3)}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_write_that_really_fails_leaves_what_was_there(tmp_path: Path) -> None:
    """The kernel refuses to let the file grow, half way through."""
    path = save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    before = path.read_bytes()
    program = (
        "import sys, resource, signal, torch; from vgm_peft.formats.canonical import save_file\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, {resource.RLIM_INFINITY}))\n"
        "from vgm_peft.errors import SaveError\n"
        "try: save_file({'a': torch.zeros(100_000)}, sys.argv[1])\n"
        "except SaveError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert "cannot be written" in done.stdout and "File too large" in done.stdout
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_check_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    before = path.read_bytes()

    def check(aside: Path) -> None:
        assert torch.equal(load_file(aside)["a"], torch.zeros(3))
        raise DeltaError("not what was meant")

    with pytest.raises(DeltaError, match="not what was meant"):
        save_file({"a": torch.zeros(3)}, path, check=check)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", ("file/below", "x" * 300))
def test_an_impossible_place_is_one_clear_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="cannot be written"):
        save_file({"a": torch.ones(3)}, tmp_path / place / "a.safetensors")


# What strangers send -------------------------------------------------------------------------------------------------


def test_a_cut_download_says_so(tmp_path: Path) -> None:
    whole = save_file({"a": torch.ones(100)}, tmp_path / "a.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole[:-1])
    with pytest.raises(DeltaError, match="cut short"):
        open_header(path)


def test_names_from_a_file_are_shown_without_their_tricks(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw({"a\n\x1b[31m\u202e": {**F, "data_offsets": [4, 8]}}, b"\0" * 8))
    with pytest.raises(DeltaError) as caught:
        open_header(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", ("missing", "folder", "pipe", "closed", "NUL"))
def test_what_is_no_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("a\0b" if kind == "NUL" else "x.safetensors")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "closed":
        if os.geteuid() == 0:
            pytest.skip("root may read everything")
        path.write_bytes(b"x")
        path.chmod(0)
    caught: list[BaseException] = []

    def attempt() -> None:
        try:
            open_header(path)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive() and isinstance(caught[0], DeltaError)


def test_what_the_stock_library_writes_is_accepted(tmp_path: Path) -> None:
    tensors = {name: t.contiguous() for name, t in some_tensors().items()}
    stock_save(tensors, tmp_path / "a.safetensors", {"x": "y"})
    header = open_header(tmp_path / "a.safetensors")
    assert set(header.tensors) == set(tensors) and header.metadata == {"x": "y"}
