"""Reading the files of other tools in which every tensor is named by its module: kohya's, LyCORIS', diffusers', OneTrainer's,
ai-toolkit's, ComfyUI's, and mixtures of them. What they differ in is spelling, and that is looked up, not guessed:

- `names`: the name of a tensor is cut into module and suffix;
- `books`: the modules are looked up under every prefix and block naming that is known, and so the family is found;
- `placing`: a tensor that is several of our layers is cut into theirs;
- `vocabulary`: the suffixes of one module are offered to the methods, which know what they mean.

Alphas stand beside the tensors (a missing one is the rank, so no scaling), or in `lora_adapter_metadata`. Tokens may travel
along (`bundle_emb.`). Every tensor is used, or named in the error.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from vgm_peft.delta import Delta
from vgm_peft.errors import DeltaError
from vgm_peft.family import Base
from vgm_peft.formats import bundled
from vgm_peft.formats.books import Reading, assemble, choose_book
from vgm_peft.formats.canonical import read_values
from vgm_peft.formats.names import ALPHA, BIAS, BUNDLED, DOWN, FLAT, by_module, cut
from vgm_peft.formats.placing import place, without_empty_ranks
from vgm_peft.formats.settings import ADAPTER, Settings, parse
from vgm_peft.formats.vocabulary import Suffixes
from vgm_peft.header import Header, listed

SCALED_ROTATION = "oft_R.scaled_oft"
"""OneTrainer's mark: the values of `oft_R.weight` are meant divided by twice the root of the block's size less one."""


def is_flat(header: Header) -> bool:
    """Say whether any name is in kohya's manner, without dots in the module."""
    return any(name.startswith((*FLAT, BUNDLED)) for name in header.tensors)


def is_dotted(header: Header) -> bool:
    """Say whether any name is in diffusers' manner, the module's path with its dots."""
    return any("." in split[0] for split in map(cut, header.tensors) if split)


def read(header: Header, base: Base | None = None) -> Delta:
    """Read a file of any of these tools. Raises `DeltaError` when one tensor is not understood."""
    where = str(header.path)
    tensors = read_values(header)
    tokens = {name: tensor for name, tensor in tensors.items() if name.startswith(BUNDLED)}
    named = by_module({name: tensor for name, tensor in tensors.items() if name not in tokens}, header)
    if not named:
        return bundled.alone(tokens, base, header)
    reading = choose_book(named, base, where, header.metadata.get("ss_base_model_version", ""))
    named = _scaled(named, reading, header)
    simple = {name: plain(without_empty_ranks(found) if "." in name else found) for name, found in named.items()}
    groups = place(simple, reading, where)
    metadata = {key: text for key, text in header.metadata.items() if key != ADAPTER}
    delta = assemble(reading.book, groups, where, metadata)
    delta.words.update(bundled.words(tokens, reading.book, header))
    return delta


def _scaled(named: Mapping[str, Suffixes], reading: Reading, header: Header) -> dict[str, Suffixes]:
    """Return the modules with the alphas that a file of diffusers keeps in its metadata, as peft's settings of each part."""
    if ADAPTER not in header.metadata:
        return dict(named)
    table = parse(header.metadata[ADAPTER], f"{header.path}: damaged: its {ADAPTER}")
    family = reading.book.family
    lost = [key for key in table if key.partition(".")[0] not in family.parts]
    if lost:  # diffusers begins every key with a part, so an alpha may be among them that would be passed over
        raise DeltaError(
            f"{header.path}: {len(lost)} keys of its {ADAPTER} belong to no part of {family.name} ({listed(lost)})",
            expected="keys such as " + ", ".join(f"{part}.r" for part in family.parts),
            fix="export it again with the tool that wrote it",
        )
    settings: dict[str, Settings] = {}
    for part in family.parts:
        own = {key.removeprefix(f"{part}."): value for key, value in table.items() if key.startswith(f"{part}.")}
        settings[part] = Settings(own, f"{header.path}: {ADAPTER} of {part}")
    out: dict[str, Suffixes] = {}
    for name, tensors in named.items():
        part, module = reading.find(name)[0].place
        out[name] = settings[part].scaled(module, tensors)
    return out


def plain(tensors: Suffixes) -> Suffixes:
    """Return a module's tensors without what is only another way to say the same."""
    tensors = dict(tensors)
    if BIAS in tensors and DOWN in tensors:  # peft's `lora_bias`
        rank = len(tensors[DOWN])
        alpha = float(tensors[ALPHA]) if ALPHA in tensors and tensors[ALPHA].numel() == 1 else 0.0
        tensors["diff_b"] = tensors.pop(BIAS) * ((alpha or rank) / rank)
    if SCALED_ROTATION in tensors and "oft_R.weight" in tensors:
        mark, values = tensors.pop(SCALED_ROTATION), tensors["oft_R.weight"]
        if bool(mark.any()) and values.dim() == 2:
            tensors["oft_R.weight"] = values / (2 * (_side(values) - 1) ** 0.5)
    return tensors


def _side(triangles: Tensor) -> float:
    """Return the size of the blocks whose triangles have so many values: n (n - 1) / 2."""
    return float((1 + torch.tensor(1.0 + 8 * triangles.shape[1]).sqrt()) / 2)
