"""Trained tokens as files: every layout that is read, what is written, and to which family the rows belong."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.formats.ground import make_delta, make_word
from vgm_peft import formats
from vgm_peft.delta import Delta
from vgm_peft.errors import DeltaError
from vgm_peft.family import Base

Make = Callable[[str], Base]


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    "tensors,metadata,token,family",
    (
        ({"<duck>": rows(2, 768)}, None, "<duck>", "sd15"),
        ({"emb_params": rows(3, 768)}, None, "me", "sd15"),
        ({"emb_params": rows(3, 768)}, {"modelspec.trigger_phrase": "<duck>"}, "<duck>", "sd15"),
        ({"<duck>": rows(768)}, None, "<duck>", "sd15"),
        ({"emb_params": rows(1, 1024)}, None, "me", "sd15"),
        ({"clip_l": rows(2, 768), "clip_g": rows(2, 1280)}, None, "me", "sdxl"),
    ),
)
def test_layouts_that_are_read(
    tensors: dict[str, Tensor], metadata: dict[str, str] | None, token: str, family: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "me.safetensors", metadata)
    assert formats.sniff(tmp_path / "me.safetensors") == "embedding"
    delta = formats.read(tmp_path / "me.safetensors")
    assert delta.family == family and list(delta.words) == [token] and not delta.patches
    parts = delta.words[token].rows
    assert list(parts) == ["text_encoder", "text_encoder_2"][: len(tensors)]
    for found, expected in zip(parts.values(), tensors.values(), strict=True):
        assert torch.equal(found, expected.reshape(-1, expected.shape[-1]))


@pytest.mark.parametrize(
    "family,format,keys",
    (
        ("sd15", "embedding", ["<duck>"]),
        ("sd15", "diffusers", ["<duck>"]),
        ("sd15", "kohya", ["emb_params"]),
        ("sdxl", "embedding", ["clip_g", "clip_l"]),
        ("sdxl", "kohya", ["clip_g", "clip_l"]),
    ),
)
@pytest.mark.parametrize("dtype", (None, torch.float16))
def test_what_is_written(
    shared: Make, family: str, format: str, keys: list[str], dtype: torch.dtype | None, tmp_path: Path
) -> None:
    base = shared(family)
    word = make_word(base, "<duck>", 2)
    delta = Delta(family, words={"<duck>": word})
    (path,) = formats.write_all(delta, tmp_path / "me.safetensors", format, base, dtype=dtype)
    assert list(tmp_path.iterdir()) == [path]
    assert sorted(load_file(path)) == keys
    found = formats.read(path, base)
    assert found.family == family and found.metadata["modelspec.architecture"].endswith("/textual-inversion")
    for part, trained in word.rows.items():
        assert torch.equal(found.words["<duck>"].rows[part], trained.to(dtype or torch.float32))


def test_several_tokens_are_several_files(shared: Make, tmp_path: Path) -> None:
    base = shared("sd15")
    delta = Delta("sd15", words={token: make_word(base, token) for token in ("<a>", "a", "<>")})
    paths = formats.write_all(delta, tmp_path / "me.safetensors", "embedding", base)
    assert [p.name for p in paths] == ["me.a.safetensors", "me.a-1.safetensors", "me.2.safetensors"]
    assert [next(iter(formats.read(path, base).words)) for path in paths] == ["<a>", "a", "<>"]


def test_a_token_of_another_family_is_told_which(shared: Make, tmp_path: Path) -> None:
    save_file({"clip_l": rows(2, 768), "clip_g": rows(2, 1280)}, tmp_path / "xl.safetensors")
    with pytest.raises(DeltaError, match="looks like a token of sdxl"):
        formats.read(tmp_path / "xl.safetensors", shared("sd15"))
    save_file({"emb_params": rows(2, 768)}, tmp_path / "one.safetensors")
    for name in ("sd15", "sdxl"):  # neither has the published widths
        with pytest.raises(DeltaError, match="looks like a token of sd15"):
            formats.read(tmp_path / "one.safetensors", shared(name))


def test_what_is_refused(shared: Make, tmp_path: Path) -> None:
    base = shared("sdxl")
    word = make_word(base, "<duck>")
    del word.rows["text_encoder_2"]
    with pytest.raises(DeltaError, match="all text encoders"):
        formats.write(Delta("sdxl", words={"<duck>": word}), tmp_path / "a.safetensors", "embedding", base)
    both = make_delta(base, "lora", ("cross-attention",))
    both.words["<duck>"] = make_word(base, "<duck>")
    with pytest.raises(DeltaError, match="tokens go to files beside"):
        formats.write(both, tmp_path / "a.safetensors", "embedding", base)
    save_file({"clip_l": rows(2, 768), "clip_g": rows(3, 1280)}, tmp_path / "b.safetensors")
    with pytest.raises(DeltaError, match="differ in number"):
        formats.read(tmp_path / "b.safetensors")
    save_file({"emb_params": torch.full((1, 768), float("nan"))}, tmp_path / "c.safetensors")
    with pytest.raises(DeltaError, match="not finite"):
        formats.read(tmp_path / "c.safetensors")
