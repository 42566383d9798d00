"""What is written loads in code not written here and draws the same picture; what that code writes is read with the same dW.

Stock loaders have silent no-ops, so every load is followed by a look at what was loaded, and every picture is first shown
to differ from the base's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tests.formats.ground import assert_same_change, difference, make_delta, make_word, picture
from vgm_peft import formats
from vgm_peft.attachment import Attachment
from vgm_peft.delta import Delta
from vgm_peft.family import Base

FAMILIES = ("sd15", "sdxl")
SITES = ("attention+mlp", "conv", "text+mlp", "*.proj_in", "*.proj_out", "*.conv_shortcut", "*.time_emb_proj")
Make = Callable[[str], Base]


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tiny: Make) -> Base:
    return tiny(request.param)


def drawn_live(base: Base, delta: Delta) -> torch.Tensor:
    with Attachment(base.parts, delta):
        with_delta = picture(base.pipe)
    assert difference(with_delta, picture(base.pipe)) > 1e-2
    return with_delta


def drawn_stock(base: Base, path: Path, parts: set[str]) -> torch.Tensor:
    pipe: Any = base.pipe
    pipe.load_lora_weights(str(path), adapter_name="ours")
    try:
        assert {part: names for part, names in pipe.get_list_adapters().items()} == {part: ["ours"] for part in parts}
        return picture(pipe)
    finally:
        pipe.unload_lora_weights()


@pytest.mark.parametrize("text", (False, True), ids=("unet", "unet and text"))
def test_stock_pipeline_draws_the_same_picture(base: Base, text: bool, tmp_path: Path) -> None:
    sites = SITES if text else ("attention+mlp", "conv")
    delta = make_delta(base, "lora", sites, rank=3, alpha=2.0, size=0.15)
    parts = {"unet"} | (set(base.family.parts[1:]) if text else set())
    ours = drawn_live(base, delta)
    for format in ("kohya", "diffusers"):
        path = formats.write(delta, tmp_path / f"{format}.safetensors", format, base)
        assert difference(drawn_stock(base, path, parts), ours) <= 1e-4


@pytest.mark.parametrize("text", (False, True), ids=("unet", "unet and text"))
def test_stock_pipeline_draws_the_same_picture_of_a_dora(base: Base, text: bool, tmp_path: Path) -> None:
    sites = ("attention", "conv", "text") if text else ("attention", "conv")
    delta = make_delta(base, "dora", sites, rank=3, alpha=2.0, size=0.1)
    parts = {"unet"} | (set(base.family.parts[1:]) if text else set())
    ours = drawn_live(base, delta)
    path = formats.write(delta, tmp_path / "dora.safetensors", "diffusers", base)
    assert difference(drawn_stock(base, path, parts), ours) <= 1e-4
    again = formats.read(path, base)
    assert again.kinds == ("dora",)
    # A magnitude is stored whole, so it is rounded at the size of W, of which dW is a small part.
    assert_same_change(again, delta, base, 4e-6)


def test_mixed_ranks_and_stable_scale(base: Base, tmp_path: Path) -> None:
    low = make_delta(base, "lora", ("cross-attention",), rank=2, alpha=5.0, size=0.2)
    high = make_delta(base, "lora", ("self-attention",), rank=4, alpha=1.0, rslora=True, size=0.2)
    delta = Delta(low.family, {**low.patches, **high.patches})
    ours = drawn_live(base, delta)
    for format in ("kohya", "diffusers"):
        path = formats.write(delta, tmp_path / f"{format}.safetensors", format, base)
        assert difference(drawn_stock(base, path, {"unet"}), ours) <= 1e-4
        assert_same_change(formats.read(path, base), delta, base)


def test_stock_pipeline_draws_the_same_picture_of_toybox(tmp_path: Path) -> None:
    from vgm_peft.families import load

    base = load("toybox", digest=False)
    delta = make_delta(base, "lora", ("cross-attention", "*.proj_in", "text"), rank=4, alpha=3.0, size=0.15)
    ours = drawn_live(base, delta)
    for format in ("kohya", "diffusers"):
        path = formats.write(delta, tmp_path / f"{format}.safetensors", format)  # the published names; it needs no base
        assert difference(drawn_stock(base, path, {"unet", "text_encoder"}), ours) <= 1e-4


def stock_lora(base: Base, **config: Any) -> None:
    """Put peft's own LoRA with random values on every part of a pipeline."""
    from peft import LoraConfig

    torch.manual_seed(11)
    targets = {"unet": ["to_q", "to_v", "conv1"], "text_encoder": ["q_proj", "fc1"], "text_encoder_2": ["k_proj"]}
    for part, root in base.parts.items():
        cast(Any, root).add_adapter(LoraConfig(r=4, target_modules=targets[part], init_lora_weights="gaussian", **config))
        for name, parameter in root.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)


def stock_change(base: Base) -> dict[str, torch.Tensor]:
    """dW of peft's layers, by site name."""
    out: dict[str, torch.Tensor] = {}
    for part, root in base.parts.items():
        for name, module in root.named_modules():
            if hasattr(module, "get_delta_weight"):
                change = cast(Any, module).get_delta_weight("default").detach()
                out[f"{part}.{name.removeprefix('text_model.')}.weight"] = change
    return out


ALPHAS = {"metadata": {"lora_alpha": 3}, "rank-stabilised": {"lora_alpha": 3, "use_rslora": True}, "folded": {"lora_alpha": 4}}


@pytest.mark.parametrize("how", ALPHAS)
def test_what_diffusers_saves_is_read(base: Base, how: str, tiny: Make, tmp_path: Path) -> None:
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    theirs = tiny(base.family.name)
    stock_lora(theirs, **ALPHAS[how])
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(root) for part, root in theirs.parts.items()}
    metadata = {} if how == "folded" else _collate_lora_metadata(theirs.parts)
    cast(Any, type(theirs.pipe)).save_lora_weights(tmp_path, **layers, **metadata)
    expected = stock_change(theirs)
    for reader_base in (base, None):
        delta = formats.read(tmp_path, reader_base)
        assert formats.sniff(tmp_path) == "diffusers" and delta.family == base.family.name
        assert set(delta.patches) == set(expected)
        for name, patch in delta.patches.items():
            assert difference(patch.change(torch.zeros(patch.site.shape)).detach(), expected[name]) <= 1e-6


@pytest.mark.parametrize("vectors", (1, 3))
def test_stock_textual_inversion(tiny: Make, vectors: int, tmp_path: Path) -> None:
    from vgm_peft.words import WordAttachment

    base = tiny("sd15")
    delta = Delta("sd15", words={"<duckie>": make_word(base, "<duckie>", vectors)})
    path = formats.write(delta, tmp_path / "word.safetensors", "embedding", base)
    prompt = "a red <duckie> on a table"
    plain = picture(base.pipe, prompt)
    with WordAttachment(base.pipe, delta.words.values()):
        ours = picture(base.pipe, prompt)
    assert difference(ours, plain) > 1e-3
    base.pipe.load_textual_inversion(str(path))  # type: ignore[attr-defined]
    assert difference(picture(base.pipe, prompt), ours) <= 1e-4


def test_stock_textual_inversion_of_two_encoders(tiny: Make, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from vgm_peft.words import WordAttachment

    base = tiny("sdxl")
    pipe: Any = base.pipe
    delta = Delta("sdxl", words={"<duckie>": make_word(base, "<duckie>", 2)})
    stock = load_file(formats.write(delta, tmp_path / "word.safetensors", "embedding", base))
    prompt = "a red <duckie> on a table"
    with WordAttachment(pipe, delta.words.values()):
        ours = picture(pipe, prompt)
    pipe.load_textual_inversion(stock["clip_l"], token="<duckie>", text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
    pipe.load_textual_inversion(stock["clip_g"], token="<duckie>", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)
    assert difference(picture(pipe, prompt), ours) <= 1e-4
