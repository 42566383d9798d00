"""`vgm-delta`: what it says of a file, and the files it writes for other tools."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vgm_peft import formats
from vgm_peft.cli import main
from vgm_peft.delta import Delta, Word
from vgm_peft.deltas import method_named
from vgm_peft.family import Base
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
    return formats.write(delta, tmp_path / "me.safetensors")


def test_inspect_tells_what_is_in_it(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("delta", ["inspect", str(file)]) == 0
    told = capsys.readouterr().out
    for part in ("me.safetensors: lora of sd15, native format", "rank=2, alpha=1.0", "text_encoder 8 layers", "float32"):
        assert part in told
    assert "<duck>: text_encoder 3 x 32" in told and "a \\x1b[31mred\\n duck" in told and "\x1b" not in told


def test_inspect_as_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("delta", ["inspect", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    delta = formats.read(file)
    assert (told["format"], told["family"], told["size"]) == ("native", "sd15", file.stat().st_size)
    assert told["values"] == delta.count() == sum(told["dtypes"].values())
    assert told["ranks"] == {"2": len(delta.patches)} and sum(told["parts"].values()) == len(delta.patches)
    (group,) = told["groups"]
    assert group["kind"] == "lora" and group["options"]["alpha"] == 1.0 and group["layers"] == len(delta.patches)
    norms = [float(p.change(torch.zeros(p.site.shape)).detach().norm()) for p in delta]
    assert told["norms"]["largest"] == pytest.approx(max(norms)) and told["norms"]["smallest"] == pytest.approx(min(norms))
    assert told["norms"]["at"] in delta.patches
    assert told["words"] == {"<duck>": {"text_encoder": [3, 32]}}


@pytest.mark.parametrize("tool", ("comfyui", "a1111", "forge", "invokeai", "kohya", "diffusers", "native"))
def test_export_for_every_tool(file: Path, tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out" / "x.safetensors"
    assert main("delta", ["export", str(file), "--for", tool, "-o", str(output)]) == 0
    told = capsys.readouterr().out
    expected = tool if tool in formats.FORMATS else "kohya"
    assert formats.sniff(output) == expected and f"{output}: {expected}" in told
    found, meant = formats.read(output), formats.read(file)
    for name, patch in meant.patches.items():
        zero = torch.zeros(patch.site.shape)
        assert torch.allclose(found.patches[name].change(zero), patch.change(zero), rtol=1e-6, atol=0)
    if tool != "native":
        word = tmp_path / "out" / "x.duck.safetensors"
        assert str(word) in told and torch.equal(formats.read(word).words["<duck>"].rows["text_encoder"], torch.ones(3, 32))


def test_export_names_the_file_itself_and_rounds_when_asked(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("delta", ["export", str(file), "--for", "comfyui", "--dtype", "float16"]) == 0
    stored = load_file(file.with_name("me-comfyui.safetensors"))
    assert {t.dtype for name, t in stored.items() if not name.endswith("alpha")} == {torch.float16}
    assert main("delta", ["inspect", str(file.with_name("me-comfyui.safetensors"))]) == 0
    assert "trained values, float32, float16" in capsys.readouterr().out


def test_export_of_kronecker_factors(base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = formats.write(made(base, "krona", a1=4, a2=2), tmp_path / "k.safetensors")
    assert main("delta", ["export", str(file), "--for", "comfyui", "-o", str(tmp_path / "o.safetensors")]) == 0
    assert any(name.endswith("lokr_w1") for name in load_file(tmp_path / "o.safetensors"))
    capsys.readouterr()
    assert main("delta", ["export", str(file), "--for", "diffusers", "-o", str(tmp_path / "d.safetensors")]) == 2
    assert "write it as kohya" in capsys.readouterr().err and not (tmp_path / "d.safetensors").exists()


@pytest.mark.parametrize(
    "arguments,message",
    (
        (["inspect", "none.safetensors"], "no such file"),
        (["export", "FILE", "--for", "comfy"], 'did you mean "comfyui"?'),
        (["export", "FILE", "--for", "kohya", "--dtype", "fp16"], "one of float32, float16, bfloat16"),
        (["export", "FILE", "--for", "kohya", "-o", "FILE"], "choose another name"),
        (["export", "FILE", "--for", "kohya", "-o", "x.pt"], "ends in .safetensors"),
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
