"""What the tensors of Stable Diffusion bases are called in a single file in the original (LDM) layout, and how they are cut.

A U-Net's names are those of `spelling`. CLIP text encoders of OpenAI's make keep the names of transformers; those of
OpenCLIP have their own, with the three projections of an attention layer in one tensor.
"""

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass

from torch import Tensor

UNET = "model.diffusion_model."
CLIP = {
    "text_encoder": ("cond_stage_model.transformer.text_model.", "conditioner.embedders.0.transformer.text_model."),
}
OPEN_CLIP = {
    "text_encoder": ("cond_stage_model.model.",),
    "text_encoder_2": ("conditioner.embedders.1.model.",),
}
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
_IN_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OUTSIDE = {
    ("embeddings.token_embedding", "weight"): "token_embedding.weight",
    ("embeddings.position_embedding", "weight"): "positional_embedding",
    ("final_layer_norm", "weight"): "ln_final.weight",
    ("final_layer_norm", "bias"): "ln_final.bias",
    ("text_projection", "weight"): "text_projection",
}
_FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Cut:
    """Which part of a stored tensor a site is: one third of its rows, by number, or all of it transposed, or all of it."""

    third: int | None = None
    transposed: bool = False

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The site's shape."""
        if self.third is not None:
            return (stored[0] // 3, *stored[1:])
        return stored[::-1] if self.transposed else stored

    def of(self, stored: Tensor) -> Tensor:
        """The site's values: a view, so that writing to it writes to `stored`."""
        if self.third is not None:
            return stored.chunk(3)[self.third]
        return stored.T if self.transposed else stored


WHOLE = Cut()


@dataclass(frozen=True)
class Original:
    """A tensor of a single file, and the cut of it."""

    key: str
    cut: Cut = WHOLE


def original_name(part: str, module: str, tensor: str, unet: Mapping[str, str], stored: Container[str]) -> Original | None:
    """Find a site's tensor among those stored; `unet` maps the U-Net's modules to their original names."""
    names = [Original(f"{prefix}{module}.{tensor}") for prefix in CLIP.get(part, ())]
    if module in unet:
        names.append(Original(f"{UNET}{unet[module]}.{tensor}"))
    inner = _open_clip(module, tensor)
    if inner is not None:
        names += [Original(prefix + inner.key, inner.cut) for prefix in OPEN_CLIP.get(part, ())]
    return next((name for name in names if name.key in stored), None)


def _open_clip(module: str, tensor: str) -> Original | None:
    match = _LAYER.fullmatch(module)
    if match is None:
        name = _OUTSIDE.get((module, tensor))
        return None if name is None else Original(name, Cut(transposed=name == "text_projection"))
    block = f"transformer.resblocks.{match[1]}."
    if match[2] in _FUSED:
        return Original(f"{block}attn.in_proj_{tensor}", Cut(third=_FUSED.index(match[2])))
    return Original(f"{block}{_IN_LAYER[match[2]]}.{tensor}") if match[2] in _IN_LAYER else None
