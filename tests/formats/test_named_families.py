"""SD3 and FLUX by their names: every row of the full-size key tables against diffusers' converters of whole checkpoints.

A checkpoint in the authors' names is made in which every row of every tensor has a number of its own; diffusers turns it
into its own layout; then our table must say of each of diffusers' tensors exactly those rows, in that order.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file
from torch import Tensor

from tests.formats.ground import difference
from vgm_peft import formats
from vgm_peft.errors import DeltaError
from vgm_peft.families import KNOWN, TABLE, naming_of
from vgm_peft.families.transformers import FLUX_NAMES, SD3_NAMES
from vgm_peft.family import Base
from vgm_peft.formats.books import Book, Reading, books

Make = Callable[[str], Base]
CONVERTERS: Mapping[str, tuple[Any, Mapping[str, Sequence[str]], Sequence[str]]] = {
    "flux": (
        single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
        {name: ours for name, ours in FLUX_NAMES.items() if name not in ("img_in.proj", "single_blocks.#.linear1_qkv")},
        [
            *(f"double_blocks.#.{half}_attn.norm.{n}_norm.scale" for half in ("img", "txt") for n in ("query", "key")),
            *(f"single_blocks.#.norm.{n}_norm.scale" for n in ("query", "key")),
        ],
    ),
    "sd3": (
        single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
        SD3_NAMES,
        [f"joint_blocks.#.{block}.ln_{n}.weight" for block in ("x_block.attn", "context_block.attn") for n in "qk"],
    ),
}
BOOKS = [(name, edition) for name in CONVERTERS for edition in naming_of(name).editions()]


def book(family: str, edition: str) -> Book:
    return dict(zip(naming_of(family).editions(), books([family]), strict=True))[edition]


def natives(family: str, found: Book) -> dict[str, int]:
    """The authors' modules that this size has, with the rows of their weights."""
    out: dict[str, int] = {}
    for name, ours in CONVERTERS[family][1].items():
        for number in range(64) if "#" in name else [0]:
            places = [("transformer", module.replace("#", str(number))) for module in ours]
            if all(place in found.sites for place in places):
                out[name.replace("#", str(number))] = sum(found.sites[place]["weight"].shape[0] for place in places)
    return out


@pytest.mark.parametrize(("family", "edition"), BOOKS)
def test_every_row_is_where_diffusers_puts_it(family: str, edition: str) -> None:
    found = book(family, edition)
    convert, _, norms = CONVERTERS[family]
    start, checkpoint, rows_of = 0, dict[str, Tensor](), natives(family, found)
    for name, rows in rows_of.items():
        checkpoint[f"{name}.weight"] = torch.arange(start, start + rows, dtype=torch.float64)[:, None]
        checkpoint[f"{name}.bias"] = torch.zeros(rows)
        start += rows
    has_norms = family == "flux" or edition != "sd3-medium"
    for name in norms if has_norms else ():
        numbers = {module.split(".")[1] for module in rows_of if module.split(".")[0] == name.split(".")[0]}
        checkpoint |= {name.replace("#", number): torch.zeros(1) for number in numbers}
    if edition == "sd3.5-medium":
        checkpoint |= {f"joint_blocks.{n}.x_block.attn2.ln_{k}.weight": torch.zeros(1) for n in range(13) for k in "qk"}
    if family == "sd3":
        checkpoint["pos_embed"] = torch.zeros(1)
    written = {name: tensor.clone() for name, tensor in checkpoint.items() if name.endswith("weight")}
    converted = convert(checkpoint)
    assert not checkpoint, list(checkpoint)[:3]  # diffusers knows all of these names
    reading, seen = Reading(found, "transformer"), set[str]()
    for name in rows_of:
        for prefix in ("diffusion_model.", "lora_unet_", ""):
            assert reading.find(prefix + (name.replace(".", "_") if prefix == "lora_unet_" else name)) == reading.find(name)
        for share in reading.find(name):
            ids = written[f"{name}.weight"][:, 0]
            mine = torch.cat([ids[rows.start : rows.stop] for rows in share.rows]) if share.rows else ids
            assert torch.equal(converted[f"{share.place[1]}.weight"][:, 0], mine), name
            assert share.place[1] not in seen and len(mine) == found.sites[share.place]["weight"].shape[0]
            seen.add(share.place[1])
    assert seen == {module for part, module in found.sites if part == "transformer"}


@pytest.mark.parametrize(("family", "edition"), BOOKS)
def test_every_name_means_one_module_and_back(family: str, edition: str) -> None:
    found = book(family, edition)
    reading = Reading(found, "transformer")
    prefixes = {"transformer": ["transformer.", "lora_transformer_", "base_model.model.", "lycoris_"]}
    for part, module in found.sites:
        for prefix in prefixes.get(part, [f"{part}.", f"{found.family.prefixes[part][0]}_"]):
            spelled = prefix + (module.replace(".", "_") if prefix.endswith("_") else module)
            assert [share.place for share in reading.find(spelled)] == [(part, module)], spelled
    assert len(set(found.written.values())) == len(found.written)
    assert all(reading.find(name)[0].place == place for place, name in found.written.items())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


H, QKV = 3072, "lora_unet_double_blocks_3_img_attn_qkv"
X = random(H, 2)


def written_flux(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    other = {"lora_unet_single_blocks_37_linear2.lora_down.weight": random(1, 5 * H)}
    other |= {"lora_unet_single_blocks_37_linear2.lora_up.weight": random(H, 1)}
    save_file({**other, **{name: tensor.contiguous() for name, tensor in tensors.items()}}, folder / "a.safetensors")
    return folder / "a.safetensors"


def answer(patch: Any, x: Tensor) -> Tensor:
    """What a low-rank patch makes of x, without the dense change."""
    packed = patch.pack(torch.zeros(()))
    scale = packed["alpha"] / len(packed["lora_down.weight"])
    return (scale * packed["lora_up.weight"] @ (packed["lora_down.weight"] @ x)).detach()


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_fused_lora_is_cut_by_rows(diagonal: bool, tmp_path: Path) -> None:
    down, up = random(6, H), random(3 * H, 6)
    if diagonal:
        up = torch.block_diag(*(random(H, 2, seed=n) for n in range(3)))
    tensors = {f"{QKV}.lora_down.weight": down, f"{QKV}.lora_up.weight": up, f"{QKV}.alpha": torch.tensor(3.0)}
    delta = formats.read(written_flux(tmp_path, tensors))
    assert delta.family == "flux" and len(delta.patches) == 4
    for number, name in enumerate(("to_q", "to_k", "to_v")):
        patch = delta.patches[f"transformer.transformer_blocks.3.attn.{name}.weight"]
        expected = 0.5 * (up[number * H : (number + 1) * H] @ (down @ X))
        assert difference(answer(patch, X), expected) <= 1e-5
        assert patch.options.rank == (2 if diagonal else 6)


def test_other_kinds_are_cut_or_refused(tmp_path: Path) -> None:
    left, right = random(9, 4), random(H // 3, H // 4)
    delta = formats.read(written_flux(tmp_path, {f"{QKV}.lokr_w1": left, f"{QKV}.lokr_w2": right}))
    patch: Any = delta.patches["transformer.transformer_blocks.3.attn.to_k.weight"]
    assert torch.equal(patch.A, left[3:6]) and torch.equal(patch.B, right)
    bad = {f"{QKV}.lokr_w1": random(2, 4), f"{QKV}.lokr_w2": random(3 * H // 2, H // 4)}
    with pytest.raises(DeltaError, match="2x4 cannot be cut at the outputs .* exactly; train or export it with separate"):
        formats.read(written_flux(tmp_path, bad))
    pair = {f"{QKV}.lora_down.weight": random(1, H), f"{QKV}.lora_up.weight": random(3 * H, 1)}
    dora = {**pair, f"{QKV}.dora_scale": random(1, H)}
    with pytest.raises(DeltaError, match="several of ours, and 'dora_scale' cannot be cut"):
        formats.read(written_flux(tmp_path, dora))


def test_halves_that_are_swapped_are_swapped_back(tmp_path: Path) -> None:
    down, up = random(1, H), random(2 * H, 1)
    name = "diffusion_model.final_layer.adaLN_modulation.1"
    delta = formats.read(written_flux(tmp_path, {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}))
    patch = delta.patches["transformer.norm_out.linear.weight"]
    assert difference(answer(patch, X), torch.cat([up[H:], up[:H]]) @ (down @ X)) <= 1e-6


def test_a_family_without_a_pipeline_is_named(shared: Make, tmp_path: Path) -> None:
    assert set(KNOWN) - set(TABLE) == set(CONVERTERS)
    for name in TABLE:
        with pytest.raises(DeltaError, match="it looks like a delta of flux"):
            formats.read(written_flux(tmp_path, {}), shared(name))
    t5 = "lora_te3_encoder_block_23_layer_1_DenseReluDense_wo"
    save_file({f"{t5}.lora_down.weight": random(1, 10240), f"{t5}.lora_up.weight": random(4096, 1)}, tmp_path / "b.safetensors")
    assert formats.read(tmp_path / "b.safetensors").family == "sd3"
    save_file({"clip_l": random(2, 768), "clip_g": random(2, 1280), "t5xxl": random(2, 4096)}, tmp_path / "c.safetensors")
    assert formats.read(tmp_path / "c.safetensors").family == "sd3"
