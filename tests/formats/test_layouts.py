"""The layouts of other tools, made from their description: every tool's names for the same modules, numbered tensors,
DiffuseKronA's factors, bundled tokens, scales in odd places; each read as what it is documented to be.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.formats.ground import assert_same_change, difference, make_delta, make_word
from vgm_peft import formats
from vgm_peft.delta import Delta
from vgm_peft.errors import DeltaError
from vgm_peft.family import Base
from vgm_peft.spelling import unet_spellings

Make = Callable[[str], Base]
PAIR = {"down": "lora_down.weight", "up": "lora_up.weight"}


def diffusers_name(base: Base, part: str, module: str) -> str:
    return module if part == "unet" else f"text_model.{module}"


def native_name(base: Base, part: str, module: str) -> str:
    """LDM's name for a U-Net's module, CLIP's own in text encoders."""
    if part != "unet":
        return f"text_model.{module}"
    return unet_spellings(s.module for s in base.sites if s.part == "unet")[module]


CLIPS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
TE = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
TOOLS: dict[str, Callable[[Base, str, str], str]] = {
    "kohya, diffusers' blocks": lambda b, p, m: f"{TE.get(p, 'lora_unet')}_{diffusers_name(b, p, m)}".replace(".", "_"),
    "kohya, original blocks": lambda b, p, m: f"{TE.get(p, 'lora_unet')}_{native_name(b, p, m)}".replace(".", "_"),
    "ComfyUI": lambda b, p, m: (
        f"diffusion_model.{native_name(b, p, m)}"
        if p == "unet"
        else f"text_encoders.{CLIPS[p]}.transformer.{diffusers_name(b, p, m)}"
    ),
    "OMI": lambda b, p, m: f"{CLIPS.get(p, 'unet')}.{native_name(b, p, m)}",
    "OneTrainer, dotted": lambda b, p, m: f"{p}.{diffusers_name(b, p, m)}",
    "a checkpoint's": lambda b, p, m: (
        f"model.diffusion_model.{native_name(b, p, m)}" if p == "unet" else f"{p}.{diffusers_name(b, p, m)}"
    ),
    "half and half": lambda b, p, m: (
        f"{TE.get(p, 'lora_unet')}_{(diffusers_name if 'attn1' in m else native_name)(b, p, m)}".replace(".", "_")
    ),
}


def respelled(base: Base, delta: Delta, tool: str, folder: Path) -> dict[str, Tensor]:
    stored = load_file(formats.write(delta, folder / "kohya.safetensors", "kohya", base))
    places = {name: place for place, name in base.family.key_table(base.sites).kohya.items()}
    out: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        module, _, suffix = name.partition(".")
        out[f"{TOOLS[tool](base, *places[module])}.{suffix}"] = tensor
    assert len(out) == len(stored)
    return out


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("tool", TOOLS)
def test_every_tools_names_are_read(shared: Make, family: str, tool: str, tmp_path: Path) -> None:
    base = shared(family)
    delta = make_delta(base, "lora", ("unet.*.attentions.0.*.attn[12].to_out.0", "samplers", "text"), rank=2, alpha=3.0)
    save_file(respelled(base, delta, tool, tmp_path), tmp_path / "a.safetensors")
    found = formats.read(tmp_path / "a.safetensors")
    assert found.family == family
    assert_same_change(found, delta, base)


@pytest.mark.parametrize(
    ("kind", "options"), [("lokr", {"rank": 1}), ("loha", {"rank": 2}), ("dora", {"rank": 2}), ("diff", {})]
)
def test_lycoris_suffixes_behind_dotted_names(shared: Make, kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """As ai-toolkit and OneTrainer write them."""
    base = shared("sd15")
    delta = make_delta(base, kind, ("cross-attention", "samplers"), **options)
    save_file(respelled(base, delta, "OneTrainer, dotted", tmp_path), tmp_path / "a.safetensors")
    assert_same_change(formats.read(tmp_path / "a.safetensors", base), delta, base)


LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize("scaled", [False, True])
def test_onetrainers_oft(shared: Make, scaled: bool, tmp_path: Path) -> None:
    base = shared("sd15")
    weight: Tensor = base.denoiser.get_submodule(LAYER).weight  # type: ignore[assignment]
    values = 0.1 * torch.randn(weight.shape[1] // 4, 6, generator=torch.Generator().manual_seed(0))
    name = f"lora_unet_{LAYER.replace('.', '_')}.oft_R"
    mark = {f"{name}.scaled_oft": torch.tensor(True)} if scaled else {}
    save_file({f"{name}.weight": values, **mark}, tmp_path / "a.safetensors")
    q = torch.zeros(len(values), 4, 4)
    rows, columns = torch.triu_indices(4, 4, 1)
    q[:, rows, columns] = values / (2 * 3**0.5 if scaled else 1)
    q = q - q.mT
    turned = torch.eye(4) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q  # x -> x R
    expected = (weight.view(len(weight), -1, 4).transpose(0, 1) @ turned.mT).transpose(0, 1).reshape(weight.shape) - weight
    (patch,) = formats.read(tmp_path / "a.safetensors", base)
    assert difference(patch.change(weight), expected) <= 1e-5


def test_a_bias_of_peft_in_a_file_of_diffusers(shared: Make, tmp_path: Path) -> None:
    base = shared("sd15")
    name = "unet.mid_block.attentions.0.proj_in"
    pair = {"lora_A.weight": torch.ones(2, 16, 1, 1), "lora_B.weight": torch.ones(16, 2, 1, 1), "lora_B.bias": torch.ones(16)}
    settings = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 3})}
    save_file({f"{name}.{key}": tensor for key, tensor in pair.items()}, tmp_path / "a.safetensors", settings)
    delta = formats.read(tmp_path / "a.safetensors", base)
    assert torch.equal(delta.patches[f"{name}.bias"].change(torch.zeros(16)), torch.full((16,), 1.5))
    assert torch.equal(delta.patches[f"{name}.weight"].change(torch.zeros(16, 16, 1, 1)), torch.full((16, 16, 1, 1), 3.0))


def test_the_factors_of_diffusekrona_as_released(tmp_path: Path) -> None:
    """SDXL, a1 = 64, a2 = 8: names of the attention processors, shapes that no LoRA has, at full size and without a base."""
    generator = torch.Generator().manual_seed(0)
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn{}.processor.to_{}_lora"
    file: dict[str, Tensor] = {}
    shapes = {(1, "q"): (640, 640), (1, "out"): (640, 640), (2, "k"): (640, 2048)}
    for (attention, layer), (outputs, inputs) in shapes.items():
        file[f"{name.format(attention, layer)}.down.weight"] = torch.randn(8, 64, generator=generator)
        file[f"{name.format(attention, layer)}.up.weight"] = torch.randn(outputs // 64, inputs // 8, generator=generator)
    save_file(file, tmp_path / "a.safetensors")
    delta = formats.read(tmp_path / "a.safetensors")
    assert delta.family == "sdxl" and delta.kinds == ("krona",) and len(delta.patches) == 3
    for (attention, layer), shape in shapes.items():
        down, up = (file[f"{name.format(attention, layer)}.{half}.weight"] for half in ("down", "up"))
        expected = torch.einsum("bd,ca->bacd", up, down).reshape(shape)  # row b * a1 + a, column c * b2 + d
        module = f"attn{attention}.to_{layer}{'.0' if layer == 'out' else ''}"
        patch = delta.patches[f"unet.down_blocks.1.attentions.0.transformer_blocks.0.{module}.weight"]
        assert difference(patch.change(torch.zeros(shape)), expected) <= 1e-6


def numbered(base: Base, classes: dict[str, list[str]], old: bool = False) -> tuple[dict[str, Tensor], dict[str, str], Delta]:
    """A file as cloneofsimo's code makes it, by walking the network's own modules, and the delta it means."""
    file, metadata, patches = dict[str, Tensor](), dict[str, str](), dict[str, Any]()
    delta = make_delta(base, "lora", ("attention", "unet.*.ff.net.0.proj", "text"), rank=2)
    for part, kinds in classes.items():
        names: list[str] = []
        for path, module in base.parts[part].named_modules():
            if type(module).__name__ in kinds:
                names += [f"{path}.{n}" for n, child in module.named_modules() if type(child) is torch.nn.Linear]
        if old:  # diffusers up to 0.16 registered the feed-forward before the cross-attention
            blocks = [name.split(".attn")[0].split(".ff")[0] for name in names]
            pairs = sorted(zip(blocks, names, strict=True), key=lambda pair: (blocks.index(pair[0]), ".attn2." in pair[1]))
            names = [name for _, name in pairs]
        metadata[part] = json.dumps(kinds)
        for number, name in enumerate(names):
            site = f"{part}.{name.removeprefix('text_model.')}.weight"
            patches[site] = delta.patches[site]
            packed = patches[site].pack(torch.zeros(()))
            file |= {f"{part}:{number}:{half}": packed[suffix].detach().clone() for half, suffix in PAIR.items()}
            metadata[f"{part}:{number}:rank"] = "2"
    return file, metadata, Delta(base.family.name, patches)


@pytest.mark.parametrize("old", [False, True])
def test_numbered_tensors_of_cloneofsimo(shared: Make, old: bool, tmp_path: Path) -> None:
    base = shared("sd15")
    classes = {"unet": ["GEGLU", "CrossAttention", "Attention"], "text_encoder": ["CLIPAttention"]}
    file, metadata, meant = numbered(base, classes, old)
    word = make_word(base, "<s1>").rows["text_encoder"][0]
    save_file({**file, "<s1>": word}, tmp_path / "a.safetensors", {**metadata, "<s1>": "<embed>"})
    assert formats.sniff(tmp_path / "a.safetensors") == "numbered"
    delta = formats.read(tmp_path / "a.safetensors", base)
    assert_same_change(delta, meant, base)
    assert torch.equal(delta.words["<s1>"].rows["text_encoder"][0], word) and not delta.metadata
    with pytest.raises(DeltaError, match="8 layers of text_encoder, 144 layers of unet do not fit sd15 or sdxl"):
        formats.read(tmp_path / "a.safetensors")


def _no_classes(file: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del metadata["unet"]


def _strange_class(file: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["unet"] = '["Mamba"]'


def _gap(file: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del file["unet:3:up"]


def _more(file: dict[str, Tensor], metadata: dict[str, str]) -> None:
    file["strange"] = torch.zeros(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_no_classes, "its list of classes for 'unet' cannot be read"),
        (_strange_class, "layers of 'Mamba'"),
        (_gap, "'unet:3' is not there whole"),
        (_more, "neither numbered nor tokens .'strange'"),
    ],
)
def test_numbered_tensors_that_do_not_add_up(
    shared: Make, change: Callable[[dict[str, Tensor], dict[str, str]], None], message: str, tmp_path: Path
) -> None:
    file, metadata, _ = numbered(shared("sd15"), {"unet": ["Attention"]})
    change(file, metadata)
    save_file(file, tmp_path / "a.safetensors", metadata)
    with pytest.raises(DeltaError, match=message):
        formats.read(tmp_path / "a.safetensors", shared("sd15"))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_bundled_tokens(shared: Make, family: str, tmp_path: Path) -> None:
    base = shared(family)
    delta = make_delta(base, "lora", ("cross-attention",), rank=2)
    stored = load_file(formats.write(delta, tmp_path / "a.safetensors", "kohya", base))
    words = {token: make_word(base, token, 2, seed) for seed, token in enumerate(("toy", "<two>"))}
    keys = {"sd15": ["string_to_param.*"], "sdxl": ["clip_l", "clip_g"]}[family]
    bundle = {
        f"bundle_emb.{token}.{key}": rows
        for token, word in words.items()
        for key, rows in zip(keys, word.rows.values(), strict=True)
    }
    for tensors in ({**stored, **bundle}, bundle):
        save_file(tensors, tmp_path / "b.safetensors")
        found = formats.read(tmp_path / "b.safetensors", base)
        assert found.words.keys() == words.keys() and len(found.patches) == (len(delta.patches) if len(tensors) > 4 else 0)
        for token, word in words.items():
            assert all(torch.equal(rows, word.rows[part]) for part, rows in found.words[token].rows.items())
    save_file({**bundle, "bundle_emb.toy.clip_l_out": torch.zeros(2)}, tmp_path / "b.safetensors")
    with pytest.raises(DeltaError, match="1 bundled tensors are no token's rows .*clip_l_out"):
        formats.read(tmp_path / "b.safetensors", base)


class Ran:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (exec, ("raise SystemExit('a pickle was opened')",))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_token_in_a_pickle_is_refused_by_what_it_is_and_never_opened(zipped: bool, tmp_path: Path) -> None:
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(1, 768)}, "name": "me", "trap": Ran()}
    for name in ("me.pt", "me.safetensors"):
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
        with pytest.raises(DeltaError, match="a token trained with A1111.*docs/formats.md.*never opened"):
            formats.read(tmp_path / name)


def test_stable_diffusion_2_is_read_at_its_own_size_without_a_base(tmp_path: Path) -> None:
    """23 layers of text encoder where 1.x has 12, linear projections where it has convolutions."""
    text, unet = "lora_te_text_model_encoder_layers_22_mlp_fc1", "lora_unet_mid_block_attentions_0_proj_in"
    modules = {text: (4096, 1024), unet: (1280, 1280)}
    file = {f"{name}.lora_down.weight": torch.ones(1, columns) for name, (_, columns) in modules.items()}
    file |= {f"{name}.lora_up.weight": torch.ones(rows, 1) for name, (rows, _) in modules.items()}
    save_file(file, tmp_path / "a.safetensors")
    delta = formats.read(tmp_path / "a.safetensors")
    assert delta.family == "sd15" and [patch.site.shape for patch in delta] == [(1280, 1280), (4096, 1024)]
    save_file({"emb_params": torch.ones(2, 1024)}, tmp_path / "b.safetensors")
    assert formats.read(tmp_path / "b.safetensors").words["b"].rows["text_encoder"].shape == (2, 1024)
