"""What is written in kohya's names means the same to LyCORIS, the program that gave most of the suffixes their names.

Its loader guesses some settings from shapes and fails on others than its own defaults (4.1.3): LoKr splits but the squarest,
OFT blocks larger than their number, DoRA by input, LoKr with both factors split. Those options are left out here; the
functional forms, which other tools are modelled on, read them all (tests/contract/parity).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.formats.ground import difference, make_delta, picture, shake
from vgm_peft import formats
from vgm_peft.attachment import Attachment
from vgm_peft.delta import Delta
from vgm_peft.deltas import TABLE
from vgm_peft.family import Base
from vgm_peft.formats.canonical import open_header
from vgm_peft.site import choose

lycoris = pytest.importorskip("lycoris", reason="lycoris-lora is not installed (pip install -c constraints.txt '.[lycoris]')")


def test_lycoris_draws_the_same_picture(tiny: Callable[[str], Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny("sd15")
    # LyCORIS' own loader rebuilds the factors from one number, so it takes no split but (n, n)
    delta = make_delta(base, "krona", ("attention", "conv"), a1=2, a2=2, size=0.1)
    path = formats.write(delta, tmp_path / "krona.safetensors", "kohya", base)
    plain = picture(base.pipe)
    with Attachment(base.parts, delta):
        ours = picture(base.pipe)
    monkeypatch.setattr(lycoris.LycorisNetwork, "LORA_PREFIX", "lora_unet")
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(path), base.denoiser)
    assert len(network.loras) == len(delta.patches)
    network.apply_to()
    theirs = picture(base.pipe)
    network.restore()
    assert difference(ours, plain) > 1e-2
    assert difference(theirs, ours) <= 1e-4


@pytest.mark.parametrize("a1,a2", ((1, 1), (4, 2), (2, 8), (8, 4)))
@pytest.mark.parametrize("pattern", ("attention", "conv"))
def test_any_split_means_the_same_to_lycoris(
    shared: Callable[[str], Base], a1: int, a2: int, pattern: str, tmp_path: Path
) -> None:
    from lycoris.functional import lokr
    from safetensors.torch import load_file

    base = shared("sdxl")
    delta = make_delta(base, "krona", (pattern,), a1=a1, a2=a2)
    stored = load_file(formats.write(delta, tmp_path / "krona.safetensors", "kohya", base))
    names = base.family.key_table(base.sites).kohya
    for patch in delta:
        prefix = names[patch.site.part, patch.site.module]
        w1, w2 = stored[f"{prefix}.lokr_w1"], stored[f"{prefix}.lokr_w2"]
        theirs = lokr.diff_weight(w1, None, None, w2, None, None, None)
        assert difference(theirs.reshape(patch.site.shape), patch.change(torch.zeros(patch.site.shape))) <= 1e-6


READ: dict[str, tuple[dict[str, Any], dict[str, str] | None]] = {
    "krona": ({"a1": 2, "a2": 2}, {"algo": "lokr"}),
    "lora": ({"rank": 3, "alpha": 2.0}, None),
    "dora": ({"rank": 3}, {"algo": "locon", "dora_wd": "True", "wd_on_output": "True"}),
    "pissa": ({"rank": 2}, None),
    "dylora": ({"rank": 4}, None),
    "lokr": ({"rank": 1, "alpha": 2.0}, {"algo": "lokr"}),
    "loha": ({"rank": 2, "alpha": 24.0}, {"algo": "loha"}),
    "oft": ({"block": 2, "rescale": True}, {"algo": "diag-oft"}),
    "boft": ({}, {"algo": "boft"}),
    "hra": ({"rank": 4}, {"algo": "full"}),
    "glora": ({"rank": 2, "alpha": 3.0}, {"algo": "glora"}),
    "ia3": ({}, {"algo": "ia3"}),
    "diff": ({}, {"algo": "full", "train_norm": "True"}),
    "norm": ({}, {"algo": "full", "train_norm": "True"}),
    "difffit": ({}, {"algo": "full", "train_norm": "True"}),
    "svdiff": ({}, {"algo": "full", "train_norm": "True"}),
    "vera": ({"rank": 4}, None),
    "fourierft": ({"frequencies": 16}, {"algo": "full"}),
    "c3a": ({}, {"algo": "full"}),
}
"""Kind -> options that the loader does not stumble over, and what the file says of itself (None: kohya's own LoRA).

Not `bitfit`: LyCORIS passes over a bias whose weight is unchanged; not `tlora`, which no other tool's file can hold.
"""


def predicted(base: Base) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    unet: Any = base.denoiser
    noisy = torch.randn(1, 4, 16, 16, generator=generator)
    text = torch.randn(1, 7, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return unet(noisy, torch.tensor([500]), text).sample


def test_every_kind_is_here() -> None:
    assert set(READ) == set(TABLE) - {"bitfit", "tlora"}


@pytest.mark.parametrize("kind", READ)
def test_every_kind_loads(tiny: Callable[[str], Base], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lycoris.modules.ia3 import IA3Module

    def read_both(cls: Any, name: str, layer: Any, weight: Tensor, on_input: Tensor) -> Any:
        module = IA3Module(name, layer, 1, train_on_input=bool(on_input))
        module.weight.data.copy_(weight)
        return module

    # As released it takes one of the two tensors that it is given, and raises.
    monkeypatch.setattr(IA3Module, "make_module_from_state_dict", classmethod(read_both))
    monkeypatch.setattr(lycoris.LycorisNetwork, "LORA_PREFIX", "lora_unet")
    base, method = tiny("sd15"), TABLE[kind]
    options, said = READ[kind]
    patterns = ["unet.mid_block.*.weight", *(["unet.mid_block.*norm*.bias"] if "bias" in method.ops else [])]
    sites = choose(base.sites, patterns, {}, method.ops)
    delta = Delta.fit("sd15", method, sites, method.Options(**options)).start(base.parts).train(False)
    shake(delta, size=0.4)
    path = formats.write(delta, tmp_path / "a.safetensors", "kohya", base)
    metadata = open_header(path).metadata
    assert metadata["ss_network_module"] == ("networks.lora" if said is None else "lycoris.kohya")
    assert json.loads(metadata.get("ss_network_args", "null")) == said
    plain = predicted(base)
    with Attachment(base.parts, delta):
        ours = predicted(base)
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(path), base.denoiser)
    assert len(network.loras) == len({s.module for s in sites})
    network.apply_to()
    theirs = predicted(base)
    network.restore()
    assert difference(ours, plain) > 1e-3
    assert difference(theirs, ours) <= 1e-4
