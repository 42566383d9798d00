"""Loading bases: folders, single files in the original names, hub ids; and what of a stranger's model is refused."""

import json
import re
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from vgm_peft.errors import BaseModelError
from vgm_peft.families import TABLE, load
from vgm_peft.families.latent import UNetFamily
from vgm_peft.family import Base
from vgm_peft.process import Process
from vgm_peft.site import find_sites
from vgm_peft.spelling import unet_spellings


@lru_cache
def saved(name: str) -> Path:
    import tempfile

    folder = Path(tempfile.mkdtemp()) / name
    TABLE[name].tiny().save_pretrained(folder)
    return folder


@pytest.fixture(params=sorted(TABLE))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A saved tiny pipeline, the test's own."""
    shutil.copytree(saved(request.param), tmp_path / request.param)
    return tmp_path / request.param


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def same_weights(a: Any, b: Any) -> bool:
    pairs = ((a.components[n], b.components[n]) for n in a.components if hasattr(a.components[n], "state_dict"))
    states = ((strip(x.state_dict()), strip(y.state_dict())) for x, y in pairs)
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in states)


def strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("text_model."): v for k, v in state.items() if "position_ids" not in k}


def test_a_folder_is_loaded_whole_and_frozen(folder: Path) -> None:
    base = load(folder)
    assert base.family is TABLE[folder.name] and base.source == str(folder) and len(base.digest) == 64
    assert same_weights(base.pipe, base.family.tiny())
    assert not any(p.requires_grad for part in base.parts.values() for p in part.parameters())
    assert not any(part.training for part in base.parts.values())
    half = load(folder, dtype=torch.bfloat16, digest=False)
    assert {p.dtype for part in half.parts.values() for p in part.parameters()} == {torch.bfloat16}
    assert half.digest == "" and base.digest == load(str(folder)).digest


def test_a_base_says_how_it_draws_best(folder: Path) -> None:
    assert load(folder).guidance() == TABLE[folder.name].guidance
    for own in (2.25, 0.0):  # 0 is none, and not nothing said
        (folder / "sampling.json").write_text(f'{{"guidance": {own}}}')
        assert load(folder).guidance() == own and load(folder).guidance(4.0) == 4.0
    for nonsense in ("101", '"much"', "true", "NaN"):
        (folder / "sampling.json").write_text(f'{{"guidance": {nonsense}}}')
        with pytest.raises(BaseModelError, match="sampling.json: guidance = "):
            load(folder)


def test_the_digest_names_the_files(folder: Path) -> None:
    digest = load(folder).digest
    (folder / "README.md").write_text("no part of the model")
    assert load(folder).digest == digest
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_tensors(weights)
    tensors["decoder.conv_out.bias"] += 1
    save_file(tensors, weights, {"format": "pt"})
    changed = load(folder).digest
    rewrite(folder / "vae" / "config.json", lambda c: c.update(scaling_factor=0.5))
    assert len({digest, changed, load(folder).digest}) == 3


def test_a_folder_of_half_precision_files_only(folder: Path) -> None:
    pipe: Any = TABLE[folder.name].tiny().to(torch.float16)
    shutil.rmtree(folder)
    pipe.save_pretrained(folder, variant="fp16")
    base = load(folder)
    assert next(base.denoiser.parameters()).dtype == torch.float32 and len(base.digest) == 64


def test_other_tasks_folders_are_loaded_as_text_to_image(folder: Path) -> None:
    kind = TABLE[folder.name].pipelines[1]
    rewrite(folder / "model_index.json", lambda c: c.update(_class_name=kind))
    assert type(load(folder).pipe).__name__ == TABLE[folder.name].pipelines[0]


def test_a_hub_id_without_network_is_one_clear_line() -> None:
    for name in ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"):
        with pytest.raises(BaseModelError, match=f"{name}: neither in the local cache nor reachable") as caught:
            load(name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere", "./no/such/folder", "a/b/c", "../x", "", "/no/such/file.safetensors"])
def test_a_name_that_is_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseModelError, match="no such file|model_index"):
        load(name)


def test_a_hub_model_in_the_cache_is_loaded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0" * 40
    repo = tmp_path / "hub" / "models--me--mine"
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    base = load("me/mine")
    assert base.family is TABLE[folder.name] and base.source == "me/mine"
    assert same_weights(base.pipe, base.family.tiny()) and base.digest == load(folder).digest


# What is refused (shared/reference/trust.md, 51, 52, 55): nothing of it is imported, and the line says why.

REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "custom pipeline": (
        lambda f: rewrite(f / "model_index.json", lambda c: c.update(custom_pipeline="evil")),
        "pipeline of its own",
    ),
    "list class": (
        lambda f: rewrite(f / "model_index.json", lambda c: c.update(_class_name=["evil", "Evil"])),
        "pipeline of its own",
    ),
    "unknown class": (
        lambda f: rewrite(f / "model_index.json", lambda c: c.update(_class_name="FluxPipeline")),
        "a FluxPipeline",
    ),
    "foreign component": (
        lambda f: rewrite(f / "model_index.json", lambda c: c.update(unet=["evil", "Evil"])),
        "unet comes from",
    ),
    "auto_map": (
        lambda f: rewrite(f / "unet" / "config.json", lambda c: c.update(auto_map={"AutoModel": "evil.Evil"})),
        "auto_map",
    ),
    "script": (lambda f: (f / "unet" / "evil.py").write_text("raise SystemExit(3)") and None, "never run"),
    "broken index": (lambda f: (f / "model_index.json").write_text("{") and None, "JSON"),
    "index is a list": (lambda f: (f / "model_index.json").write_text("[]") and None, "JSON object"),
    "no index": (lambda f: (f / "model_index.json").unlink(), "no such file"),
    "cut weights": (lambda f: cut(f / "unet" / "diffusion_pytorch_model.safetensors"), "cannot be loaded"),
    "missing in the denoiser": (
        lambda f: lose(f / "unet" / "diffusion_pytorch_model.safetensors", "conv_in.weight"),
        "1 tensors of UNet2DConditionModel are missing .first: conv_in.weight|cannot be loaded",
    ),
    "missing in a text encoder": (
        lambda f: lose(f / "text_encoder" / "model.safetensors", "layers.1.mlp.fc2.weight"),
        "1 tensors of CLIPTextModel are missing .first: encoder.layers.1.mlp.fc2.weight",
    ),
    "no weights": (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "cannot be loaded"),
    "pickled weights": (
        lambda f: (
            (f / "unet" / "diffusion_pytorch_model.safetensors").rename(f / "unet" / "diffusion_pytorch_model.bin") and None
        ),
        "never read",
    ),
}


def lose(path: Path, name: str) -> None:
    tensors = load_tensors(path)
    save_file({k: v for k, v in tensors.items() if not k.endswith(name)}, path, {"format": "pt"})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, folder: Path) -> None:
    spoil, words = REFUSED[case]
    spoil(folder)
    (folder / "evil").mkdir()
    with pytest.raises(BaseModelError, match=words) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".pth"])
def test_pickles_are_never_opened(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(BaseModelError, match=r"never read.*\.safetensors.*convert"):
        load(path)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"lora_unet_down_blocks_0.lora_down.weight": 1}, "delta, not a base"),
        ({"down_blocks.0.resnets.0.conv1.weight": 1}, "one part of a model only"),
        ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": 1}, "another family"),
        ({}, "empty file"),
    ],
)
def test_files_that_are_no_checkpoints(tensors: dict[str, int], words: str, tmp_path: Path) -> None:
    save_file({name: torch.zeros(n) for name, n in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(BaseModelError, match=words):
        load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 8, b"<html>404</html>" * 10, b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_files_that_are_not_what_they_are_called(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(BaseModelError, match="cannot be read as safetensors"):
        load(tmp_path / "x.safetensors")


# Single files: the tiny pipeline in the original names must come back as it was.

VAE_NAMES = (
    (r"(encoder|decoder)\.mid_block\.resnets\.0", r"\1.mid.block_1"),
    (r"(encoder|decoder)\.mid_block\.resnets\.1", r"\1.mid.block_2"),
    (r"(encoder|decoder)\.mid_block\.attentions\.0", r"\1.mid.attn_1"),
    (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_([qkv])", r"attn_1.\1"),
    (r"attn_1\.to_out\.0", "attn_1.proj_out"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2"),
    (r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample"),
    (r"decoder\.up_blocks\.(\d)\.resnets\.(\d)", r"decoder.up.\1.block.\2"),
    (r"decoder\.up_blocks\.(\d)\.upsamplers\.0", r"decoder.up.\1.upsample"),
)


def original_vae(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        for pattern, new in VAE_NAMES:
            name = re.sub(pattern, new, name)
        name = re.sub(r"decoder\.up\.(\d)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}", name)
        attention = ".attn_1." in name and name.endswith("weight") and ".norm." not in name
        out[f"first_stage_model.{name}"] = value[:, :, None, None] if attention else value
    return out


def open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    names = {"self_attn.out_proj": "attn.out_proj", "layer_norm": "ln_", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for name, value in strip(state).items():
        if ".q_proj." in name:
            parts = [strip(state)[name.replace("q_proj", p)] for p in ("q_proj", "k_proj", "v_proj")]
            name, value = re.sub(r"self_attn\.q_proj\.", "attn.in_proj_", name), torch.cat(parts)
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        name = name.replace("encoder.layers", "transformer.resblocks").replace("final_ln_", "ln_final")
        name = name.replace("final_layer_norm", "ln_final").replace("embeddings.token_embedding", "token_embedding")
        name = name.replace("embeddings.position_embedding.weight", "positional_embedding")
        if name == "text_projection.weight":
            name, value = "text_projection", value.T.contiguous()
        out[name] = value
    return out


def original(name: str) -> dict[str, Tensor]:
    """The tiny pipeline's tensors in the original names of its family."""
    pipe: Any = TABLE[name].tiny()
    spelled = unet_spellings(s.module for s in find_sites("unet", pipe.unet))
    out = {
        f"model.diffusion_model.{spelled.get(k.rpartition('.')[0], k.rpartition('.')[0])}.{k.rpartition('.')[2]}": v
        for k, v in pipe.unet.state_dict().items()
    }
    out |= original_vae(pipe.vae.state_dict(), len(pipe.vae.config.block_out_channels))
    first = {f"transformer.text_model.{k}": v for k, v in strip(pipe.text_encoder.state_dict()).items()}
    if name == "sd15":
        return {**out, **{f"cond_stage_model.{k}": v for k, v in first.items()}}
    out |= {f"conditioner.embedders.0.{k}": v for k, v in first.items()}
    return {**out, **{f"conditioner.embedders.1.model.{k}": v for k, v in open_clip(pipe.text_encoder_2.state_dict()).items()}}


def test_a_single_file_comes_back_as_it_was(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({k: v.contiguous() for k, v in original(folder.name).items()}, path)
    beside = tmp_path / "model"
    shutil.copytree(folder, beside, ignore=shutil.ignore_patterns("*.safetensors"))
    base = load(path)
    assert base.family is TABLE[folder.name] and len(base.digest) == 64
    assert same_weights(base.pipe, base.family.tiny())
    prompts = ["a photo of a duck", ""]
    mine = Base(base.family.tiny(), base.family, "tiny").freeze()
    assert torch.equal(base.family.encode_prompt(base, prompts).hidden, mine.family.encode_prompt(mine, prompts).hidden)
    assert {p.dtype for p in load(path, dtype=torch.bfloat16).denoiser.parameters()} == {torch.bfloat16}


# Without a folder beside it the layout is the published one; full weights are too large for a test, names are not.

CONV_IN = {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)}
SD1 = {**CONV_IN, "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (77, 768)}
SD2 = {**CONV_IN, "cond_stage_model.model.ln_final.weight": (1024,)}
XL = {**CONV_IN, "conditioner.embedders.1.model.ln_final.weight": (1280,)}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, str], dict[str, Any]]] = {
    "1.5": ("sd15", SD1, {}, {"prediction_type": "epsilon"}),
    "1.5 v": ("sd15", SD1, {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
    "2.1": ("sd15", SD2, {}, {"prediction_type": "v_prediction"}),
    "2.1 base": ("sd15", SD2, {"modelspec.prediction_type": "epsilon"}, {"prediction_type": "epsilon"}),
    "2.0 base": ("sd15", SD2, {"global_step": "875000"}, {"prediction_type": "epsilon"}),
    "xl": ("sdxl", XL, {}, {"prediction_type": "epsilon"}),
    "xl v": ("sdxl", {**XL, "v_pred": (0,)}, {}, {"prediction_type": "v_prediction"}),
    "xl v zsnr": ("sdxl", {**XL, "v_pred": (0,), "ztsnr": (0,)}, {}, {"rescale_betas_zero_snr": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_noise_is_told_from_the_file(case: str) -> None:
    name, shapes, metadata, expected = CASES[case]
    layouts = {n: f.layout(shapes, metadata) for n, f in TABLE.items() if isinstance(f, UNetFamily)}
    assert [n for n, layout in layouts.items() if layout is not None] == [name]
    layout = layouts[name]
    assert layout is not None and layout.scheduler[1].items() >= expected.items()


@pytest.mark.parametrize("case", ["1.5", "2.1", "xl"])
def test_the_published_layouts_are_written_whole(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabulary alone comes from elsewhere; a tiny one stands in for it here."""
    import diffusers
    import transformers

    from vgm_peft.families import clip

    def stand_in(name: str, pad_token: str) -> Any:
        assert name == clip.VOCABULARY
        tokenizer = clip.tiny_tokenizer()
        tokenizer.pad_token = pad_token
        return tokenizer

    monkeypatch.setattr(transformers.CLIPTokenizer, "from_pretrained", stand_in)
    monkeypatch.setattr(clip, "TOKENS", len(clip.tiny_tokenizer()))

    name, shapes, metadata, _ = CASES[case]
    assert TABLE[name].configure(shapes, metadata, tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for component, (library, kind) in ((k, v) for k, v in index.items() if k[0] != "_"):
        build = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind)
        if component.startswith("tokenizer"):
            written = json.loads((tmp_path / component / "tokenizer_config.json").read_text())
            assert written["model_max_length"] == 77
            assert written["pad_token"] == (
                clip.END if (case, component) in (("1.5", "tokenizer"), ("xl", "tokenizer")) else "!"
            )
        elif component == "scheduler":
            process = Process.of(build.from_pretrained(tmp_path / component).config)
            assert process.prediction == ("v_prediction" if case == "2.1" else "epsilon")
        else:
            assert (tmp_path / component / "config.json").is_file()


@pytest.mark.parametrize("shapes", [{**SD1, **{next(iter(CONV_IN)): (320, 9, 3, 3)}}, {**SD1, **SD2}, dict(CONV_IN)])
def test_other_checkpoints_are_of_no_family(shapes: dict[str, Any], tmp_path: Path) -> None:
    assert not any(f.configure(shapes, {}, tmp_path) for f in TABLE.values())


def test_without_network_the_missing_vocabulary_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vgm_peft.families import clip

    monkeypatch.setattr(clip, "VOCABULARY", "nobody/has-this-one")
    with pytest.raises(BaseModelError, match=r"nobody/has-this-one.*not on this machine; go online once"):
        TABLE["sd15"].configure(SD1, {}, tmp_path)


def test_the_toybox_is_found_or_asked_for() -> None:
    from vgm_peft.families import toybox_folder

    try:
        folder = toybox_folder()
    except BaseModelError as error:
        assert "toybox" in str(error) and "train-base" in str(error)
    else:
        assert load("toybox", digest=False).family is TABLE["sd15"] and (folder / "model_index.json").is_file()
