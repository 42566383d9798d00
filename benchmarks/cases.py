"""The methods that `methods.py` measures, and what says the same settings to peft and LyCORIS."""

from dataclasses import dataclass, field
from typing import Any

Options = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One method: settings here, and what says the same to the others (`None`: they do not have it)."""

    kind: str
    options: Options = field(default_factory=dict[str, Any])
    target: float | None = None
    """Step time over LoRA's that is wanted (issue 3, "Cost")."""
    peft: tuple[str, Options] | None = None
    lycoris: tuple[str, Options] | None = None


def cases() -> dict[str, Case]:
    """Defaults where they fit Toybox's narrow layers (32 to 256 wide), else the nearest that do."""
    r8: Options = {"r": 8, "lora_alpha": 8}
    ly8: Options = {"lora_dim": 8, "alpha": 8}
    apart: Options = {"weight_decompose": True, "wd_on_out": True}
    return {
        "lora": Case("lora", target=1.0, peft=("LoraConfig", r8), lycoris=("locon.LoConModule", ly8)),
        "dora": Case(
            "dora",
            target=1.25,
            peft=("LoraConfig", {**r8, "use_dora": True}),
            lycoris=("locon.LoConModule", {**ly8, "weight_decompose": True}),
        ),
        "pissa": Case("pissa", target=1.1, peft=("LoraConfig", {**r8, "init_lora_weights": "pissa"})),
        "dylora": Case("dylora", target=1.1, lycoris=("dylora.DyLoraModule", {**ly8, "block_size": 1})),
        "tlora": Case("tlora", target=1.1),
        "krona": Case("krona", target=1.1),
        "lokr": Case(
            "lokr",
            target=1.1,
            peft=("LoKrConfig", {"r": 4, "alpha": 4}),
            lycoris=("lokr.LokrModule", {"lora_dim": 4, "alpha": 4}),
        ),
        "loha": Case(
            "loha",
            {"rank": 4},
            1.25,
            ("LoHaConfig", {"r": 4, "alpha": 1}),
            ("loha.LohaModule", {"lora_dim": 4, "alpha": 1}),
        ),
        "lokr-decomposed": Case(
            "lokr", {"decompose": "output"}, 1.25, lycoris=("lokr.LokrModule", {"lora_dim": 4, "alpha": 4, **apart})
        ),
        "loha-decomposed": Case(
            "loha", {"rank": 4, "decompose": "output"}, 1.25, lycoris=("loha.LohaModule", {"lora_dim": 4, "alpha": 1, **apart})
        ),
        "oft": Case("oft", {"block": 4}, 1.1, lycoris=("diag_oft.DiagOFTModule", {"lora_dim": 4})),
        "oft-input": Case("oft", {"side": "input", "terms": 5}, 1.1, ("OFTConfig", {"oft_block_size": 32})),
        "boft": Case(
            "boft",
            target=1.25,
            peft=("BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 4}),
            lycoris=("boft.ButterflyOFTModule", {"lora_dim": 4}),
        ),
        "hra": Case("hra", target=1.25, peft=("HRAConfig", {"r": 8})),
        "glora": Case("glora", target=1.1, lycoris=("glora.GLoRAModule", {"lora_dim": 4, "alpha": 4})),
        "ia3": Case("ia3", target=1.1, peft=("IA3Config", {"feedforward_modules": []}), lycoris=("ia3.IA3Module", {})),
        "diff": Case("diff", target=1.6, lycoris=("full.FullModule", {})),
        "bitfit": Case("bitfit", target=1.1),
        "norm": Case("norm", target=1.1, peft=("LNTuningConfig", {}), lycoris=("norms.NormModule", {})),
        "difffit": Case("difffit", target=1.1),
        "svdiff": Case("svdiff", target=1.6),
        "vera": Case("vera", {"rank": 64}, peft=("VeraConfig", {"r": 64})),
        "fourierft": Case("fourierft", peft=("FourierFTConfig", {"n_frequency": 1000})),
        "c3a": Case("c3a", {"block": 32}, peft=("C3AConfig", {"block_size": 32, "init_weights": True})),
    }
