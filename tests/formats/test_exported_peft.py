"""What is exported for peft in its own kinds, peft itself loads and merges into what the delta makes of every weight."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from tests.formats.ground import assert_same_change, difference, shake
from tests.formats.test_adapter import piece
from vgm_peft import formats
from vgm_peft.delta import Delta
from vgm_peft.deltas import TABLE
from vgm_peft.errors import DeltaError
from vgm_peft.family import Base
from vgm_peft.formats.books import family_book
from vgm_peft.formats.export import Wishes, export
from vgm_peft.site import choose

peft: Any = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "Failed to load the CUDA extension",
        "Setting boft_n_butterfly_factor",
        "`is_gradient_checkpointing` is deprec",
    )
]
Make = Callable[[str], Base]
BLOCK = "unet.mid_block.attentions.0.transformer_blocks.0"
LINEAR = (f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.ff.net.2")
ALL = (*LINEAR, "unet.mid_block.resnets.0.conv1", "unet.mid_block.attentions.0.proj_in")
NO_KERNEL = (*LINEAR, ALL[4])

CASES: dict[str, tuple[str, tuple[str, ...], str, dict[str, Any]]] = {
    "LoHa": ("loha", ALL, "LOHA", {"rank": 2, "alpha": 3.0}),
    "LoHa, Tucker": ("loha", ALL, "LOHA", {"rank": 2, "tucker": True}),
    "LoKr": ("lokr", ALL, "LOKR", {"rank": 1, "alpha": 3.0}),
    "LoKr, a factor": ("lokr", ALL, "LOKR", {"rank": 1, "factor": 2}),
    "LoKr, both halves factored": ("lokr", LINEAR, "LOKR", {"rank": 1, "alpha": 2.0, "decompose_both": True}),
    "LoKr, both halves full": ("lokr", ALL, "LOKR", {"full_matrix": True, "factor": 4}),
    "OFT": ("oft", NO_KERNEL, "OFT", {"side": "input", "block": 4}),
    "OFT, a series": ("oft", NO_KERNEL, "OFT", {"side": "input", "block": 4, "terms": 6}),
    "OFT, constrained": ("oft", LINEAR, "OFT", {"side": "input", "block": 4, "constraint": 0.02}),
    "BOFT": ("boft", NO_KERNEL, "BOFT", {"side": "input", "block": 4, "factors": 1, "rescale": True}),
    "BOFT, constrained": ("boft", LINEAR, "BOFT", {"side": "input", "block": 4, "factors": 1, "constraint": 0.02}),
    "HRA": ("hra", ALL, "HRA", {"rank": 4}),
    "IA3": ("ia3", (f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k"), "IA3", {}),
    "IA3 of inputs": ("ia3", ALL, "IA3", {"on_input": True}),
    "VeRA": ("vera", LINEAR, "VERA", {"rank": 4, "seed": 3}),
    "FourierFT": ("fourierft", LINEAR, "FOURIERFT", {"frequencies": 20, "scale": 60.0, "seed": 5}),
    "C3A": ("c3a", LINEAR, "C3A", {"block": 4}),
    "C3A, blocks by layer": ("c3a", LINEAR, "C3A", {}),
}
"""Kind, layers, peft's word and options."""


def trained(base: Base, kind: str, layers: tuple[str, ...], options: dict[str, Any]) -> Delta:
    """A delta of one kind with random values on some layers of a base."""
    sites = choose(base.sites, list(layers), {}, TABLE[kind].ops)
    return shake(Delta.fit(base.family.name, TABLE[kind], sites, TABLE[kind].Options(**options)))


def kind_in(folder: Path) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["peft_type"]


def merged(network: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """What peft makes of a network's tensors with the adapter in a folder."""
    return peft.PeftModel.from_pretrained(cast(Any, copy.deepcopy(network)), str(folder)).merge_and_unload().state_dict()


def check_merged(base: Base, delta: Delta, folder: Path) -> None:
    """Assert that peft changes just the weights that the delta changes, by its dW."""
    network = piece(base)
    after = merged(network, folder)
    for name, before in network.state_dict().items():
        patch = delta.patches.get(f"unet.{name}")
        if patch is None:
            assert torch.equal(after[name], before), name
        else:
            assert difference(after[name] - before, patch.change(before)) <= 1e-5, name


@pytest.mark.parametrize("case", CASES)
def test_peft_merges_what_was_exported(shared: Make, case: str, tmp_path: Path) -> None:
    base = shared("sd15")
    kind, layers, word, options = CASES[case]
    delta = trained(base, kind, layers, options)
    made = export(delta, tmp_path / "me", "peft", base)
    assert set(made.plan.ways.values()) == {"as it is"}
    assert kind_in(tmp_path / "me" / "unet") == word
    check_merged(base, delta, tmp_path / "me" / "unet")


@pytest.mark.parametrize("case", CASES)
def test_no_base_is_needed(case: str, tmp_path: Path) -> None:
    kind, layers, word, options = CASES[case]
    sites = [family_book("sd15").sites["unet", layer.removeprefix("unet.")]["weight"] for layer in layers]
    method = TABLE[kind]
    delta = shake(Delta.fit("sd15", method, sites, method.Options(**options)), size=0.05)
    export(delta, tmp_path / "me", "peft")
    assert kind_in(tmp_path / "me" / "unet") == word


MIXED: dict[str, tuple[tuple[str, tuple[str, ...], dict[str, Any]], ...]] = {
    "two kinds": (("hra", LINEAR[:1], {"rank": 2}), ("loha", LINEAR[1:], {"rank": 1})),
    "HRA of two ranks": (("hra", LINEAR[:1], {"rank": 2}), ("hra", LINEAR[1:], {"rank": 4})),
    "VeRA of two seeds": (("vera", LINEAR[:1], {"rank": 2}), ("vera", LINEAR[1:], {"rank": 2, "seed": 1})),
    "VeRA on a kernel": (("vera", ALL, {"rank": 2}),),
    "LoKr that no one setting splits": (("lokr", LINEAR[:2], {"rank": 1, "o1": 8, "i1": 2}),),
    "LoHa with a magnitude": (("loha", LINEAR[:1], {"rank": 2, "decompose": "output"}), ("lora", LINEAR[1:2], {"rank": 2})),
}
"""Parts that are no single adapter: LoRA as before, or its refusal."""


@pytest.mark.parametrize("case", MIXED)
def test_what_is_no_single_adapter_is_lora_or_refused(shared: Make, case: str, tmp_path: Path) -> None:
    base = shared("sd15")
    delta = Delta("sd15")
    for kind, layers, options in MIXED[case]:
        delta.patches |= trained(base, kind, layers, options).patches
    try:
        export(delta, tmp_path / "me", "peft", base)
    except DeltaError as error:
        assert "peft has no place for it" in str(error) and "--approximate" in str(error)
        made = export(delta, tmp_path / "me", "peft", base, Wishes(approximate=64))
        assert made.plan.loss <= 1e-5  # the rank is above that of every layer
    assert kind_in(tmp_path / "me" / "unet") == "LORA"
    check_merged(base, delta, tmp_path / "me" / "unet")


def test_every_part_is_of_a_kind_of_its_own(shared: Make, tmp_path: Path) -> None:
    base = shared("sdxl")
    delta = trained(base, "lora", LINEAR[:1], {"rank": 2})
    delta.patches |= trained(base, "hra", ("text_encoder.*.q_proj",), {"rank": 2}).patches
    delta.patches |= trained(base, "ia3", ("text_encoder_2.*.fc2",), {"on_input": True}).patches
    made = export(delta, tmp_path / "me", "peft", base)
    assert {file.parent.name: kind_in(file.parent) for file in made.files} == {
        "unet": "LORA",
        "text_encoder": "HRA",
        "text_encoder_2": "IA3",
    }
    for part in ("text_encoder", "text_encoder_2"):
        encoder: Any = base.parts[part]
        theirs = merged(encoder, tmp_path / "me" / part)
        prefix = "text_model." if hasattr(encoder, "text_model") else ""
        for patch in (patch for patch in delta if patch.site.part == part):
            before = encoder.state_dict()[f"{prefix}{patch.site.module}.weight"]
            change = theirs[f"{prefix}{patch.site.module}.weight"] - before
            assert difference(change, patch.change(before)) <= 1e-5


def test_what_peft_trained_goes_back_to_it_as_it_came(shared: Make, tmp_path: Path) -> None:
    """Reading and writing are inverse: the second folder has the first one's tensors."""
    base = shared("sd15")
    for kind, layers, word, options in list(CASES.values()):
        if word == "VERA":  # which is read as the LoRA that it is
            continue
        once, twice = tmp_path / f"{kind}1", tmp_path / f"{kind}2"
        export(trained(base, kind, layers, options), once, "peft", base)
        delta = formats.read(once / "unet", base)
        export(delta, twice, "peft", base)
        assert kind_in(twice / "unet") == word
        assert_same_change(formats.read(twice / "unet", base), delta, base)
