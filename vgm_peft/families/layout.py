"""The published layout of a kind of base: the configuration of every component, enough to build or convert one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgm_peft.families.clip import clip_tokenizer

if TYPE_CHECKING:
    from torch import nn

BETAS: Mapping[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
"""The noise schedule that all Stable Diffusion bases were trained on."""


@dataclass(frozen=True)
class Layout:
    """Configurations by component, in the words of diffusers and transformers."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    texts: Mapping[str, tuple[str, Mapping[str, Any]]]
    """Text encoder part -> class of transformers, values of its CLIPTextConfig."""
    scheduler: tuple[str, Mapping[str, Any]]
    pads: Mapping[str, str] = field(default_factory=dict[str, str])
    """Text encoder part -> padding token, where it is not the end token."""

    def build(self) -> "dict[str, nn.Module]":
        """Build the parts that hold sites; under `torch.device("meta")` this costs nothing."""
        import transformers
        from diffusers import UNet2DConditionModel

        encoders = {part: getattr(transformers, kind)(_text_config(values)) for part, (kind, values) in self.texts.items()}
        make: Any = UNet2DConditionModel
        return {"unet": make(**self.unet), **encoders}

    def write(self, folder: Path, pipeline: str) -> None:
        """Write the configurations of a whole pipeline as a diffusers folder without weights."""
        index: dict[str, Any] = {
            "_class_name": pipeline,
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "scheduler": ["diffusers", self.scheduler[0]],
        }
        _write(folder / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", **self.unet})
        _write(folder / "vae" / "config.json", {"_class_name": "AutoencoderKL", **self.vae})
        _write(folder / "scheduler" / "scheduler_config.json", {"_class_name": self.scheduler[0], **BETAS, **self.scheduler[1]})
        for part, (kind, values) in self.texts.items():
            tokenizer = part.replace("text_encoder", "tokenizer")
            index |= {part: ["transformers", kind], tokenizer: ["transformers", "CLIPTokenizer"]}
            _text_config(values).save_pretrained(folder / part)
            clip_tokenizer(self.pads.get(part)).save_pretrained(str(folder / tokenizer))
        _write(folder / "model_index.json", index)


def _text_config(values: Mapping[str, Any]) -> Any:
    from transformers import CLIPTextConfig

    make: Any = CLIPTextConfig
    return make(**{"vocab_size": 49408, "max_position_embeddings": 77, **values})


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")
