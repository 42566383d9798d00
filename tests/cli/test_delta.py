"""`vgm-delta`: what it says of a file, and the files it writes for other tools."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.formats.ground import shake
from vgm_peft import formats
from vgm_peft.cli import main
from vgm_peft.delta import Delta, Word
from vgm_peft.deltas import method_named
from vgm_peft.family import Base
from vgm_peft.formats.export import thumbnail
from vgm_peft.formats.targets import TOOLS, target_named
from vgm_peft.site import choose


@pytest.fixture(scope="module")
def base(tiny: Callable[[str], Base]) -> Base:
    return tiny("sd15")


def made(base: Base, kind: str, **options: object) -> Delta:
    method = method_named(kind)
    sites = choose(base.sites, ["cross-attention", "text"], base.family.presets)
    delta = Delta.fit("sd15", method, sites, method.Options(**options))
    with torch.no_grad():
        for _, parameter in delta.parameters():
            parameter.fill_(0.5)
    return delta


@pytest.fixture
def file(base: Base, tmp_path: Path) -> Path:
    delta = made(base, "lora", rank=2, alpha=1.0)
    delta.words["<duck>"] = Word("<duck>", {"text_encoder": torch.ones(3, 32)})
    delta.metadata["modelspec.title"] = "a \x1b[31mred\n duck"
    delta.metadata["ss_tag_frequency"] = '{"pictures": {"a duck": 1}}'  # every trained delta has it
    return formats.write(delta, tmp_path / "me.safetensors")


@pytest.mark.parametrize("tool", ("native", *TOOLS))
def test_export_for_every_tool(file: Path, tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out" / "x.safetensors"
    assert main("delta", ["export", str(file), "--for", tool, "-o", str(output)]) == 0
    told = capsys.readouterr().out
    files = [Path(line.partition(": for ")[0]) for line in told.splitlines()]
    written = {path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {*files} == {path for path in written if path.suffix == ".safetensors"} and "read back and compared" in told
    assert formats.sniff(files[0]) == target_named(tool).format
    found = [formats.read(path) for path in files]
    patches = {name: patch for delta in found for name, patch in delta.patches.items()}
    for name, patch in formats.read(file).patches.items():
        zero = torch.zeros(patch.site.shape)
        assert torch.allclose(patches[name].change(zero), patch.change(zero), rtol=1e-6, atol=0)
    (word,) = [word for delta in found for word in delta.words.values()]
    assert torch.equal(word.rows["text_encoder"], torch.ones(3, 32))


def test_export_names_the_file_itself_and_rounds_when_asked(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("delta", ["export", str(file), "--for", "comfyui", "--dtype", "float16"]) == 0
    stored = load_file(file.with_name("me-comfyui.safetensors"))
    assert {t.dtype for name, t in stored.items() if not name.endswith("alpha")} == {torch.float16}
    assert main("delta", ["inspect", str(file.with_name("me-comfyui.safetensors"))]) == 0
    assert "float16" in capsys.readouterr().out


def test_export_of_kronecker_factors(base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = formats.write(made(base, "krona", a1=4, a2=2), tmp_path / "k.safetensors")
    assert main("delta", ["export", str(file), "--for", "comfyui", "-o", str(tmp_path / "o.safetensors")]) == 0
    assert any(name.endswith("lokr_w1") for name in load_file(tmp_path / "o.safetensors"))
    assert "as it is" not in capsys.readouterr().out
    assert main("delta", ["export", str(file), "--for", "diffusers", "-o", str(tmp_path / "d.safetensors")]) == 0
    assert "72 layers as a LoRA" in capsys.readouterr().out


def test_a_loss_is_told_layer_by_layer(base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method, sites = method_named("diff"), choose(base.sites, ["unet.*attn2.to_k"], {})
    delta = shake(Delta.fit("sd15", method, sites))
    file = formats.write(delta, tmp_path / "d.safetensors")
    command = ["export", str(file), "--for", "diffusers", "-o", str(tmp_path / "o.safetensors")]
    assert main("delta", command) == 2
    assert "allow a loss with --approximate" in capsys.readouterr().err and not (tmp_path / "o.safetensors").exists()
    assert main("delta", [*command, "--approximate", "2"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[1] == f"  {len(sites)} layers nearly" and "of the change is lost in all" in told[2]
    shares = [float(line.split()[2].rstrip("%")) for line in told[4:12]]
    assert shares == sorted(shares, reverse=True) and 1 < shares[-1] < 100
    assert told[12].strip() == f"and {len(sites) - 8} layers that lose less"


def test_what_is_to_be_said_in_the_file(file: Path, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "samples").mkdir()
    for name, colour in (("step-000100-0", "blue"), ("step-000200-0", "red"), ("step-000200-1", "green")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / "samples" / f"{name}.png")
    flags = ["--thumbnail", "--meta", "modelspec.author=me", "--meta", "modelspec.date=2026-01-01"]
    assert main("delta", ["export", str(file), "--for", "forge", "-o", str(tmp_path / "o.safetensors"), *flags]) == 0
    said = formats.open_header(tmp_path / "o.safetensors").metadata
    assert (said["modelspec.author"], said["modelspec.date"]) == ("me", "2026-01-01")
    assert said["modelspec.thumbnail"] == thumbnail(tmp_path / "samples" / "step-000200-0.png")


@pytest.mark.parametrize(
    "arguments,message",
    (
        (["inspect", "none.safetensors"], "no such file"),
        (["export", "FILE", "--for", "comfy"], 'did you mean "comfyui"?'),
        (["export", "FILE", "--for", "kohya", "--dtype", "fp16"], "one of float32, float16, bfloat16"),
        (["export", "FILE", "--for", "kohya", "-o", "FILE"], "choose another name"),
        (["export", "FILE", "--for", "kohya", "-o", "x.pt"], "ends in .safetensors"),
        (["export", "FILE", "--for", "kohya", "--meta", "author"], "expected KEY=VALUE"),
        (["export", "FILE", "--for", "kohya", "--thumbnail"], "no preview in"),
        (["export", "FILE", "--for", "kohya", "--approximate", "0"], "expected a rank of"),
        (["export", "FILE", "--for", "embedding"], "tokens go to files beside"),
    ),
)
def test_slips_are_one_line(arguments: list[str], message: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = file.read_bytes()
    assert main("delta", [str(file) if a == "FILE" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vgm-delta: ") and error.count("\n") == 1 and message in error
    assert file.read_bytes() == before


def test_the_installed_command(file: Path) -> None:
    broken = file.with_name("broken.safetensors")
    broken.write_bytes(file.read_bytes()[:-1])
    command = Path(sys.executable).with_name("vgm-delta")
    done = subprocess.run([command, "inspect", str(broken)], capture_output=True, text=True)
    assert done.returncode == 2 and "cut short" in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""
