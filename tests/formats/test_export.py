"""What is said and done where a target cannot have a delta as it is; losses, remarks, metadata; nothing left behind."""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file

from tests.formats.ground import assert_same_change, difference, make_word, shake
from tests.formats.matrix import check_exact
from vgm_peft import formats
from vgm_peft.delta import Delta
from vgm_peft.deltas import TABLE
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.family import Base
from vgm_peft.formats.canonical import open_header, save_file, window_digest
from vgm_peft.formats.export import Wishes, export, file_name, foresee, thumbnail
from vgm_peft.formats.factors import exact, nearest
from vgm_peft.formats.targets import TARGETS, TOOLS, target_named
from vgm_peft.site import choose

Make = Callable[[str], Base]
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def base(shared: Make) -> Base:
    return shared("sd15")


def on(base: Base, kind: str, *patterns: str, size: float = 0.3, **options: Any) -> Delta:
    method = TABLE[kind]
    sites = choose(base.sites, patterns or (f"{LAYER}.weight",), base.family.presets, method.ops)
    return shake(Delta.fit(base.family.name, method, sites, method.Options(**options)).train(False), size=size)


# Factors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ((200, 300), (300, 40, 3, 3), (5, 400)))
@pytest.mark.parametrize("rank", (1, 3, 40))
def test_the_rank_of_a_change_is_found(shape: tuple[int, ...], rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    change = (torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)).view(shape)
    found = exact(change)
    true = min(rank, rows)
    if true * (rows + columns) > rows * columns:
        assert found is None  # no smaller than the change itself
        return
    assert found is not None and found.up.shape == (rows, true) and found.down.shape == (true, columns)
    assert difference(found.up @ found.down, change.flatten(1)) <= 1e-5
    assert exact(torch.randn(shape, generator=generator)) is None


def test_the_nearest_factors_lose_what_singular_values_say() -> None:
    matrix = torch.randn(150, 100, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(matrix)
    for rank in (4, 99):
        best = float(values[rank:].norm() / values.norm())
        assert nearest(matrix, rank).error == pytest.approx(best, rel=0.02)
    assert nearest(matrix, 500).error <= 2e-6
    assert nearest(torch.zeros(3, 4), 2).error == 0.0 and exact(torch.zeros(30, 40)) is not None


# Ways -----------------------------------------------------------------------------------------------------------------


def test_an_approximation_is_made_only_when_allowed_and_told_truly(base: Base, tmp_path: Path) -> None:
    delta = on(base, "oft", "cross-attention", block=4)
    with pytest.raises(
        DeltaError, match="diffusers cannot have.*oft on 64 of 64.*--approximate; or export it with --for comfyui or a1111"
    ):
        export(delta, tmp_path / "a.safetensors", "diffusers", base)
    assert list(tmp_path.iterdir()) == []
    made = export(delta, tmp_path / "a.safetensors", "diffusers", base, Wishes(approximate=2))
    assert set(made.plan.ways.values()) == {"nearly"} and set(made.plan.losses) == set(delta.patches)
    found, lost, size = formats.read(made.files[0], base), 0.0, 0.0
    for name, patch in delta.patches.items():
        weight = dict(base.denoiser.named_parameters())[name.removeprefix("unet.")]
        ours, theirs = patch.change(weight).detach(), found.patches[name].change(weight).detach()
        error, whole = float((ours - theirs).norm()), float(ours.norm())
        assert made.plan.losses[name].share == pytest.approx(error / whole, rel=1e-3) and made.plan.losses[name].rank == 2
        lost, size = lost + error**2, size + whole**2
    assert made.plan.loss == pytest.approx((lost / size) ** 0.5, rel=1e-3) and 0.05 < made.plan.loss < 1


def test_what_is_exact_stays_exact_when_a_loss_is_allowed(base: Base, tmp_path: Path) -> None:
    delta = on(base, "hra", "cross-attention", rank=4)
    made = export(delta, tmp_path / "a.safetensors", "diffusers", base, Wishes(approximate=8))
    assert set(made.plan.ways.values()) == {"as a LoRA"} and not made.plan.losses
    check_exact(made, delta, base)
    assert {len(t) for name, t in load_file(made.files[0]).items() if "lora_A" in name} == {4}


def test_what_follows_the_timestep_is_written_as_at_low_noise_and_says_so(base: Base, tmp_path: Path) -> None:
    delta = on(base, "tlora", rank=4)
    for patch in delta:
        patch.at(torch.tensor([900.0]))
    with pytest.raises(DeltaError, match="changes with the timestep.*--approximate"):
        export(delta, tmp_path / "a.safetensors", "comfyui", base)
    made = export(delta, tmp_path / "a.safetensors", "comfyui", base, Wishes(approximate=4))
    assert made.plan.remarks == ["it changes with the timestep; what is written is the change at timestep 0, for all of them"]
    for patch in delta:
        patch.at(torch.tensor([0.0]))
    check_exact(made, delta, base)


@pytest.mark.parametrize(
    ("kind", "options", "target", "message"),
    [
        ("dora", {}, "comfyui", "the base's weights are needed.*name the base with --base"),
        ("hra", {}, "diffusers", "name the base with --base"),
        ("ia3", {}, "forge", "no place for it as it is.*--base"),
        ("oft", {"rescale": True}, "comfyui", "no place for it as it is.*--base.*export it with --for a1111"),
    ],
)
def test_without_the_base_what_needs_it_is_refused(
    base: Base, kind: str, options: dict[str, Any], target: str, message: str, tmp_path: Path
) -> None:
    delta = on(base, kind, **options)
    with pytest.raises(DeltaError, match=message):
        export(delta, tmp_path / "a.safetensors", target)
    export(delta, tmp_path / "a.safetensors", target, base)


def test_what_needs_no_base_is_exported_without(base: Base, tmp_path: Path) -> None:
    for kind, options in (
        ("lora", {}),
        ("krona", {"a1": 4, "a2": 2}),
        ("loha", {"rank": 2}),
        ("fourierft", {"frequencies": 8}),
    ):
        delta = on(base, kind, **options)
        check_exact(export(delta, tmp_path / "a.safetensors", "a1111"), delta, base)


@pytest.mark.parametrize("tool", ("a1111", "invokeai", "lycoris"))
def test_a_bias_stands_beside_a_dense_change(base: Base, tool: str, tmp_path: Path) -> None:
    """Alone it makes these refuse the whole file, and beside a LoRA they pass over it."""
    bias = "unet.mid_block.resnets.0.conv1"
    alone = on(base, "bitfit", bias)
    made = export(alone, tmp_path / "a.safetensors", tool, base)
    stored = {name.partition(".")[2]: t for name, t in load_file(made.files[0]).items()}
    assert set(stored) == {"diff", "diff_b"} and not bool(stored["diff"].any())
    check_exact(made, alone, base)
    both = Delta("sd15", {**on(base, "lora", f"{bias}.weight", rank=2).patches, **alone.patches})
    made = export(both, tmp_path / "b.safetensors", tool, base)
    assert {name.partition(".")[2] for name in load_file(made.files[0])} == {"diff", "diff_b"}
    check_exact(made, both, base)
    assert {n.partition(".")[2] for n in load_file(export(both, tmp_path / "c.safetensors", "forge", base).files[0])} == {
        *("lora_down.weight", "lora_up.weight", "alpha", "diff_b")
    }


@pytest.mark.parametrize("family", ("sd15", "sdxl"))
def test_a1111_gets_text_attention_whole(shared: Make, family: str, tmp_path: Path) -> None:
    """It applies q, k, v and out of a fused layer only when all four are in the file."""
    base = shared(family)
    delta = on(base, "lora", "text_encoder*.q_proj", "text_encoder*.v_proj", rank=2)
    for reader_base in (base, None):
        made = export(delta, tmp_path / "a.safetensors", "a1111", reader_base)
        names = {
            name.rpartition("_")[0].rpartition("self_attn_")[2] for name in load_file(made.files[0]) if "alpha" not in name
        }
        assert {"q_proj.lora", "k_proj.lora", "v_proj.lora", "out_proj.lora"} == names
        check_exact(made, delta, base)


def test_text_norms_are_refused_where_nobody_looks(base: Base, tmp_path: Path) -> None:
    delta = on(base, "norm", "text_encoder.*layer_norm1*")
    with pytest.raises(DeltaError, match="does not look there in text encoders"):
        export(delta, tmp_path / "a.safetensors", "comfyui", base)
    check_exact(export(delta, tmp_path / "a.safetensors", "kohya", base), delta, base)


def test_what_invokeai_cannot_place_is_remarked(base: Base, tmp_path: Path) -> None:
    for patterns, count in ((("self-attention",), 1), (("cross-attention",), 0), (("text",), 0)):
        delta = on(base, "lora", *patterns, rank=2)
        if patterns == ("self-attention",):
            delta.patches = {name: p for name, p in delta.patches.items() if "text_encoder" not in name}
        assert len(export(delta, tmp_path / "a.safetensors", "invokeai", base).plan.remarks) == count


def test_tokens_go_along_to_every_tool(base: Base, tmp_path: Path) -> None:
    delta = on(base, "lora", rank=2)
    delta.words = {"<duck>": make_word(base, "<duck>", 2)}
    for tool in TOOLS:
        files = export(delta, tmp_path / tool / "me.safetensors", tool, base).files
        (word,) = [word for file in files for word in formats.read(file, base).words.values()]
        assert torch.equal(word.rows["text_encoder"], delta.words["<duck>"].rows["text_encoder"])


def test_a_fresh_delta_is_foreseen(base: Base) -> None:
    fresh = Delta.fit("sd15", TABLE["oft"], choose(base.sites, [LAYER], {}), TABLE["oft"].Options(block=4))
    before = {name: p.detach().clone() for name, p in fresh.parameters()}
    foresee(fresh, "comfyui", base)
    with pytest.raises(DeltaError, match="diffusers cannot have"):
        foresee(fresh, "diffusers", base)  # at dW = 0 it would be a LoRA of rank 1
    with pytest.raises(DeltaError, match="tokens go to files beside"):
        foresee(fresh, "embedding", base)
    assert all(torch.equal(p, before[name]) for name, p in fresh.parameters())
    assert all(p.requires_grad for _, p in fresh.parameters())


# The table ------------------------------------------------------------------------------------------------------------


def test_the_table_is_sound() -> None:
    from vgm_peft.cli.verbs.export import RANK
    from vgm_peft.cli.verbs.export import TARGETS as NAMES
    from vgm_peft.formats import export as module

    assert tuple(TARGETS) == NAMES and module.RANK == RANK
    assert {target.format for target in TARGETS.values()} <= set(formats.FORMATS)
    with pytest.raises(ConfigError, match='did you mean "comfyui"'):
        target_named("comfy")
    assert (file_name("peft", "me"), file_name("forge", "me"), file_name("forge")) == (
        "me-peft",
        "me-forge.safetensors",
        "forge.safetensors",
    )


# Metadata -------------------------------------------------------------------------------------------------------------

PRIVATE = {
    "ss_dataset_dirs": "/data/someone",
    "ss_output_name": "me",
    "ss_training_comment": "at host-17",
    "ss_sd_model_name": "/srv/models/base.safetensors",
    "modelspec.description": "made from ~/pictures of mine",
    "modelspec.author": "A. Nonymous",
    "base": "toybox",
    "base_digest": "00",
    "steps": "100",
    "seed": "7",
    "token": "sks",
    "prompt": "a photo of a sks robot",
    "resolution": "512",
}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_file_says_what_uis_show_and_nothing_private(base: Base, tool: str, tmp_path: Path) -> None:
    delta = on(base, "lora", rank=2, alpha=1.0)
    delta.metadata.update(PRIVATE)
    path = export(delta, tmp_path / "robot.safetensors", tool, base).files[0]
    said = open_header(path).metadata
    text = json.dumps(said) + str(path.read_bytes() if tool == "peft" else "")
    assert not [
        word for word in ("someone", "host-17", "/srv", "pictures of mine", "base_digest", str(tmp_path)) if word in text
    ]
    if tool == "peft":
        return
    assert said["modelspec.architecture"] == "stable-diffusion-v1/lora" and said["modelspec.sai_model_spec"] == "1.0.1"
    assert said["modelspec.title"] == "me" and said["modelspec.author"] == "A. Nonymous"
    assert said["modelspec.resolution"] == "512x512" and said["modelspec.trigger_phrase"] == "sks"
    assert "modelspec.date" not in said
    if tool != "diffusers":
        assert (said["ss_steps"], said["ss_seed"], said["ss_v2"]) == ("100", "7", "False")
        assert (said["ss_network_module"], said["ss_network_dim"], said["ss_network_alpha"]) == ("networks.lora", "2", "1.0")
        assert said["ss_base_model_version"] == "sd_v1" and "ss_sd_model_name" not in said  # two names, and one is a path


def test_what_is_asked_for_is_said(base: Base, tmp_path: Path) -> None:
    delta = on(base, "lora", rank=2)
    asked = {"modelspec.title": "A robot", "modelspec.date": "2026-01-01", "ss_training_comment": "mine"}
    paths = [export(delta, tmp_path / f"{n}.safetensors", "comfyui", base, Wishes(metadata=asked)).files[0] for n in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    said = open_header(paths[0]).metadata
    assert {key: said[key] for key in asked} == asked
    assert (
        open_header(export(delta, tmp_path / "robot.safetensors", "forge", base).files[0]).metadata["modelspec.title"]
        == "robot"
    )
    with pytest.raises(ConfigError, match="begins with modelspec"):
        Wishes(metadata={"author": "me"})
    with pytest.raises(ConfigError, match="rank of 1"):
        Wishes(approximate=0)


def test_diffusers_settings_say_what_the_tensors_say(base: Base, tmp_path: Path) -> None:
    delta = on(base, "lora", LAYER, "text", rank=3, alpha=1.0)
    path = export(delta, tmp_path / "a.safetensors", "diffusers", base).files[0]
    table = json.loads(open_header(path).metadata["lora_adapter_metadata"])
    assert table["unet.r"] == table["unet.lora_alpha"] == 3 and table["unet.use_dora"] is False
    assert table["unet.target_modules"] == [LAYER.removeprefix("unet.")] and len(table["text_encoder.target_modules"]) == 8
    assert_same_change(formats.read(path, base), delta, base)


def test_the_older_hash_is_the_one_of_its_definition(tmp_path: Path) -> None:
    tensors = {"a": torch.rand(300_000, generator=torch.Generator().manual_seed(0)), "b": torch.ones(7)}
    raw = save_file(tensors, tmp_path / "a.safetensors", {"ss_v2": "False"}).read_bytes()
    assert len(raw) > 0x110000
    for start, length in ((0x100000, 0x10000), (0, 100), (100, 5), (len(raw) - 3, 10), (len(raw) + 5, 10)):
        assert (
            window_digest(tensors, {"ss_v2": "False"}, start, length) == hashlib.sha256(raw[start : start + length]).hexdigest()
        )


def test_hashes_are_in_the_file(base: Base, tmp_path: Path) -> None:
    path = export(on(base, "lora", rank=2), tmp_path / "a.safetensors", "a1111", base).files[0]
    raw = path.read_bytes()
    said = open_header(path).metadata
    assert said["sshs_model_hash"] == hashlib.sha256(raw[8 + struct.unpack("<Q", raw[:8])[0] :]).hexdigest()
    assert said["sshs_legacy_hash"] == hashlib.sha256(b"").hexdigest()[:8]  # smaller than a MiB


def test_a_thumbnail_is_small_and_tells_nothing(tmp_path: Path) -> None:
    from base64 import b64decode
    from io import BytesIO

    info = PngInfo()
    info.add_text("parameters", "from my own folder")
    Image.new("RGB", (900, 600), "red").save(tmp_path / "a.png", pnginfo=info)
    head, _, data = thumbnail(tmp_path / "a.png").partition(",")
    with Image.open(BytesIO(b64decode(data))) as image:
        assert head == "data:image/jpeg;base64" and image.size == (256, 171) and not {*image.info} & {"parameters", "exif"}
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="no picture that can be read"):
        thumbnail(tmp_path / "b.png")
