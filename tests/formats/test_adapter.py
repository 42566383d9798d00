"""Folders as peft saves them, made by peft itself on a tiny U-Net, mean the same here: dW by dW with what peft merges."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.formats.ground import difference
from tests.stack_makers import make_delta
from vgm_peft import formats
from vgm_peft.attachment import Fusion
from vgm_peft.errors import DeltaError
from vgm_peft.family import Base

peft: Any = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "Failed to load the CUDA extension",
        "Setting boft_n_butterfly_factor",
        "Unsupported layer type",
        "Adapter 'default'.* invalid shape",
        "`is_gradient_checkpointing` is deprecated",
    )
]
Make = Callable[[str], Base]
BLOCK = "mid_block.attentions.0.transformer_blocks.0"
LINEAR = [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.ff.net.2"]
ALL = [*LINEAR, "mid_block.resnets.0.conv1", "mid_block.attentions.0.proj_in"]

CASES: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: peft.LoraConfig(r=4, lora_alpha=3, target_modules=ALL),
    "LoRA, rank-stabilised, by name": lambda: peft.LoraConfig(
        r=4, lora_alpha=3, use_rslora=True, target_modules=ALL, rank_pattern={"to_q": 2}, alpha_pattern={"attn1.to_q": 5}
    ),
    "DoRA": lambda: peft.LoraConfig(r=4, lora_alpha=3, use_dora=True, target_modules=ALL),
    "LoRA and biases": lambda: peft.LoraConfig(r=4, lora_alpha=3, bias="lora_only", lora_bias=True, target_modules=ALL[2:]),
    "LoRA and a whole layer": lambda: peft.LoraConfig(r=2, target_modules=LINEAR, modules_to_save=["conv_in"]),
    "LoHa": lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=ALL),
    "LoHa, Tucker": lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=ALL, use_effective_conv2d=True),
    "LoKr, both decomposed": lambda: peft.LoKrConfig(r=1, alpha=3, target_modules=ALL, decompose_both=True),
    "LoKr, Tucker": lambda: peft.LoKrConfig(r=1, alpha=3, target_modules=ALL, use_effective_conv2d=True),
    "LoKr, two full factors": lambda: peft.LoKrConfig(
        r=16, alpha=3, target_modules=ALL, rank_pattern={"conv1": 20}, alpha_pattern={"conv1": 5}
    ),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=[*LINEAR, ALL[4]]),
    "OFT, exact, shared": lambda: peft.OFTConfig(
        r=0, oft_block_size=4, use_cayley_neumann=False, block_share=True, target_modules=LINEAR
    ),
    "OFT, longer series": lambda: peft.OFTConfig(r=0, oft_block_size=4, num_cayley_neumann_terms=8, target_modules=LINEAR),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=LINEAR),
    "HRA": lambda: peft.HRAConfig(r=4, target_modules=ALL),
    "HRA, orthogonal": lambda: peft.HRAConfig(r=4, apply_GS=True, target_modules=ALL),
    "IA3": lambda: peft.IA3Config(target_modules=ALL, feedforward_modules=[LINEAR[2], ALL[4]]),
    "VeRA": lambda: peft.VeraConfig(r=6, target_modules=LINEAR),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=20, scaling=60.0, random_loc_seed=5, target_modules=LINEAR),
    "C3A": lambda: peft.C3AConfig(block_size=4, target_modules=LINEAR),
    "norms": lambda: peft.LNTuningConfig(target_modules=[f"{BLOCK}.norm1", f"{BLOCK}.norm3"]),
}


def piece(base: Base) -> nn.Module:
    """A few modules of a U-Net under their own names: peft walks all there are, many times."""
    unet: Any = base.denoiser
    return nn.ModuleDict({"conv_in": unet.conv_in, "mid_block": unet.mid_block})


def trained(config: Any, network: Any, folder: Path) -> dict[str, Tensor]:
    """Save an adapter with random values in a folder, and return what peft makes of the network's tensors with it."""
    model = peft.get_peft_model(copy.deepcopy(network), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model.merge_and_unload().state_dict()


@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_peft_means_what_peft_merges(shared: Make, case: str, tmp_path: Path) -> None:
    base = shared("sd15")
    network = piece(base)
    merged = trained(CASES[case](), network, tmp_path)
    assert formats.sniff(tmp_path) == "peft"
    delta = formats.read(tmp_path, base)
    changed: set[str] = set()
    for name, before in network.state_dict().items():
        change = merged[name] - before
        patch = delta.patches.get(f"unet.{name}")
        if bool(change.any()):
            changed.add(f"unet.{name}")
            assert patch is not None, name
            assert difference(patch.change(before), change) <= 1e-5, name
        else:
            assert patch is None or not bool(patch.change(before).any()), name
    assert len(changed) >= 3


def test_what_refers_to_the_base_means_the_base_alone_whatever_is_fused_into_it(shared: Make, tmp_path: Path) -> None:
    base = shared("sd15")
    trained(CASES["LoRA and a whole layer"](), piece(base), tmp_path)
    plain = formats.read(tmp_path, base).patches["unet.conv_in.weight"]
    other = make_delta(base, "diff", preset="all")
    with Fusion(base.parts, [(other, 1.0)]):
        fused = formats.read(tmp_path, base).patches["unet.conv_in.weight"]
    assert torch.equal(dict(plain.named_parameters())["diff"], dict(fused.named_parameters())["diff"])


def test_a_text_encoder_is_told_by_its_modules_and_two_of_a_kind_by_the_folder(shared: Make, tmp_path: Path) -> None:
    base = shared("sdxl")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    for part in ("text_encoder", "text_encoder_2"):
        trained(config, base.parts[part], tmp_path / part)
        assert formats.read(tmp_path / part, base).parts == (part,)
    trained(config, base.parts["text_encoder_2"], tmp_path / "anything")  # has a layer more than the other
    assert formats.read(tmp_path / "anything", base).parts == ("text_encoder_2",)


def changed(folder: Path, **settings: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base's own weights"),
        ({"use_qalora": True}, "use_qalora"),
        ({"lora_alpha": "8"}, "expected a number"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "names of layers"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING.*one of LORA"),
        ({"peft_type": "BOFT"}, "'lora_down.weight', 'lora_up.weight' is not of the kind"),
    ],
)
def test_settings_that_mean_something_else_are_refused(
    shared: Make, settings: dict[str, object], message: str, tmp_path: Path
) -> None:
    base = shared("sd15")
    trained(peft.LoraConfig(r=2, target_modules=LINEAR), piece(base), tmp_path)
    changed(tmp_path, **settings)
    with pytest.raises(DeltaError, match=message):
        formats.read(tmp_path, base)


def test_what_is_missing_or_left_over_is_named(shared: Make, tmp_path: Path) -> None:
    base = shared("sd15")
    trained(peft.LoraConfig(r=2, target_modules=LINEAR), piece(base), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "base_model.model.prompt_embeddings": torch.zeros(2)}, file)
    with pytest.raises(DeltaError, match="prompt_embeddings"):
        formats.read(tmp_path, base)
    save_file({**tensors, "base_model.model.conv_in.weight": torch.zeros(2)}, file)
    with pytest.raises(DeltaError, match=r"unet.conv_in.weight \(2,\) fits nothing"):
        formats.read(tmp_path, base)
    save_file({**tensors, "base_model.model.conv_in.weight": torch.zeros(8, 4, 3, 3)}, file)
    with pytest.raises(DeltaError, match="whole weight of unet.conv_in.*name the base"):
        formats.read(tmp_path)
    save_file({**tensors, "base_model.vera_C": torch.zeros(2)}, file)
    with pytest.raises(DeltaError, match="belong to nothing.*vera_C"):
        formats.read(tmp_path, base)
    save_file(tensors, file)
    (tmp_path / "adapter_config.json").write_text("[1]")
    with pytest.raises(DeltaError, match="cannot be read; expected a JSON table"):
        formats.read(tmp_path, base)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(DeltaError, match="alpha is in its adapter_config.json"):
        formats.read(tmp_path, base)
