"""Files that LyCORIS itself makes, of every algorithm, mean the same here: each layer answers as LyCORIS makes it answer.

Not DyLoRA, whose layers draw a rank at random in every forward (4.1.3), also when nothing is trained; its files are LoRAs. Not
T-LoRA, whose files hold the drawn factors too, which count for nothing without the ones they began with.
"""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.formats.ground import difference
from vgm_peft import formats
from vgm_peft.attachment import Attachment
from vgm_peft.errors import DeltaError
from vgm_peft.families import family_named
from vgm_peft.family import Base

lycoris: Any = pytest.importorskip(
    "lycoris", reason="lycoris-lora is not installed (pip install -c constraints.txt '.[lycoris]')"
)

CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "LoRA": ({"algo": "lora"}, {"lora"}),
    "LoRA, Tucker": ({"algo": "lora", "use_tucker": True}, {"lora"}),
    "LoRA times a scalar": ({"algo": "lora", "use_scalar": True}, {"lora"}),
    "DoRA by output": ({"algo": "lora", "dora_wd": True}, {"dora"}),
    "DoRA by input": ({"algo": "lora", "dora_wd": True, "wd_on_output": False}, {"dora"}),
    "LoRA and norms": ({"algo": "lora", "train_norm": True}, {"lora", "diff"}),
    "LoHa": ({"algo": "loha"}, {"loha"}),
    "LoHa, Tucker": ({"algo": "loha", "use_tucker": True}, {"loha"}),
    "LoHa, decomposed": ({"algo": "loha", "dora_wd": True}, {"loha"}),
    "LoKr": ({"algo": "lokr", "linear_dim": 1}, {"lokr", "krona"}),
    "LoKr, both decomposed": ({"algo": "lokr", "linear_dim": 1, "decompose_both": True, "factor": 4}, {"lokr", "krona"}),
    "LoKr, Tucker": ({"algo": "lokr", "linear_dim": 1, "use_tucker": True}, {"lokr", "krona"}),
    "LoKr, two full factors": ({"algo": "lokr", "linear_dim": 10000, "full_matrix": True}, {"krona"}),
    "LoKr, decomposed": ({"algo": "lokr", "linear_dim": 1, "dora_wd": True}, {"lokr"}),
    "full": ({"algo": "full"}, {"diff"}),
    "GLoRA": ({"algo": "glora"}, {"glora"}),
    "IA3": ({"algo": "ia3"}, {"ia3"}),
    "OFT": ({"algo": "diag-oft"}, {"oft"}),
    "OFT, constrained and rescaled": ({"algo": "diag-oft", "constraint": 0.01, "rescaled": True}, {"oft"}),
    "BOFT": ({"algo": "boft", "linear_dim": 4}, {"boft"}),
    "BOFT, constrained and rescaled": ({"algo": "boft", "linear_dim": 4, "constraint": 0.01, "rescaled": True}, {"boft"}),
}
BLOCK = "mid_block.attentions.0.transformer_blocks.0"
LAYERS = [
    f"{BLOCK}.attn2.to_k",
    f"{BLOCK}.ff.net.2",
    f"{BLOCK}.norm1",
    "mid_block.resnets.0.conv1",
    "mid_block.attentions.0.proj_in",
]


def answers(base: Base) -> dict[str, Tensor]:
    """What a few layers make of random inputs, each of its own shape."""
    generator, out = torch.Generator().manual_seed(2), {}
    for name in LAYERS:
        layer: Any = base.denoiser.get_submodule(name)
        if isinstance(layer, nn.Conv2d):
            x = torch.randn(2, layer.in_channels, 5, 5, generator=generator)
        else:
            x = torch.randn(3, layer.in_features if isinstance(layer, nn.Linear) else 16, generator=generator)
        with torch.no_grad():
            out[name] = layer(x)
    return out


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """LyCORIS keeps what it was last told in its class, and says much."""
    for name in (
        "LORA_PREFIX",
        "TARGET_REPLACE_MODULE",
        "TARGET_REPLACE_NAME",
        "ENABLE_CONV",
        "MODULE_ALGO_MAP",
        "NAME_ALGO_MAP",
    ):
        monkeypatch.setattr(lycoris.LycorisNetwork, name, getattr(lycoris.LycorisNetwork, name))
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def base() -> Base:
    """One for all tests here: LyCORIS leaves the layers as they were, but not always the same objects."""
    family = family_named("sd15")
    return Base(family.tiny(), family, "tiny").freeze()


@pytest.mark.parametrize(
    ("case", "prefix"), [*((case, "lycoris") for case in CASES), ("LoRA", "lora_unet"), ("IA3", "lora_unet")]
)
def test_a_file_of_lycoris_means_what_lycoris_does(
    base: Base, case: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, kinds = CASES[case]
    preset = {"target_name": LAYERS, "target_module": [], "lora_prefix": prefix, "enable_conv": True}
    monkeypatch.setattr("lycoris.wrapper.PRESET", {"full": preset})
    options = {"linear_dim": 2, "linear_alpha": 3, "conv_alpha": 3, **settings}
    network = lycoris.create_lycoris(base.denoiser, 1.0, **options)
    generator = torch.Generator().manual_seed(1)
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    network.eval()
    theirs = answers(base)
    state = {name: tensor.clone().contiguous() for name, tensor in network.state_dict().items()}
    network.restore()
    save_file(state, tmp_path / "a.safetensors")
    delta = formats.read(tmp_path / "a.safetensors", base)
    assert set(delta.kinds) <= kinds and {*kinds} - {"krona"} <= {*delta.kinds}
    plain = answers(base)
    with Attachment(base.parts, delta):
        ours = answers(base)
    touched = {patch.site.module for patch in delta}
    assert len(touched) >= 4
    for name in LAYERS:
        assert (difference(theirs[name], plain[name]) > 1e-3) == (name in touched)
        assert difference(ours[name], theirs[name]) <= 1e-5, name


def test_what_is_none_of_ours_is_named(base: Base, tmp_path: Path) -> None:
    name = f"lycoris_{BLOCK.replace('.', '_')}_attn2_to_k"
    tensors = {f"{name}.q_layer.weight": torch.zeros(2, 32), f"{name}.p_layer.weight": torch.zeros(16, 2)}
    save_file({**tensors, f"{name}.lambda_layer": torch.ones(1, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(DeltaError, match="no method here reads 'lambda_layer', 'p_layer.weight', 'q_layer.weight'"):
        formats.read(tmp_path / "a.safetensors", base)
