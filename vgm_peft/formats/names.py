"""The name of a tensor in a foreign file, cut in two: the module as it is spelled there, and what the tensor is to it.

kohya's names have no dot before the second half, so that any second half is cut off safely. Names with dots in the module
are cut by the second halves that are known. Of one meaning there are many spellings; here they become LyCORIS' suffixes,
which the rest of the room speaks: `lora_A.weight`, `lora.down.weight` and `_lora.down.weight` are `lora_down.weight`.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from vgm_peft.errors import DeltaError
from vgm_peft.formats.vocabulary import Suffixes
from vgm_peft.header import Header, listed, shown

UP, DOWN, MID, ALPHA = "lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha"
MAGNITUDE, BIAS = "dora_scale", "lora_up.bias"
BUNDLED = "bundle_emb."
"""Before the rows of a token that travels in a file of weights."""
LARGEST_ALPHA = 1e9
"""No tool writes a larger one; with it values would overflow far from here."""
FLAT = ("lora_", "lycoris_", "oft_unet_", "oft_te")
"""How names begin whose modules have no dots."""

_FLAT = re.compile(r"(?P<module>(?:" + "|".join(FLAT) + r")\w*)\.(?P<suffix>.+)")
_SPELLED: Mapping[str, str] = {
    r"\.lora_A(?:\.\w+)?\.weight": DOWN,
    r"\.lora_B(?:\.\w+)?\.weight": UP,
    r"\.lora_B(?:\.\w+)?\.bias": BIAS,
    r"(?:\.lora|\.lora_linear_layer|_lora)\.down\.weight": DOWN,
    r"(?:\.lora|\.lora_linear_layer|_lora)\.up\.weight": UP,
    r"(?:\.lora|\.lora_linear_layer|_lora)?\.alpha": ALPHA,
    r"\.lora_magnitude_vector(?:\.\w+){0,2}": MAGNITUDE,
}
"""How a suffix is spelled at the end of a name -> LyCORIS' word for it."""
_PLAIN = re.compile(
    r"(?P<module>.+?)\.(?P<suffix>lora_(?:down|up|mid)\.weight|hada_\w+|lokr_\w+|dora_scale|rescale|on_input|diff|diff_b"
    r"|[wb]_norm|[ab][12]\.weight|oft_blocks|oft_diag|oft_R\.(?:weight|scaled_oft)|boft_[Rs]|hra_u|ia3_l|vera_lambda_[bd]"
    r"|fourierft_spectrum|c3a_kernel|set_weight|reshape_weight|bias_(?:indices|values|size))"
)
_ENDS = [(re.compile(f"(?P<module>.+?)(?:{end})"), suffix) for end, suffix in _SPELLED.items()]


def cut(name: str) -> tuple[str, str] | None:
    """Return module and suffix, or None for a name that is no delta's."""
    flat = _FLAT.fullmatch(name)
    if flat and not flat["suffix"].startswith("lora."):
        return flat["module"], next(
            (word for end, word in _SPELLED.items() if re.fullmatch(end, f".{flat['suffix']}")), flat["suffix"]
        )
    for end, suffix in _ENDS:
        match = end.fullmatch(name)
        if match:
            return _module(match["module"]), suffix
    match = _PLAIN.fullmatch(name)
    return (match["module"], match["suffix"]) if match else None


def _module(module: str) -> str:
    """Return a module without the attention processor that diffusers once had in it."""
    return re.sub(r"\.processor\.to_out$", ".to_out.0", module).replace(".processor.", ".")


def by_module(tensors: Mapping[str, Tensor], header: Header) -> dict[str, Suffixes]:
    """Sort a file's tensors by the modules they name. Raises `DeltaError` for names that are no delta's, and for doubles."""
    strange = [name for name in tensors if cut(name) is None]
    if strange:
        raise DeltaError(
            f"{header.path}: {len(strange)} of {len(tensors)} tensors are no delta's ({listed(strange)})",
            expected="names that end as those of LoRA, LyCORIS, diffusers or peft do",
        )
    named: dict[str, Suffixes] = {}
    for name, tensor in tensors.items():
        module, suffix = cut(name) or (name, "")
        if suffix in named.setdefault(module, {}):
            raise DeltaError(f"{header.path}: {shown(module)} has two tensors for {shown(suffix)}", expected="one")
        if suffix in (UP, DOWN, MID) and tensor.dim() < 2:
            raise DeltaError(f"{header.path}: {shown(name)} has {tensor.dim()} axes", expected="2 or more")
        if suffix == ALPHA and not (tensor.numel() == 1 and abs(float(tensor)) <= LARGEST_ALPHA):
            found = f"{float(tensor):.6g}" if tensor.numel() == 1 else f"{tensor.numel()} numbers"
            raise DeltaError(f"{header.path}: {shown(name)} is {found}", expected=f"one number up to {LARGEST_ALPHA:.0e}")
        named[module][suffix] = tensor.flatten() if suffix == MAGNITUDE and "magnitude" in name else tensor
    return named
