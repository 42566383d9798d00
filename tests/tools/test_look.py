"""`inspect` and `verify`: what a file says without being read, how large its changes are, and whether it is sound."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.formats.ground import make_delta, make_word, shake
from vgm_peft import formats
from vgm_peft.cli import main
from vgm_peft.delta import Delta
from vgm_peft.deltas import TABLE
from vgm_peft.errors import DeltaError
from vgm_peft.family import Base
from vgm_peft.formats.canonical import read_tensors, save_file
from vgm_peft.header import open_header
from vgm_peft.site import locate
from vgm_peft.tools.checkpoint import Checkpoint
from vgm_peft.tools.glance import glance
from vgm_peft.tools.measure import norm, norms, used_rank
from vgm_peft.tools.verify import verify


@pytest.fixture
def file(base: Base, tmp_path: Path) -> Path:
    delta = make_delta(base, "lora", ["cross-attention", "text"], rank=2, alpha=1.0)
    delta.words["<duck>"] = make_word(base, "<duck>", 3)
    delta.metadata["modelspec.title"] = "a \x1b[31mred\n duck"
    return formats.write(delta, tmp_path / "me.safetensors")


def test_the_header_of_our_file_says_it_all(file: Path, base: Base) -> None:
    seen, delta = glance(file), formats.read(file)
    assert (seen.tool, seen.base, seen.size, seen.others) == ("vgm_peft", "sd15", file.stat().st_size, 0)
    assert seen.kinds == {"lora": len(delta.patches)} and seen.ranks == {2: len(delta.patches)}
    assert sum(seen.parts.values()) == len(delta.patches) and seen.words == {"<duck>": {"text_encoder": [3, 32]}}
    assert seen.dtypes == {"f32": delta.count()}


@pytest.mark.parametrize(
    "kind,word",
    (("lora", "LoRA"), ("krona", "LoKr"), ("loha", "LoHa"), ("dora", "DoRA"), ("bitfit", "full difference")),
)
def test_the_header_of_a_foreign_file_tells_kind_and_rank(kind: str, word: str, base: Base, tmp_path: Path) -> None:
    options = {"rank": 2} if kind in ("lora", "loha", "dora") else {"a1": 4, "a2": 2} if kind == "krona" else {}
    sites = ["unet.*.attn2.to_out.0.bias", "text_encoder.*.q_proj.bias"] if kind == "bitfit" else ["cross-attention", "text"]
    delta = make_delta(base, kind, sites, **options)
    seen = glance(formats.write(delta, tmp_path / "k.safetensors", "kohya", base))
    assert seen.kinds == {word: len(delta.patches)} and set(seen.parts) == {"lora_unet", "lora_te"} and not seen.others
    assert seen.ranks == ({2: len(delta.patches)} if "rank" in options else {})
    assert seen.base.startswith("stable-diffusion-v1")


def test_a_diffusers_file_too(base: Base, tmp_path: Path) -> None:
    delta = make_delta(base, "lora", ["cross-attention"], rank=2)
    seen = glance(formats.write(delta, tmp_path / "d.safetensors", "diffusers", base))
    assert (
        seen.tool == "diffusers or peft"
        and seen.ranks == {2: len(delta.patches)}
        and seen.parts == {"unet": len(delta.patches)}
    )


@pytest.mark.parametrize("kind", [kind for kind, method in TABLE.items() if not method.timed])
def test_norms_are_those_of_the_dense_change(kind: str, base: Base, folder: Path) -> None:
    """By factors or not, in float64; of a convolution, or of a layer of any sort that the method changes."""
    method, checkpoint = TABLE[kind], Checkpoint(folder)
    able = [s for s in base.sites if s.part == "unet" and s.op in method.ops]
    site = next((s for s in able if s.op == "conv" and s.shape[2:] == (3, 3) and s.shape[1] % 4 == 0), able[0])
    for options in method.examples:
        delta = shake(Delta.fit("sd15", method, [site], options).train(False).to(dtype=torch.float64))
        (patch,) = delta
        weight = getattr(locate(base.parts, site), site.tensor).detach()
        assert norm(patch, checkpoint) == pytest.approx(float(patch.change(weight).detach().norm()), rel=1e-10)


def test_a_change_that_needs_its_base_says_so(base: Base) -> None:
    with pytest.raises(DeltaError, match="--base"):
        norms(make_delta(base, "svdiff", ["cross-attention"]))


def test_inspect_prints_and_draws(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("delta", ["inspect", str(file)]) == 0
    told = capsys.readouterr().out
    for part in (
        "me.safetensors: lora of vgm_peft, for sd15",
        "rank=2, alpha=1.0",
        "text_encoder 8",
        "<duck>: text_encoder 3x32",
    ):
        assert part in told
    assert "a \\x1b[31mred\\n duck" in told and "\x1b" not in told and "|dW|" not in told
    assert main("delta", ["inspect", str(file), "--json", "-o", str(tmp_path / "x.png")]) == 0
    told = json.loads(capsys.readouterr().out)
    delta = formats.read(file)
    assert told["family"] == "sd15" and told["layers"] == {n: [2, pytest.approx(v)] for n, v in norms(delta).items()}
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 20) or ()) > 20
    assert main("delta", ["inspect", str(file), "-o", str(tmp_path / "x.jpg")]) == 2
    assert "ends in .png" in capsys.readouterr().err


def test_inspect_of_a_header_imports_no_torch(file: Path) -> None:
    code = f"import sys; from vgm_peft.cli import main; main('delta', ['inspect', {str(file)!r}]); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("me.safetensors") and not {"torch", "numpy"} & set(run.stdout.splitlines()[-1].split())


def test_a_sound_file_is_sound(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("delta", ["verify", str(file), "--base", "toybox"]) == 1  # the tiny base is of other widths
    assert main("delta", ["verify", str(file)]) == 0
    told = capsys.readouterr().out
    assert "me.safetensors: sound" in told and "ranks: 2 stored, 2 .. 2 in use" in told and "do not fit the base" in told


def test_every_fault_is_found(file: Path, base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = open_header(formats.write(make_delta(base, "lora", rank=2), tmp_path / "k.safetensors", "kohya", base))
    tensors = read_tensors(header)

    def spoiled(name: str, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> str:
        kept = {key: new for key, value in tensors.items() if (new := change(key, value)) is not None}
        save_file(kept, tmp_path / name, header.metadata)
        (fault,) = verify(tmp_path / name).faults
        return fault

    last = next(name for name in tensors if name.endswith("lora_up.weight"))
    assert "sshs_model_hash" in spoiled("a.safetensors", lambda key, t: t * 1.5 if key == last else t)
    assert "not finite" in spoiled("b.safetensors", lambda key, t: t * float("nan") if key == last else t)
    assert "no method here reads" in spoiled("c.safetensors", lambda key, t: None if key == last else t)
    assert verify(tmp_path / "k.safetensors").sound
    zero = Delta("sd15", dict(make_delta(base, "lora", rank=2).patches))
    with torch.no_grad():
        for _, parameter in zero.parameters():
            parameter.zero_()
    ill = make_delta(base, "lora", rank=2)
    with torch.no_grad():
        next(iter(ill)).up[0, 0] = float("inf")
    (fault,) = verify(formats.write(ill, tmp_path / "i.safetensors")).faults
    assert "1 tensors hold values that are not finite" in fault
    assert "every change is zero" in verify(formats.write(zero, tmp_path / "z.safetensors")).faults[0]
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-1])
    assert main("delta", ["verify", str(tmp_path / "cut.safetensors"), str(file)]) == 1
    told = capsys.readouterr().out
    assert "cut.safetensors: NOT SOUND" in told and "cut short" in told and "me.safetensors: sound" in told


def test_the_rank_in_use_is_counted(base: Base) -> None:
    delta = make_delta(base, "lora", rank=3)
    patch = next(iter(delta))
    with torch.no_grad():
        patch.up[:, 2] = patch.up[:, 0]
    assert used_rank(patch) == 2
