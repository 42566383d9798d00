"""`bake` and `extract`: a baked base is the fused one bit for bit, and what was baked comes out again."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.formats.ground import assert_same_change, make_delta, make_word
from tests.test_bases import original
from vgm_peft import formats
from vgm_peft.attachment import Fusion
from vgm_peft.cli import main
from vgm_peft.delta import Delta
from vgm_peft.errors import BaseModelError, ConfigError, DeltaError, SaveError
from vgm_peft.families import load
from vgm_peft.family import Base
from vgm_peft.formats.canonical import save_file
from vgm_peft.tools.bake import bake
from vgm_peft.tools.checkpoint import Checkpoint
from vgm_peft.tools.extract import KINDS, Options, extract
from vgm_peft.tools.resize import Target

SITES = ["unet.mid_block.*to_?", "unet.mid_block.resnets.0.conv1", "text"]


def states(base: Base) -> dict[str, torch.Tensor]:
    """Every tensor of every part, and of what is none: the VAE."""
    pipe: Any = base.pipe
    networks = {**base.parts, "vae": pipe.vae}
    return {f"{part}.{name}": tensor.clone() for part, root in networks.items() for name, tensor in root.state_dict().items()}


def assert_baked(baked: Path, uses: list[tuple[Delta, float]], plain: Base) -> None:
    """The base loaded from `baked` is `plain` with the deltas fused, bit for bit."""
    found = states(load(baked, dtype=plain.denoiser.dtype, digest=False))  # type: ignore[arg-type]
    before = states(plain)
    with Fusion(plain.parts, uses):
        expected = states(plain)
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)
    assert sum(not torch.equal(found[k], before[k]) for k in before) == len({name for d, _ in uses for name in d.patches})


@pytest.mark.parametrize("family", ("sd15", "sdxl"))
def test_a_baked_folder_is_the_fused_base(family: str, shared: Callable[[str], Base], tmp_path: Path) -> None:
    plain = shared(family)
    plain.pipe.save_pretrained(tmp_path / "plain", max_shard_size="200KB")
    assert len(list((tmp_path / "plain" / "unet").glob("*.safetensors"))) > 2
    uses = [(make_delta(plain, kind, SITES, 1), 0.8) for kind in ("lora", "dora", "svdiff")]
    uses.append((make_delta(plain, "norm", ["unet.mid_block.*norm*"], 2), -0.5))
    done = bake(uses, Checkpoint(tmp_path / "plain"), tmp_path / "baked")
    assert done.changed == len({name for delta, _ in uses for name in delta.patches}) and done.left_out == ()
    assert_baked(tmp_path / "baked", uses, plain)
    old, new = ({p.relative_to(r): p for p in r.rglob("*") if p.is_file()} for r in (tmp_path / "plain", tmp_path / "baked"))
    assert old.keys() == new.keys()
    assert all(
        old[n].read_bytes() == new[n].read_bytes() for n in old if n.parts[0] not in ("unet", "text_encoder", "text_encoder_2")
    )


def test_half_precision_is_rounded_once(base: Base, tmp_path: Path) -> None:
    half = Base(base.family.tiny().to(torch.float16), base.family, "half").freeze()
    half.pipe.save_pretrained(tmp_path / "plain", variant="fp16")
    uses = [(make_delta(half, "lora", SITES, n, size=0.05), 0.7) for n in range(3)]
    bake(uses, Checkpoint(tmp_path / "plain"), tmp_path / "baked")
    assert_baked(tmp_path / "baked", uses, half)


@pytest.mark.parametrize("family", ("sd15", "sdxl"))
def test_a_baked_single_file_is_the_fused_base(family: str, shared: Callable[[str], Base], tmp_path: Path) -> None:
    """In the original names; of OpenCLIP's encoder with three projections in one tensor."""
    plain = shared(family)
    file = tmp_path / "plain.safetensors"
    save_file({k: v.contiguous() for k, v in original(family).items()}, file, {"modelspec.hash_sha256": "0x00", "kept": "yes"})
    plain.pipe.save_pretrained(tmp_path / "baked")
    for weights in (tmp_path / "baked").rglob("*.safetensors"):
        weights.unlink()
    uses = [(make_delta(plain, kind, SITES, 1), 0.8) for kind in ("lora", "dora")]
    checkpoint = Checkpoint(file)
    assert checkpoint.family.name == family
    bake(uses, checkpoint, tmp_path / "baked.safetensors")
    assert_baked(tmp_path / "baked.safetensors", uses, plain)
    header = formats.open_header(tmp_path / "baked.safetensors")
    assert header.metadata == {"kept": "yes"} and list(header.tensors) == list(formats.open_header(file).tensors)
    delta, missed = extract(Checkpoint(tmp_path / "baked.safetensors"), checkpoint, Options("diff"))
    assert set(delta.patches) == set(uses[0][0].patches) and max(missed.values()) < 1e-6


def test_old_pickles_do_not_go_along(base: Base, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = shutil.copytree(folder, tmp_path / "plain")
    (plain / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"old")
    delta = make_delta(base, "lora", SITES)
    delta.words["<a>"] = make_word(base, "<a>")
    file = formats.write(delta, tmp_path / "d.safetensors")
    assert main("delta", ["bake", f"{file}:0.5", "--base", str(plain), "-o", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "left out: unet/diffusion_pytorch_model.bin" in told and "'<a>', trained words" in told
    assert not list((tmp_path / "out").rglob("*.bin"))
    assert_baked(tmp_path / "out", [(delta, 0.5)], base)


def test_nothing_appears_when_it_cannot_be_baked(base: Base, folder: Path, tmp_path: Path) -> None:
    checkpoint, delta = Checkpoint(folder), make_delta(base, "lora", SITES)
    half = Base(base.family.tiny().to(torch.float16), base.family, "half")
    half.pipe.save_pretrained(tmp_path / "half")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    words = Delta("sd15", {}, {"<a>": make_word(base, "<a>")})
    for uses, base_, out, error, message in (
        ([(make_delta(base, "tlora", SITES, rank=4), 1.0)], checkpoint, "o", DeltaError, "timestep"),
        ([(words, 1.0)], checkpoint, "o", DeltaError, "words alone"),
        ([(delta, 1e9)], Checkpoint(tmp_path / "half"), "o", DeltaError, "does not fit float16"),
        ([(Delta("sdxl", delta.patches), 1.0)], checkpoint, "o", DeltaError, "sdxl"),
        ([(delta, 1.0)], Checkpoint("toybox"), "o", DeltaError, "the base it was trained on"),
        ([(delta, 1.0)], checkpoint, "o.safetensors", ConfigError, "a folder for a folder"),
        ([(delta, 1.0)], checkpoint, "full", SaveError, "something else"),
    ):
        with pytest.raises(error, match=message):
            bake(uses, base_, tmp_path / out)
        assert not (tmp_path / "o").exists() and not (tmp_path / "o.safetensors").exists()
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    with pytest.raises(ConfigError, match="is the base"):
        bake([(delta, 1.0)], checkpoint, folder)


@pytest.mark.parametrize("kind", ("lora", "krona", "svdiff", "diff"))
def test_what_was_baked_comes_out_again(kind: str, base: Base, folder: Path, tmp_path: Path) -> None:
    options = {"lora": {"rank": 3}, "krona": {"a1": 4, "a2": 4}}.get(kind, {})
    delta = make_delta(base, kind, SITES[:2] if kind != "diff" else ["unet.mid_block.*"], **options)
    bake([(delta, 1.0)], Checkpoint(folder), tmp_path / "baked")
    asked = {"krona": Options("lokr", factor=4), "lora": Options(target=Target(rank=3))}.get(kind) or Options(kind)
    found, missed = extract(Checkpoint(tmp_path / "baked"), Checkpoint(folder), asked)
    assert max(missed.values()) < 1e-4 and found.count() == delta.count()
    assert_same_change(found, delta, base, 1e-4)


def test_a_share_of_the_spectrum_is_kept(base: Base, folder: Path, tmp_path: Path) -> None:
    bake([(make_delta(base, "diff", ["unet.mid_block.*attn1.to_q.weight"]), 1.0)], Checkpoint(folder), tmp_path / "baked")
    ends = (Checkpoint(tmp_path / "baked"), Checkpoint(folder))
    errors = [max(extract(*ends, Options(target=Target(keep=keep)))[1].values()) for keep in (0.5, 0.9, 1.0)]
    assert errors[0] <= 0.5**0.5 and errors[1] <= 0.1**0.5 and errors[2] < 1e-4 and errors == sorted(errors, reverse=True)


def test_extract_as_a_command(base: Base, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bake([(make_delta(base, "lora", SITES, rank=2), 1.0)], Checkpoint(folder), tmp_path / "baked")
    for kind in KINDS:
        out = str(tmp_path / f"{kind}.safetensors")
        assert main("delta", ["extract", str(tmp_path / "baked"), str(folder), "--kind", kind, "-o", out]) == 0
        assert "is missed on average" in capsys.readouterr().out
        assert main("delta", ["verify", out, "--base", str(folder)]) == 0
        capsys.readouterr()
    words = [str(folder), str(folder), "-o", str(tmp_path / "none.safetensors")]
    assert main("delta", ["extract", *words]) == 2 and "the same weights" in capsys.readouterr().err
    assert main("delta", ["extract", *words, "--kind", "lra"]) == 2 and 'did you mean "lora"?' in capsys.readouterr().err


def test_a_base_is_read_by_its_sites(base: Base, folder: Path, tmp_path: Path) -> None:
    """Every site of a loaded base, in its shape and with its values; and nothing else is taken for a base."""
    checkpoint = Checkpoint(folder)
    assert set(checkpoint.sites()) == set(base.sites)
    stored = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    site = next(s for s in base.sites if s.name == "unet.conv_in.weight")
    assert torch.equal(checkpoint.tensor(site), stored["conv_in.weight"])
    save_file({"model.diffusion_model.strange.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    for source, message in ((tmp_path / "x.safetensors", "no checkpoint of a known family"), ("nowhere", "no such file")):
        with pytest.raises(BaseModelError, match=message):
            Checkpoint(source)


def test_no_verb_writes_what_a_tool_would_not_load(
    base: Base, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A text encoder's norms are nothing to ComfyUI: whichever verb makes the file refuses, as `export` does."""
    norms = make_delta(base, "norm", ["text_encoder.*norm*"])
    bake([(norms, 1.0)], Checkpoint(folder), tmp_path / "baked")
    formats.write(norms, tmp_path / "norms.safetensors")
    out = ["-o", str(tmp_path / "out.safetensors"), "--for"]
    extracted = ["extract", str(tmp_path / "baked"), str(folder), "--kind", "diff", *out]
    merged = ["merge", str(tmp_path / "norms.safetensors"), *out]
    for words in (extracted, merged):
        assert main("delta", [*words, "comfyui"]) == 2
        told = capsys.readouterr().err
        assert "comfyui cannot have this delta" in told and not (tmp_path / "out.safetensors").exists()
        assert main("delta", [*words, "kohya"]) == 0 and (tmp_path / "out.safetensors").is_file()
        (tmp_path / "out.safetensors").unlink()
        capsys.readouterr()
