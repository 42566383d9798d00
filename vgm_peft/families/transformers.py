"""Families known by their names only, so that files for them are told and read: Stable Diffusion 3 and FLUX.1.

Nothing here draws with them. A key table is all it takes to read a family's deltas: which module of the authors' own code
is which of diffusers', and which rows, for the authors keep query, key and value in one tensor. Sources: Esser et al. 2024
(arXiv 2403.03206) for SD3, Black Forest Labs' `flux` for FLUX.1; names as in diffusers' converters of whole checkpoints.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import nn

from vgm_peft.families.clip import CLIP_G, CLIP_L, text_prefixes
from vgm_peft.family import KeyTable, Naming, Place, Share
from vgm_peft.site import Site

PREFIXES = (
    "lora_unet",
    "transformer",
    "lora_transformer",
    "diffusion_model",
    "model_diffusion_model",
    "transformer_base_model_model",
)
"""What tools write before a transformer's modules: kohya; diffusers and ai-toolkit; OneTrainer; ComfyUI; checkpoints; peft."""
T5_XXL: Mapping[str, Any] = {
    "d_model": 4096,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
}
"""The encoder of T5 v1.1 XXL (Raffel et al. 2019, arXiv 1910.10683)."""
QKV = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")

SD3_NAMES: Mapping[str, Sequence[str]] = {
    "x_embedder.proj": ["pos_embed.proj"],
    "context_embedder": ["context_embedder"],
    "t_embedder.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": ["time_text_embed.timestep_embedder.linear_2"],
    "y_embedder.mlp.0": ["time_text_embed.text_embedder.linear_1"],
    "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
    "joint_blocks.#.x_block.attn.qkv": [f"transformer_blocks.#.attn.{name}" for name in QKV],
    "joint_blocks.#.context_block.attn.qkv": [f"transformer_blocks.#.attn.{name}" for name in ADDED],
    "joint_blocks.#.x_block.attn2.qkv": [f"transformer_blocks.#.attn2.{name}" for name in QKV],
    "joint_blocks.#.x_block.attn.proj": ["transformer_blocks.#.attn.to_out.0"],
    "joint_blocks.#.x_block.attn2.proj": ["transformer_blocks.#.attn2.to_out.0"],
    "joint_blocks.#.context_block.attn.proj": ["transformer_blocks.#.attn.to_add_out"],
    "joint_blocks.#.x_block.mlp.fc1": ["transformer_blocks.#.ff.net.0.proj"],
    "joint_blocks.#.x_block.mlp.fc2": ["transformer_blocks.#.ff.net.2"],
    "joint_blocks.#.context_block.mlp.fc1": ["transformer_blocks.#.ff_context.net.0.proj"],
    "joint_blocks.#.context_block.mlp.fc2": ["transformer_blocks.#.ff_context.net.2"],
    "joint_blocks.#.x_block.adaLN_modulation.1": ["transformer_blocks.#.norm1.linear"],
    "joint_blocks.#.context_block.adaLN_modulation.1": ["transformer_blocks.#.norm1_context.linear"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "final_layer.linear": ["proj_out"],
}
FLUX_NAMES: Mapping[str, Sequence[str]] = {
    "img_in": ["x_embedder"],
    "img_in.proj": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    "double_blocks.#.img_attn.qkv": [f"transformer_blocks.#.attn.{name}" for name in QKV],
    "double_blocks.#.txt_attn.qkv": [f"transformer_blocks.#.attn.{name}" for name in ADDED],
    "double_blocks.#.img_attn.proj": ["transformer_blocks.#.attn.to_out.0"],
    "double_blocks.#.txt_attn.proj": ["transformer_blocks.#.attn.to_add_out"],
    "double_blocks.#.img_mlp.0": ["transformer_blocks.#.ff.net.0.proj"],
    "double_blocks.#.img_mlp.2": ["transformer_blocks.#.ff.net.2"],
    "double_blocks.#.txt_mlp.0": ["transformer_blocks.#.ff_context.net.0.proj"],
    "double_blocks.#.txt_mlp.2": ["transformer_blocks.#.ff_context.net.2"],
    "double_blocks.#.img_mod.lin": ["transformer_blocks.#.norm1.linear"],
    "double_blocks.#.txt_mod.lin": ["transformer_blocks.#.norm1_context.linear"],
    "single_blocks.#.linear1": [f"single_transformer_blocks.#.{name}" for name in (*(f"attn.{n}" for n in QKV), "proj_mlp")],
    "single_blocks.#.linear1_qkv": [f"single_transformer_blocks.#.attn.{name}" for name in QKV],
    "single_blocks.#.linear2": ["single_transformer_blocks.#.proj_out"],
    "single_blocks.#.modulation.lin": ["single_transformer_blocks.#.norm.linear"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "final_layer.linear": ["proj_out"],
}
"""The authors' module -> diffusers' modules, whose rows it holds one after the other; `#` is a block's number. Of several
names for one module the first is written."""


class NamedTransformer(Naming):
    """A family whose denoiser is a transformer of diffusers, known by the names of its modules."""

    native: ClassVar[Mapping[str, Sequence[str]]]
    """The authors' module -> diffusers' modules."""

    def key_table(self, sites: Sequence[Site]) -> KeyTable:
        """Spell the modules as kohya does: the transformer's by the authors' names where one of theirs is one of ours."""
        weights = {(site.part, site.module): site for site in sites if site.tensor == "weight"}
        kohya = {place: f"{self.prefixes[place[0]][0]}_{_inner(place)}".replace(".", "_") for place in weights}
        aliases: dict[str, Place] = {}
        fused: dict[str, tuple[Share, ...]] = {}
        written: set[Place] = set()
        for theirs, ours in self._numbered(weights):
            name = f"{self.prefixes[self.denoiser][0]}_{theirs}".replace(".", "_")
            places = [(self.denoiser, module) for module in ours]
            if len(places) > 1:
                fused[name] = _in_a_row([weights[place] for place in places])
                aliases |= {f"{name}_{number}": place for number, place in enumerate(places)}  # OMI's
            elif swaps(weights[places[0]]):
                half = weights[places[0]].rows // 2
                fused[name] = (Share(places[0], (range(half, 2 * half), range(half))),)
            elif places[0] in written:
                aliases[name] = places[0]
            else:
                aliases[kohya[places[0]]] = places[0]
                kohya[places[0]] = name
                written.add(places[0])
        # What the authors have in one tensor with others cannot be written by itself in a way that all tools read.
        cut = {share.place for shares in fused.values() for share in shares}
        return KeyTable({place: name for place, name in kohya.items() if place not in cut}, aliases, fused)

    def _numbered(self, weights: Mapping[Place, Site]) -> Iterator[tuple[str, list[str]]]:
        """Return the lines of `native` for the blocks that there are."""
        numbers = sorted({int(word) for _, module in weights for word in module.split(".")[1:2] if word.isdecimal()})
        for theirs, ours in self.native.items():
            for number in numbers if "#" in theirs else [0]:
                modules = [name.replace("#", str(number)) for name in ours]
                if all((self.denoiser, module) in weights for module in modules):
                    yield theirs.replace("#", str(number)), modules


class StableDiffusion3(NamedTransformer):
    """Stable Diffusion 3 and 3.5: CLIP-L, CLIP-G and T5."""

    name: ClassVar[str] = "sd3"
    parts: ClassVar[tuple[str, ...]] = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    prefixes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "transformer": PREFIXES,
        "text_encoder": text_prefixes("text_encoder", ("lora_te1",), ("clip_l",)),
        "text_encoder_2": text_prefixes("text_encoder_2", ("lora_te2",), ("clip_g",)),
        "text_encoder_3": text_prefixes("text_encoder_3", ("lora_te3",), ("t5xxl",)),
    }
    native: ClassVar[Mapping[str, Sequence[str]]] = SD3_NAMES

    def published(self) -> Mapping[str, nn.Module]:
        """Build the 2 billion value model of the first release."""
        return self._sized(24)

    def editions(self) -> Mapping[str, Callable[[], Mapping[str, nn.Module]]]:
        """SD3 medium, and the two of 3.5."""
        dual = {"dual_attention_layers": tuple(range(13)), "pos_embed_max_size": 384}
        return {
            "sd3-medium": self.published,
            "sd3.5-medium": lambda: self._sized(24, qk_norm="rms_norm", **dual),
            "sd3.5-large": lambda: self._sized(38, qk_norm="rms_norm"),
        }

    def _sized(self, layers: int, **more: Any) -> Mapping[str, nn.Module]:
        from diffusers import SD3Transformer2DModel

        build: Any = SD3Transformer2DModel
        width = 64 * layers
        size = {"num_layers": layers, "num_attention_heads": layers, "caption_projection_dim": width, "pos_embed_max_size": 192}
        with torch.device("meta"):
            transformer = build(**{**size, "sample_size": 128, "joint_attention_dim": 4096, "in_channels": 16, **more})
            return {
                "transformer": transformer,
                "text_encoder": _clip("CLIPTextModelWithProjection", CLIP_L),
                "text_encoder_2": _clip("CLIPTextModelWithProjection", CLIP_G),
                "text_encoder_3": _t5(),
            }

    def stamps(self, sites: Sequence[Site], prediction: str | None = None) -> Mapping[str, str]:
        """All are told by one word."""
        return {"ss_base_model_version": "sd3", "ss_v2": "False", "modelspec.architecture": "stable-diffusion-3"}


class Flux(NamedTransformer):
    """FLUX.1: CLIP-L and T5."""

    name: ClassVar[str] = "flux"
    parts: ClassVar[tuple[str, ...]] = ("transformer", "text_encoder", "text_encoder_2")
    prefixes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "transformer": PREFIXES,
        "text_encoder": text_prefixes("text_encoder", ("lora_te1",), ("clip_l",)),
        "text_encoder_2": text_prefixes("text_encoder_2", ("lora_te3", "lora_te2"), ("t5xxl", "t5")),
    }
    native: ClassVar[Mapping[str, Sequence[str]]] = FLUX_NAMES

    def published(self) -> Mapping[str, nn.Module]:
        """Build FLUX.1-dev; schnell has the same modules but one."""
        from diffusers import FluxTransformer2DModel

        build: Any = FluxTransformer2DModel
        with torch.device("meta"):
            return {
                "transformer": build(guidance_embeds=True),
                "text_encoder": _clip("CLIPTextModel", CLIP_L),
                "text_encoder_2": _t5(),
            }

    def stamps(self, sites: Sequence[Site], prediction: str | None = None) -> Mapping[str, str]:
        """All are told by one word."""
        return {"ss_base_model_version": "flux1", "ss_v2": "False", "modelspec.architecture": "flux-1-dev"}


def swaps(site: Site) -> bool:
    """Say whether diffusers keeps a module's two halves, shift and scale, in the other order: the last norms of all."""
    last = site.module == "norm_out.linear" or site.module.endswith(".norm1_context.linear")
    return last and site.rows == 2 * site.columns


def _in_a_row(sites: Sequence[Site]) -> tuple[Share, ...]:
    ends = list(accumulate(site.rows for site in sites))
    return tuple(Share((s.part, s.module), (range(end - s.rows, end),)) for s, end in zip(sites, ends, strict=True))


def _inner(place: Place) -> str:
    """Return a module as kohya spells it inside its part: CLIP's are in `text_model`, but for the projection, and T5's not."""
    part, module = place
    is_clip = part.startswith("text") and module.startswith(("encoder.layers.", "embeddings.", "final_layer_norm"))
    return f"text_model.{module}" if is_clip else module


def _clip(kind: str, values: Mapping[str, Any]) -> nn.Module:
    import transformers

    config: Any = transformers.CLIPTextConfig
    build: Any = getattr(transformers, kind)
    return build(config(**{"vocab_size": 49408, "max_position_embeddings": 77, **values}))


def _t5() -> nn.Module:
    import transformers

    config: Any = transformers.T5Config
    build: Any = transformers.T5EncoderModel
    return build(config(**T5_XXL))
