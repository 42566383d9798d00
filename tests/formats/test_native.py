"""Our own format: bit for bit, self-describing, strict."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.formats.ground import make_delta, make_word
from vgm_peft import formats
from vgm_peft.delta import Delta
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.family import Base
from vgm_peft.formats.canonical import open_header, read_tensors, save_file
from vgm_peft.formats.compare import identical

Make = Callable[[str], Base]


@pytest.fixture(scope="module")
def base(shared: Make) -> Base:
    return shared("sdxl")


@pytest.fixture
def mixed(base: Base) -> Delta:
    """Two kinds, several options, three dtypes, words, an order of its own, metadata of any text."""
    lora = make_delta(base, "lora", ("cross-attention", "text"), rank=3, alpha=0.1, rslora=True, dropout=0.25)
    conv = make_delta(base, "lora", ("conv",), rank=2).to(dtype=torch.bfloat16)
    krona = make_delta(base, "krona", ("self-attention",), a1=2, a2=4).to(dtype=torch.float16)
    patches = dict(sorted({**lora.patches, **conv.patches, **krona.patches}.items(), key=lambda item: item[0][::-1]))
    word = make_word(base, "<a/b c>", vectors=2)
    return Delta("sdxl", patches, {word.token: word, "plain": make_word(base, "plain")}, {"": "", "ü": "line\n", "x": "1"})


def test_everything_comes_back_bit_for_bit(mixed: Delta, base: Base, tmp_path: Path) -> None:
    path = formats.write(mixed, tmp_path / "me.safetensors")
    for reader_base in (None, base):
        found = formats.read(path, reader_base)
        assert identical(found, mixed) and list(found.patches) == list(mixed.patches)
        assert [p.site for p in found] == [p.site for p in mixed] and [p.options for p in found] == [p.options for p in mixed]
        assert [(n, p.requires_grad) for n, p in found.parameters()] == [(n, p.requires_grad) for n, p in mixed.parameters()]
    again = formats.write(found, tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()


def test_the_stock_library_reads_the_tensors(mixed: Delta, tmp_path: Path) -> None:
    stored = load_file(formats.write(mixed, tmp_path / "me.safetensors"))
    for name, patch in mixed.patches.items():
        for key, value in patch.state_dict().items():
            assert torch.equal(stored[f"{name}/{key}"], value)


def test_values_that_are_no_numbers_survive_too(base: Base, tmp_path: Path) -> None:
    """A checkpoint of a run that went wrong must be kept as it is, to be looked into."""
    delta = make_delta(base, "lora", ("cross-attention",))
    with torch.no_grad():
        next(iter(delta)).get_parameter("up")[0, 0] = float("nan")
    assert identical(formats.read(formats.write(delta, tmp_path / "me.safetensors")), delta)


def test_reading_leaves_the_random_numbers_alone(mixed: Delta, tmp_path: Path) -> None:
    for format in ("native", "kohya"):
        path = formats.write(mixed, tmp_path / f"{format}.safetensors", format)
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        formats.read(path)
        assert torch.equal(torch.rand(3), expected)


def test_an_empty_delta_comes_back(tmp_path: Path) -> None:
    assert identical(formats.read(formats.write(Delta("sd15"), tmp_path / "me.safetensors")), Delta("sd15"))


def test_a_run_folder_is_read(mixed: Delta, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    formats.write(mixed, tmp_path / "run" / "delta.safetensors")
    assert identical(formats.read(tmp_path / "run"), mixed)
    with pytest.raises(DeltaError, match=r"no delta in this folder.*such as .*run"):
        formats.read(tmp_path)


def tampered(path: Path, tensors: Callable[[dict[str, torch.Tensor]], None], **metadata: str | None) -> Path:
    header = open_header(path)
    content = read_tensors(header)
    tensors(content)
    changed = {**header.metadata, **{f"vgm_peft.{key}": text for key, text in metadata.items()}}
    return save_file(content, path, {key: text for key, text in changed.items() if text is not None})


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[min(tensors)]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["unet.mid_block.other.weight/down"] = torch.zeros(2)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    first = min(tensors)
    tensors[first] = tensors[first].reshape(-1)


def nothing(tensors: dict[str, torch.Tensor]) -> None:
    pass


def patches(kind: str = "lora", options: object = None, sites: object = None) -> str:
    place = ["unet", "conv_in", "conv", [8, 4, 3, 3], "weight"]
    return json.dumps([{"kind": kind, "options": options or {}, "sites": sites or [place]}])


@pytest.mark.parametrize(
    "change,metadata,message",
    (
        (drop, {}, "is not there"),
        (add, {}, "belong to nothing.*mid_block.other"),
        (reshape, {}, "expected"),
        (nothing, {"version": "2"}, "version"),
        (nothing, {"patches": None}, "cannot be read"),
        (nothing, {"patches": "[" * 100_000}, "cannot be read"),
        (nothing, {"patches": "[1]"}, "cannot be read"),
        (nothing, {"patches": patches(kind="lore")}, 'did you mean "lora"'),
        (nothing, {"patches": patches(options={"rnk": 1})}, 'did you mean "rank"'),
        (nothing, {"patches": patches(options={"rank": "1"})}, "whole number"),
        (nothing, {"patches": patches(sites=[["unet", "conv_in", "conv", [2**60, 2**60], "weight"]])}, "no site"),
        (nothing, {"patches": patches(sites=[["unet", "conv_in", "conv", [8, 4, 3, 3], "__class__"]])}, "no site"),
        (nothing, {"patches": patches(sites=[["unet", "conv_in", "conv"]])}, "cannot be read"),
        (nothing, {"patches": patches(sites=[["unet", "conv_in", "linear", [2**23, 2**23], "weight"]])}, "is not there"),
        (nothing, {"order": '["unet.conv_in.weight"]'}, "order"),
        (nothing, {"words": '["<a>"]'}, "word 0"),
        (nothing, {"words": "[1]"}, "word 0"),
    ),
)
def test_a_file_that_was_tampered_with_is_refused(
    change: Callable[[dict[str, torch.Tensor]], None], metadata: dict[str, str | None], message: str, base: Base, tmp_path: Path
) -> None:
    path = formats.write(make_delta(base, "lora", ("cross-attention",)), tmp_path / "me.safetensors")
    with pytest.raises(DeltaError, match=message):
        formats.read(tampered(path, change, **metadata))


def test_another_dtype_is_refused(base: Base, tmp_path: Path) -> None:
    delta = make_delta(base, "lora", ("cross-attention",))
    with pytest.raises(ConfigError, match="dtype of training"):
        formats.write(delta, tmp_path / "me.safetensors", dtype=torch.float16)
    delta.metadata["vgm_peft.family"] = "other"
    with pytest.raises(DeltaError, match="do not begin with"):
        formats.write(delta, tmp_path / "me.safetensors")
    assert list(tmp_path.iterdir()) == []
