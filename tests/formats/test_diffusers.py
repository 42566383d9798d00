"""The spellings of diffusers, new and old, written out by hand; alphas wherever they may stand; what is refused and why."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.formats.ground import assert_same_change, difference, make_delta
from vgm_peft import formats
from vgm_peft.delta import Delta
from vgm_peft.errors import DeltaError
from vgm_peft.family import Base

Make = Callable[[str], Base]
UNET = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
TEXT = "encoder.layers.1.self_attn.q_proj"
DOWN, UP = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1)).unbind()
"""The same pair for every layer: (4, 5) down, and the transpose of (4, 5) as up (5, 4)."""

SPELLINGS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "peft": {
        "unet.{unet}.to_q": (".lora_A.weight", ".lora_B.weight"),
        "unet.{unet}.to_out.0": (".lora_A.weight", ".lora_B.weight"),
        "text_encoder.text_model.{text}": (".lora_A.weight", ".lora_B.weight"),
    },
    "peft, newer transformers": {
        "unet.{unet}.to_q": (".lora_A.weight", ".lora_B.weight"),
        "unet.{unet}.to_out.0": (".lora_A.default.weight", ".lora_B.default.weight"),
        "text_encoder.{text}": (".lora_A.weight", ".lora_B.weight"),
    },
    "lora.down": {
        "unet.{unet}.to_q": (".lora.down.weight", ".lora.up.weight"),
        "unet.{unet}.to_out.0": (".lora.down.weight", ".lora.up.weight"),
        "text_encoder.text_model.{text}": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    },
    "attention processors": {
        "unet.{unet}.processor.to_q": ("_lora.down.weight", "_lora.up.weight"),
        "unet.{unet}.processor.to_out": ("_lora.down.weight", "_lora.up.weight"),
        "text_encoder.text_model.{text}": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    },
    "attention processors without part": {
        "{unet}.processor.to_q": ("_lora.down.weight", "_lora.up.weight"),
        "{unet}.processor.to_out": ("_lora.down.weight", "_lora.up.weight"),
        "text_encoder.text_model.{text}": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    },
}


def spelled(how: str) -> dict[str, Tensor]:
    file: dict[str, Tensor] = {}
    for module, (down, up) in SPELLINGS[how].items():
        name = module.format(unet=UNET, text=TEXT)
        file |= {name + down: DOWN.clone(), name + up: UP.T.contiguous()}
    return file


def read(tmp_path: Path, file: dict[str, Tensor], base: Base | None = None, **metadata: object) -> Delta:
    save_file(file, tmp_path / "a.safetensors", {key: json.dumps(value) for key, value in metadata.items()})
    assert formats.sniff(tmp_path / "a.safetensors") == "diffusers"
    return formats.read(tmp_path / "a.safetensors", base)


@pytest.mark.parametrize("how", SPELLINGS)
def test_every_spelling_means_the_same(how: str, tmp_path: Path) -> None:
    delta = read(tmp_path, spelled(how))
    assert set(delta.patches) == {f"unet.{UNET}.to_q.weight", f"unet.{UNET}.to_out.0.weight", f"text_encoder.{TEXT}.weight"}
    for patch in delta:
        assert difference(patch.change(torch.zeros(5, 5)), UP.T @ DOWN) <= 1e-6


@pytest.mark.parametrize("end", (".alpha", ".lora.alpha", ".lora_linear_layer.alpha"))
def test_alphas_beside_the_tensors(end: str, tmp_path: Path) -> None:
    file = {name: t for name, t in spelled("lora.down").items() if name.startswith("unet")}
    file |= {f"unet.{UNET}.{layer}{end}": torch.tensor(3.0) for layer in ("to_q", "to_out.0")}
    for patch in read(tmp_path, file):
        assert difference(patch.change(torch.zeros(5, 5)), 0.75 * UP.T @ DOWN) <= 1e-6


@pytest.mark.parametrize(
    "settings,q,out,text",
    (
        ({"unet.lora_alpha": 2}, 0.5, 0.5, 1.0),
        ({"unet.lora_alpha": 2, "text_encoder.lora_alpha": 1, "text_encoder.r": 4}, 0.5, 0.5, 0.25),
        ({"unet.lora_alpha": 2, "unet.use_rslora": True}, 1.0, 1.0, 1.0),
        ({"unet.lora_alpha": 2, "unet.alpha_pattern": {f"{UNET}.to_q": 8}}, 2.0, 0.5, 1.0),
        ({"unet.lora_alpha": 2, "unet.alpha_pattern": {"to_out.0": 8}}, 0.5, 2.0, 1.0),
        ({}, 1.0, 1.0, 1.0),
    ),
)
def test_alphas_in_the_metadata(settings: dict[str, object], q: float, out: float, text: float, tmp_path: Path) -> None:
    save_file(spelled("peft"), tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    delta = formats.read(tmp_path / "a.safetensors")
    expected = {f"unet.{UNET}.to_q.weight": q, f"unet.{UNET}.to_out.0.weight": out, f"text_encoder.{TEXT}.weight": text}
    for name, scale in expected.items():
        assert difference(delta.patches[name].change(torch.zeros(5, 5)), scale * UP.T @ DOWN) <= 1e-6
    assert "lora_adapter_metadata" not in delta.metadata


@pytest.mark.parametrize("family,dtype", (("sd15", None), ("sdxl", torch.float16), ("sdxl", torch.bfloat16)))
def test_round_trip(shared: Make, family: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    base = shared(family)
    delta = make_delta(base, "lora", ("attention+mlp", "conv", "text+mlp"), rank=3, alpha=0.7)
    path = formats.write(delta, tmp_path / "a.safetensors", "diffusers", base, dtype=dtype)
    stored = load_file(path)
    assert not [name for name in stored if "alpha" in name]
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight" in stored
    assert {tensor.dtype for tensor in stored.values()} == {dtype or torch.float32}
    bound = {None: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for reader_base in (base, None):
        assert_same_change(formats.read(path, reader_base), delta, base, bound)
    assert formats.write(delta, tmp_path / "b.safetensors", "diffusers", base, dtype=dtype).read_bytes() == path.read_bytes()


def test_ranks_that_differ_are_filled_up_and_found_again(shared: Make, tmp_path: Path) -> None:
    base = shared("sd15")
    low = make_delta(base, "lora", ("cross-attention",), rank=1, alpha=0.5)
    high = make_delta(base, "lora", ("self-attention",), rank=8)
    text = make_delta(base, "lora", ("text",), rank=2)
    delta = Delta("sd15", {**low.patches, **high.patches, **text.patches})
    stored = load_file(path := formats.write(delta, tmp_path / "a.safetensors", "diffusers", base))
    ranks = {part: {len(t) for n, t in stored.items() if n.startswith(part) and "lora_A" in n} for part in ("unet", "text")}
    assert ranks == {"unet": {8}, "text": {2}}
    found = formats.read(path, base)
    assert {name: patch.options.rank for name, patch in found.patches.items()} == {
        n: p.options.rank for n, p in delta.patches.items()
    }
    assert_same_change(found, delta, base)


@pytest.mark.parametrize("ending", ("", ".weight", ".default.weight"))
def test_magnitudes_are_read(ending: str, tmp_path: Path) -> None:
    """W' = m (W + up @ down) / |W + up @ down| for every output; the others stay LoRAs."""
    file = spelled("peft")
    file[f"unet.{UNET}.to_q.lora_magnitude_vector{ending}"] = m = torch.rand(5, generator=torch.Generator().manual_seed(3))
    patches = read(tmp_path, file).patches
    assert [patch.kind for patch in patches.values()].count("dora") == 1
    base = torch.randn(5, 5, generator=torch.Generator().manual_seed(4))
    changed = base + UP.T @ DOWN
    expected = m[:, None] * changed / changed.norm(dim=1, keepdim=True)
    assert difference(base + patches[f"unet.{UNET}.to_q.weight"].change(base), expected) <= 1e-6


def test_magnitudes_on_some_layers_or_by_input_are_refused(shared: Make, tmp_path: Path) -> None:
    base = shared("sd15")
    some = make_delta(base, "dora", ("cross-attention",), rank=2)
    mixed = Delta("sd15", {**some.patches, **make_delta(base, "lora", ("self-attention",), rank=2).patches})
    with pytest.raises(DeltaError, match="unet: some layers are DoRAs and some are not"):
        formats.write(mixed, tmp_path / "a.safetensors", "diffusers", base)
    with pytest.raises(DeltaError, match="no place for dora"):
        delta = make_delta(base, "dora", ("cross-attention",), rank=2, axis="input")
        formats.write(delta, tmp_path / "a.safetensors", "diffusers", base)
    with pytest.raises(DeltaError, match="name the base"):
        formats.write(some, tmp_path / "a.safetensors", "diffusers")


def test_kinds_without_a_place_are_refused_with_what_would_work(shared: Make, tmp_path: Path) -> None:
    base = shared("sd15")
    delta = make_delta(base, "krona", ("cross-attention",))
    with pytest.raises(DeltaError, match="no place for krona.*write it as kohya"):
        formats.write(delta, tmp_path / "a.safetensors", "diffusers", base)
    assert list(tmp_path.iterdir()) == []


def _bias(file: dict[str, Tensor]) -> None:
    file[f"unet.{UNET}.to_q.lora_B.bias"] = torch.zeros(5)


def _magnitude(file: dict[str, Tensor]) -> None:
    file[f"unet.{UNET}.to_q.lora_magnitude_vector.weight"] = torch.zeros(6)


def _unknown(file: dict[str, Tensor]) -> None:
    file["unet.down_blocks.7.resnets.0.conv1.lora_A.weight"] = torch.zeros(1, 2)


def _strange(file: dict[str, Tensor]) -> None:
    file["unet.conv_in.lora_C.weight"] = torch.zeros(1, 2)


def _twice(file: dict[str, Tensor]) -> None:
    file[f"unet.{UNET}.to_q.lora.down.weight"] = DOWN.clone()


def _two_spellings(file: dict[str, Tensor]) -> None:
    file[f"{UNET}.to_q.lora.down.weight"] = DOWN.clone()


def _half(file: dict[str, Tensor]) -> None:
    del file[f"unet.{UNET}.to_q.lora_A.weight"]


@pytest.mark.parametrize(
    "change,message",
    (
        (_bias, "to_q has no bias to change"),
        (_magnitude, "to_q .*dora_scale 6"),
        (_unknown, "match nothing.*down_blocks.7"),
        (_strange, "1 of 7 tensors are no delta's .'unet.conv_in.lora_C"),
        (_twice, "two tensors"),
        (_two_spellings, "two spellings"),
        (_half, "no method here reads"),
    ),
)
def test_what_is_refused(change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path) -> None:
    file = spelled("peft")
    change(file)
    with pytest.raises(DeltaError, match=message):
        read(tmp_path, file)


@pytest.mark.parametrize(
    "metadata,message",
    (
        ("{", "cannot be read"),
        ("[1]", "cannot be read"),
        ('{"unet.init_lora_weights": "pissa_niter_4"}', "changes the base's own weights"),
        ('{"unet.lora_alpha": "8"}', "a number"),
        ('{"unet.r": 2, "lora_alpha": 8}', "1 keys of its lora_adapter_metadata belong to no part of sd15 .'lora_alpha'"),
        ('{"unet.r": 2, "transformer.lora_alpha": 8}', "belong to no part of sd15 .'transformer.lora_alpha'"),
    ),
)
def test_metadata_that_is_refused(metadata: str, message: str, tmp_path: Path) -> None:
    save_file(spelled("peft"), tmp_path / "a.safetensors", {"lora_adapter_metadata": metadata})
    with pytest.raises(DeltaError, match=message):
        formats.read(tmp_path / "a.safetensors")


def test_a_file_that_diffusers_saves_means_what_diffusers_computes(tiny: Make, tmp_path: Path) -> None:
    """Adapters with ranks and alphas of their own per layer, whose settings go into the file's metadata."""
    from peft import LoraConfig, get_peft_model_state_dict

    build: Any = LoraConfig
    base = tiny("sd15")
    pipe: Any = base.pipe
    generator = torch.Generator().manual_seed(0)
    layers: dict[str, Any] = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    before = {part: {name: t.clone() for name, t in network.state_dict().items()} for part, network in layers.items()}
    names = {"unet": ["attn2.to_k", "conv2", "proj_in"], "text_encoder": ["q_proj"]}
    for part, network in layers.items():
        patterns = {"rank_pattern": {"attn2.to_k": 2}, "alpha_pattern": {"conv2": 1.0}} if part == "unet" else {}
        config = build(r=4, lora_alpha=6, target_modules=names[part], **patterns)
        network.add_adapter(config)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    told = {part: network.peft_config["default"].to_dict() for part, network in layers.items()}
    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        unet_lora_adapter_metadata=told["unet"],
        text_encoder_lora_adapter_metadata=told["text_encoder"],
    )
    delta = formats.read(tmp_path)
    assert formats.sniff(tmp_path) == "diffusers"
    checked = 0
    for part, network in layers.items():
        for path, module in network.named_modules():
            if not hasattr(module, "get_delta_weight"):
                continue
            name = f"{part}.{path.removeprefix('text_model.')}.weight"
            base_weight = before[part][f"{path}.weight"]
            assert difference(delta.patches[name].change(base_weight), module.get_delta_weight("default")) <= 1e-6, name
            checked += 1
    assert checked == len(delta.patches) > 20
