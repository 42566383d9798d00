"""kohya's names and LyCORIS' suffixes: a file written by hand from the documented layout, both block namings, the errors."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.formats.ground import assert_same_change, difference, make_delta, make_word, shake
from vgm_peft import formats
from vgm_peft.delta import Delta
from vgm_peft.deltas import method_named
from vgm_peft.errors import DeltaError
from vgm_peft.family import Base
from vgm_peft.formats.canonical import open_header

Make = Callable[[str], Base]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def documented() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file for Stable Diffusion 1.5 by the layout's description, names and shapes typed out, and its changes by hand."""
    attn = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    proj = "lora_unet_mid_block_attentions_0_proj_in"
    down = "lora_unet_down_blocks_0_downsamplers_0_conv"
    out = "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_attn1_to_out_0"
    text = "lora_te_text_model_encoder_layers_3_self_attn_q_proj"
    kron = "lora_unet_up_blocks_3_attentions_0_transformer_blocks_0_ff_net_0_proj"
    file = {
        f"{attn}.lora_down.weight": rand(4, 768),
        f"{attn}.lora_up.weight": rand(640, 4),
        f"{attn}.alpha": torch.tensor(2.0),
        f"{proj}.lora_down.weight": rand(8, 1280, 1, 1),
        f"{proj}.lora_up.weight": rand(1280, 8, 1, 1),
        f"{proj}.alpha": torch.tensor(1.0),
        f"{down}.lora_down.weight": rand(2, 320, 3, 3),
        f"{down}.lora_up.weight": rand(320, 2, 1, 1),
        f"{down}.alpha": torch.tensor(6.0),
        f"{out}.lora_down.weight": rand(4, 1280),
        f"{out}.lora_up.weight": rand(1280, 4),
        f"{text}.lora_down.weight": rand(1, 768),
        f"{text}.lora_up.weight": rand(768, 1),
        f"{text}.alpha": torch.tensor(0.25),
        f"{kron}.lokr_w1": rand(16, 4),
        f"{kron}.lokr_w2": rand(160, 80),
        f"{kron}.alpha": torch.tensor(7.0),
    }
    sizes = {attn: 2 / 4, proj: 1 / 8, out: 1.0, text: 0.25}
    flat = {n: s * file[f"{n}.lora_up.weight"].flatten(1) @ file[f"{n}.lora_down.weight"].flatten(1) for n, s in sizes.items()}
    conv = 3.0 * torch.einsum("or,rikl->oikl", file[f"{down}.lora_up.weight"].flatten(1), file[f"{down}.lora_down.weight"])
    changes = {
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": flat[attn],
        "unet.mid_block.attentions.0.proj_in.weight": flat[proj].view(1280, 1280, 1, 1),
        "unet.down_blocks.0.downsamplers.0.conv.weight": conv,
        "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_out.0.weight": flat[out],
        "text_encoder.encoder.layers.3.self_attn.q_proj.weight": flat[text],
        "unet.up_blocks.3.attentions.0.transformer_blocks.0.ff.net.0.proj.weight": torch.kron(
            file[f"{kron}.lokr_w1"], file[f"{kron}.lokr_w2"]
        ),
    }
    return file, changes


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_documented_file_is_read_as_documented(dtype: torch.dtype, tmp_path: Path) -> None:
    file, changes = documented()
    path = tmp_path / "a.safetensors"
    save_file({name: t if name.endswith("alpha") else t.to(dtype) for name, t in file.items()}, path)
    delta = formats.read(path)
    assert formats.sniff(path) == "kohya" and delta.family == "sd15" and set(delta.patches) == set(changes)
    bound = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for name, change in changes.items():
        assert difference(delta.patches[name].change(torch.zeros(change.shape)), change) <= bound, name


def test_what_was_read_is_written_again_with_the_same_names(tmp_path: Path) -> None:
    file, changes = documented()
    save_file(file, tmp_path / "a.safetensors")
    path = formats.write(formats.read(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "kohya")
    stored, metadata = load_file(path), open_header(path).metadata
    assert set(file) <= set(stored) and {k for k in set(stored) - set(file)} == {
        k for k in stored if k.endswith("alpha")
    } - set(file)
    assert all(stored[name].shape == tensor.shape for name, tensor in file.items())
    again = formats.read(path)
    for name, change in changes.items():
        assert difference(again.patches[name].change(torch.zeros(change.shape)), change) <= 1e-6, name
    assert metadata["ss_network_module"] == "lycoris.kohya" and metadata["ss_network_args"] == '{"algo": "lokr"}'
    assert metadata["ss_network_dim"] == "Dynamic" and metadata["ss_base_model_version"] == "sd_v1"


def test_sdxl_is_written_with_original_block_names(shared: Make, tmp_path: Path) -> None:
    base = shared("sdxl")
    delta = make_delta(base, "lora", ("attention", "conv", "text"), rank=2, alpha=1.0)
    path = formats.write(delta, tmp_path / "a.safetensors", "kohya", base, dtype=torch.float16)
    names = {name.split(".")[0] for name in load_file(path)}
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in names
    assert "lora_unet_output_blocks_2_2_conv" in names  # the up-sampler that A1111 loses under its diffusers name
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj" in names
    assert "lora_te2_text_model_encoder_layers_2_self_attn_out_proj" in names
    assert not [name for name in names if "down_blocks" in name or "up_blocks" in name or "mid_block" in name]
    metadata = open_header(path).metadata
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "1.0")
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.prediction_type"] == "epsilon"


def test_diffusers_block_names_of_sdxl_are_read_too(shared: Make, tmp_path: Path) -> None:
    base = shared("sdxl")
    delta = make_delta(base, "lora", ("attention", "conv", "text"), rank=2, alpha=1.0)
    stored = load_file(formats.write(delta, tmp_path / "a.safetensors", "kohya", base))
    table = base.family.key_table(base.sites)
    renamed = {table.kohya[place]: alias for alias, place in table.aliases.items() if place[0] == "unet"}
    assert any("down_blocks" in name for name in renamed.values())
    other = {f"{renamed.get(module := name.split('.')[0], module)}{name[len(module) :]}": t for name, t in stored.items()}
    assert set(other) != set(stored)
    save_file(other, tmp_path / "b.safetensors")
    for reader_base in (base, None):
        found = formats.read(tmp_path / "b.safetensors", reader_base)
        assert found.family == "sdxl"
        assert_same_change(found, delta, base)
    twice = {**stored, **{name: tensor.clone() for name, tensor in other.items()}}
    save_file(twice, tmp_path / "c.safetensors")
    with pytest.raises(DeltaError, match="two spellings"):
        formats.read(tmp_path / "c.safetensors", base)


@pytest.mark.parametrize("family,dtype", (("sd15", None), ("sdxl", None), ("sd15", torch.float16), ("sdxl", torch.bfloat16)))
@pytest.mark.parametrize("kind,options", (("lora", {"rank": 3, "alpha": 1.7, "rslora": True}), ("krona", {"a1": 4, "a2": 2})))
def test_round_trip(
    shared: Make, family: str, kind: str, options: dict[str, float], dtype: torch.dtype | None, tmp_path: Path
) -> None:
    base = shared(family)
    delta = make_delta(base, kind, ("attention+mlp", "conv", "text"), **options)
    delta.metadata["ss_output_name"] = "me"
    delta.metadata["ss_dataset_dirs"] = "/home/someone/pictures"
    path = formats.write(delta, tmp_path / "a.safetensors", "kohya", base, dtype=dtype)
    found = formats.read(path, base)
    assert found.kinds == (kind,) and found.metadata["ss_output_name"] == "me" and "/home/" not in str(found.metadata)
    bound = {None: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    assert_same_change(found, delta, base, bound)
    assert formats.write(delta, tmp_path / "b.safetensors", "kohya", base, dtype=dtype).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("changed", ("weight", "bias", "both", "nothing"))
def test_norms_are_spelled_by_both_halves(shared: Make, changed: str, tmp_path: Path) -> None:
    """What a delta does not change is zeros in the file, and no patch when read, unless there is nothing else."""
    base = shared("sd15")
    patterns = {"weight": ("*norm*.weight",), "bias": ("*norm*.bias",)}.get(changed, ("*norm*",))
    delta = make_delta(base, "norm", patterns, size=0.0 if changed == "nothing" else 0.3)
    stored = load_file(path := formats.write(delta, tmp_path / "a.safetensors", "kohya"))
    modules = {name.split(".")[0] for name in stored}
    assert {name.split(".")[1] for name in stored} == {"w_norm", "b_norm"} and len(stored) == 2 * len(modules)
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_norm1" in modules
    zero = {"weight": "b_norm", "bias": "w_norm"}.get(changed)
    assert all(bool(t.any()) == (changed != "nothing" and not n.endswith(zero or "-")) for n, t in stored.items())
    assert_same_change(formats.read(path), delta, base)


def test_the_bias_of_another_layer_is_no_norms(shared: Make, tmp_path: Path) -> None:
    base = shared("sd15")
    delta = make_delta(base, "bitfit", ("unet.conv_in", "unet.conv_norm_out"))
    stored = load_file(path := formats.write(delta, tmp_path / "a.safetensors", "kohya", base))
    assert set(stored) == {"lora_unet_conv_in.diff_b", "lora_unet_conv_norm_out.w_norm", "lora_unet_conv_norm_out.b_norm"}
    assert_same_change(formats.read(path, base), delta, base)


@pytest.mark.parametrize(("kind", "options"), (("ia3", {}), ("ia3", {"on_input": True}), ("glora", {"rank": 2}), ("boft", {})))
def test_what_is_spelled_without_the_base_is_written_without_it(
    shared: Make, kind: str, options: dict[str, bool], tmp_path: Path
) -> None:
    """dW of these depends on W, their tensors do not; by a base at hand the file is the same."""
    from vgm_peft.families import family_named
    from vgm_peft.site import choose, find_sites

    base = shared("sd15")
    method = method_named(kind)
    published = [s for part, root in family_named("sd15").published().items() for s in find_sites(part, root)]
    sites = choose(published, ["*attn2.to_k"], {})
    delta = shake(Delta.fit("sd15", method, sites, method.Options(**options)))
    path = formats.write(delta, tmp_path / "a.safetensors", "kohya")
    found = formats.read(path)
    assert set(found.patches) == set(delta.patches) and found.kinds == (kind,)
    small = make_delta(base, kind, ("cross-attention",), **options)
    with_base = formats.write(small, tmp_path / "b.safetensors", "kohya", base)
    assert_same_change(formats.read(with_base, base), small, base)
    with pytest.raises(DeltaError, match="depends on the base's own weights; name the base"):
        formats.write(make_delta(base, "hra", ("cross-attention",)), tmp_path / "c.safetensors", "kohya")


@pytest.mark.parametrize(
    ("kind", "options"),
    [("loha", {"rank": 2}), ("loha", {"rank": 2, "tucker": True}), ("lokr", {"rank": 1}), ("lokr", {"rank": 1, "factor": 2})],
)
@pytest.mark.parametrize("widths", ["of the family", "of a smaller base"])
def test_the_kernel_that_a_spelling_does_not_tell_is_the_familys(
    shared: Make, kind: str, options: dict[str, int], widths: str, tmp_path: Path
) -> None:
    """Thin LoHa and LoKr flatten a convolution's kernel; every base of a family has the same."""
    from vgm_peft.families import family_named
    from vgm_peft.site import choose, find_sites

    method = method_named(kind)
    published = [s for part, root in family_named("sd15").published().items() for s in find_sites(part, root)]
    known = shared("sd15").sites if widths == "of a smaller base" else published
    sites = choose(known, ["unet.mid_block.resnets.0.conv1", "unet.mid_block.*.proj_in", "unet.mid_block.*.attn2.to_k"], {})
    assert {s.shape[2:] for s in sites} == {(3, 3), (1, 1), ()}
    delta = shake(Delta.fit("sd15", method, sites, method.Options(**options)))
    found = formats.read(formats.write(delta, tmp_path / "a.safetensors", "kohya"))
    assert {p.site for p in found} == {p.site for p in delta}
    for name, patch in delta.patches.items():
        nothing = torch.zeros(patch.site.shape)
        assert difference(found.patches[name].change(nothing), patch.change(nothing)) <= 1e-6


def test_stable_scale_is_stored_in_alpha(shared: Make, tmp_path: Path) -> None:
    base = shared("sd15")
    delta = make_delta(base, "lora", ("cross-attention",), rank=4, alpha=3.0, rslora=True)
    stored = load_file(formats.write(delta, tmp_path / "a.safetensors", "kohya", base))
    assert all(float(t) == pytest.approx(3.0 * math.sqrt(4)) for name, t in stored.items() if name.endswith("alpha"))


def test_more_ranks_than_the_layer_has_are_read_exactly(shared: Make, tmp_path: Path) -> None:
    """LyCORIS trains `conv_out`, which has four outputs, at any rank."""
    file = {
        "lora_unet_conv_out.lora_down.weight": rand(8, 320, 3, 3),
        "lora_unet_conv_out.lora_up.weight": rand(4, 8, 1, 1),
        "lora_unet_conv_out.alpha": torch.tensor(2.0),
        "lora_unet_conv_in.lora_down.weight": rand(64, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": rand(320, 64, 1, 1),
    }
    save_file(file, tmp_path / "a.safetensors")
    delta = formats.read(tmp_path / "a.safetensors")
    for name, scale in (("conv_out", 0.25), ("conv_in", 1.0)):
        up, down = (file[f"lora_unet_{name}.lora_{side}.weight"] for side in ("up", "down"))
        change = scale * torch.einsum("or,rikl->oikl", up.flatten(1), down)
        assert difference(delta.patches[f"unet.{name}.weight"].change(torch.zeros(change.shape)), change) <= 1e-6


def test_hash_is_the_one_that_webui_computes(shared: Make, tmp_path: Path) -> None:
    import hashlib

    base = shared("sd15")
    path = formats.write(make_delta(base, "lora", ("cross-attention",)), tmp_path / "a.safetensors", "kohya", base)
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    assert open_header(path).metadata["sshs_model_hash"] == hashlib.sha256(raw[start:]).hexdigest()


def test_tokens_go_beside_the_weights(shared: Make, tmp_path: Path) -> None:
    base = shared("sd15")
    delta = make_delta(base, "lora", ("cross-attention",))
    delta.words = {token: make_word(base, token, 2) for token in ("<duck>", "<a duck>")}
    path, *others = paths = formats.write_all(delta, tmp_path / "me.safetensors", "kohya", base)
    assert paths == [tmp_path / name for name in ("me.safetensors", "me.duck.safetensors", "me.aduck.safetensors")]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert not formats.read(path, base).words
    for token, file in zip(delta.words, others, strict=True):
        word = formats.read(file, base).words[token]
        assert torch.equal(word.rows["text_encoder"], delta.words[token].rows["text_encoder"])
        assert list(load_file(file)) == ["emb_params"]


# Files that do not fit ------------------------------------------------------------------------------------------------


def written(base: Base, tmp_path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    delta = make_delta(base, "lora", ("attention", "text"), rank=2)
    stored = load_file(formats.write(delta, tmp_path / "a.safetensors", "kohya", base))
    change(stored)
    save_file(stored, tmp_path / "b.safetensors")
    return tmp_path / "b.safetensors"


def unknown_module(stored: dict[str, Tensor]) -> None:
    stored["lora_te3_encoder_block_0.lora_down.weight"] = torch.zeros(1, 2)


def unknown_suffix(stored: dict[str, Tensor]) -> None:
    first = min(stored).split(".")[0]
    stored[f"{first}.soft_scale"] = torch.ones(8, 1)


def no_up(stored: dict[str, Tensor]) -> None:
    del stored[next(name for name in stored if name.endswith("lora_up.weight"))]


def not_finite(stored: dict[str, Tensor]) -> None:
    stored[next(name for name in stored if name.endswith("lora_up.weight"))][0, 0] = float("inf")


def alpha_not_finite(stored: dict[str, Tensor]) -> None:
    stored[next(name for name in stored if name.endswith("alpha"))] = torch.tensor(float("nan"))


def transposed(stored: dict[str, Tensor]) -> None:
    name = next(name for name in stored if name.endswith("to_k.lora_down.weight"))
    stored[name] = stored[name].T.contiguous()


def outside(stored: dict[str, Tensor]) -> None:
    stored["../../etc/passwd"] = torch.zeros(1)


@pytest.mark.parametrize("with_base", (True, False))
@pytest.mark.parametrize(
    "change,message",
    (
        (unknown_module, "1 of .* match nothing.*lora_te3_encoder_block_0"),
        (unknown_suffix, "no method here reads .*soft_scale"),
        (no_up, "no method here reads"),
        (not_finite, "not finite"),
        (alpha_not_finite, "is nan; expected one number"),
        (transposed, "do not multiply|base it was trained on"),
        (outside, "are no delta's"),
    ),
)
def test_one_tensor_too_many_refuses_the_file(
    shared: Make, change: Callable[[dict[str, Tensor]], None], message: str, with_base: bool, tmp_path: Path
) -> None:
    base = shared("sd15")
    with pytest.raises(DeltaError, match=message):
        formats.read(written(base, tmp_path, change), base if with_base else None)


@pytest.mark.parametrize("format", ("native", "kohya", "diffusers"))
def test_a_delta_of_another_family_is_told_which(shared: Make, format: str, tmp_path: Path) -> None:
    base, other = shared("sd15"), shared("sdxl")
    for ours, theirs, name in ((base, other, "sd15"), (other, base, "sdxl")):
        path = formats.write(
            make_delta(ours, "lora", ("attention", "text"), rank=2), tmp_path / f"{name}.safetensors", format, ours
        )
        with pytest.raises(DeltaError, match=f"delta of {name}"):
            formats.read(path, theirs)


def test_a_base_of_other_widths_is_refused_whole(shared: Make, tmp_path: Path) -> None:
    file, _ = documented()
    save_file(file, tmp_path / "a.safetensors")
    with pytest.raises(DeltaError, match="base it was trained on"):
        formats.read(tmp_path / "a.safetensors", shared("sd15"))


def test_what_overflows_is_refused(shared: Make, tmp_path: Path) -> None:
    base = shared("sd15")
    delta = make_delta(base, "lora", ("cross-attention",), size=1e6)
    with pytest.raises(DeltaError, match="bfloat16"):
        formats.write(delta, tmp_path / "a.safetensors", "kohya", base, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_delta_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeltaError, match="empty"):
        formats.write(Delta("sd15"), tmp_path / "a.safetensors", "kohya")
