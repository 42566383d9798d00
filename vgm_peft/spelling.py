"""The original (LDM) names of a U-Net's modules, computed from the block structure found in the diffusers names.

The original code numbers its input and output blocks in one row, whatever the level; diffusers numbers levels, and
within a level resnets, attentions and samplers. Any number of levels, and of layers in each, is mapped; of a copy of the
encoder, the part that it has.
"""

import re
from collections.abc import Iterable

_WHOLE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_MIDDLE = {"resnets.0": "middle_block.0", "attentions.0": "middle_block.1", "resnets.1": "middle_block.2"}
_PLACE = re.compile(r"((?:down_blocks|up_blocks)\.\d+|mid_block)\.((?:resnets|attentions|downsamplers|upsamplers)\.\d+)\.(.+)")


def unet_spellings(modules: Iterable[str]) -> dict[str, str]:
    """Map diffusers module paths of one whole U-Net, or its encoder, to the original ones; one that has none is left out."""
    modules = tuple(dict.fromkeys(modules))
    found = {(match[1], match[2]) for match in map(_PLACE.fullmatch, modules) if match}
    homes = _number(found)
    names: dict[str, str] = {}
    for module in modules:
        match = _PLACE.fullmatch(module)
        if module in _WHOLE:
            names[module] = _WHOLE[module]
        elif match and (home := homes.get((match[1], match[2]))):
            kind, inner = match[2].split(".")[0], match[3]
            if kind == "downsamplers":
                inner = "op"
            names[module] = f"{home}.{_RESNET.get(inner, inner) if kind == 'resnets' else inner}"
    return names


def _number(found: set[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Give every resnet, attention and sampler its place in the original row of blocks."""
    homes = {("mid_block", ours): theirs for ours, theirs in _MIDDLE.items()}
    for side, row, index in (("down_blocks", "input_blocks", 1), ("up_blocks", "output_blocks", 0)):
        for level in range(_count(found, side)):
            block = f"{side}.{level}"
            attends = (block, "attentions.0") in found
            for layer in range(sum(b == block and place.startswith("resnets.") for b, place in found)):
                homes[block, f"resnets.{layer}"] = f"{row}.{index}.0"
                homes[block, f"attentions.{layer}"] = f"{row}.{index}.1"
                index += 1
            if (block, "downsamplers.0") in found:
                homes[block, "downsamplers.0"] = f"{row}.{index}.0"
                index += 1
            # An upsampler has no number of its own: it closes the level's last block.
            homes[block, "upsamplers.0"] = f"{row}.{index - 1}.{2 if attends else 1}"
    return homes


def _count(found: set[tuple[str, str]], side: str) -> int:
    return 1 + max((int(block.split(".")[1]) for block, _ in found if block.startswith(side)), default=-1)
