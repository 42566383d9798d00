"""Our own format: everything of a Delta, bit for bit, and nothing that needs a base to be understood.

One safetensors file in canonical order:

- a tensor `<site>/<parameter>` for every parameter (and persistent buffer) of every patch, in its training dtype, the site
  spelled `part.module.weight` or `.bias`, for example `unet.mid_block.attentions.0.proj_in.weight/down`;
- a tensor `word/<n>/<part>` (vectors, width) for every trained token and text encoder, of a layer-wise one (layers, vectors,
  width);
- metadata, all JSON but the first two: `vgm_peft.version` = `1`; `vgm_peft.family`; `vgm_peft.patches`, a list with one entry
  for all patches of the same kind and options, `{"kind", "options", "sites": [[part, module, op, shape, tensor], ...]}`;
  `vgm_peft.order`, the site names in the delta's own order, left out when that is the order of the entries;
  `vgm_peft.words`, the tokens by n; `vgm_peft.leads`, those that begin every prompt; every other key is the delta's own
  metadata.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from vgm_peft import config
from vgm_peft.delta import Delta, Patch, Word
from vgm_peft.deltas import method_named
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.families import KNOWN
from vgm_peft.family import Base
from vgm_peft.formats.canonical import read_tensors
from vgm_peft.formats.format import Format, Parcel
from vgm_peft.formats.vocabulary import Suffixes
from vgm_peft.header import Header, listed, shown
from vgm_peft.site import Op, Site

VERSION = "1"
PREFIX = "vgm_peft."
AXES: Mapping[str, tuple[int, ...]] = {"linear": (2,), "embedding": (2,), "conv": (3, 4, 5)}
"""How many axes a tensor has that is not a normalisation's or a bias."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""What can be trained in."""


def recognises(header: Header) -> bool:
    """Say whether a file is ours."""
    return f"{PREFIX}version" in header.metadata


def spell(delta: Delta, base: Base | None = None, dtype: torch.dtype | None = None) -> dict[str, Parcel]:
    """Spell a delta as one file. Raises `ConfigError` for another dtype than that of training."""
    if dtype is not None:
        raise ConfigError(
            f"native files keep the dtype of training, not {dtype}", fix="leave --dtype out, or choose another format"
        )
    taken = [key for key in delta.metadata if key.startswith(PREFIX)]
    if taken:
        raise DeltaError(f"metadata {shown(taken[0])}", expected=f"names that do not begin with {PREFIX}")
    tensors = {f"{name}/{key}": value for name, patch in delta.patches.items() for key, value in patch.state_dict().items()}
    for number, word in enumerate(delta.words.values()):
        tensors |= {f"word/{number}/{part}": rows for part, rows in word.rows.items()}
    return {"": Parcel(tensors, {**delta.metadata, **_describe(delta)})}


def _describe(delta: Delta) -> dict[str, str]:
    groups: dict[str, list[Patch]] = {}
    for patch in delta:
        groups.setdefault(_json({"kind": patch.kind, "options": asdict(patch.options)}), []).append(patch)
    patches = [{**json.loads(head), "sites": [_place(patch.site) for patch in group]} for head, group in groups.items()]
    out = {
        f"{PREFIX}version": VERSION,
        f"{PREFIX}family": delta.family,
        f"{PREFIX}patches": _json(patches),
    }
    if [patch.site.name for group in groups.values() for patch in group] != list(delta.patches):
        out[f"{PREFIX}order"] = _json(list(delta.patches))
    if delta.words:
        out[f"{PREFIX}words"] = _json(list(delta.words))
    if any(word.leads for word in delta.words.values()):
        out[f"{PREFIX}leads"] = _json([token for token, word in delta.words.items() if word.leads])
    return out


def _place(site: Site) -> list[object]:
    return [site.part, site.module, site.op, list(site.shape), site.tensor]


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def read(header: Header, base: Base | None = None) -> Delta:
    """Read a file of ours whole. Raises `DeltaError` naming every tensor that is missing or left over."""
    where = header.path
    version = header.metadata[f"{PREFIX}version"]
    if version != VERSION:
        raise DeltaError(f"{where}: written in version {version[:20]}", expected=f"version {VERSION}", fix="update vgm_peft")
    shelves: dict[str, Suffixes] = {}
    for name, tensor in read_tensors(header).items():
        shelf, _, key = name.rpartition("/")
        shelves.setdefault(shelf, {})[key] = tensor
    groups = cast("list[Any]", _table(header, "patches", list))
    try:
        patches = {patch.site.name: patch for group in groups for patch in _patches(group, shelves, where)}
    except (KeyError, TypeError, ValueError) as error:
        raise DeltaError(f"{where}: damaged: the list of patches cannot be read ({error})", fix="save it again") from None
    order = cast("list[str]", _table(header, "order", list, list(patches)))
    if sorted(map(str, order)) != sorted(patches):
        raise DeltaError(f"{where}: damaged: the order of patches names others than there are", fix="save it again")
    words = _words(header, shelves)
    if shelves:
        left = [f"{shelf}/{key}" for shelf, tensors in shelves.items() for key in tensors]
        raise DeltaError(f"{where}: {len(left)} tensors belong to nothing ({listed(left)})", expected="none left over")
    metadata = {key: value for key, value in header.metadata.items() if not key.startswith(PREFIX)}
    family = header.metadata.get(f"{PREFIX}family", "")
    if family not in KNOWN:
        raise DeltaError(f"{where}: a delta of the family {shown(family)}", expected="one of " + ", ".join(KNOWN))
    return Delta(family, {name: patches[name] for name in order}, words, metadata)


def _table(header: Header, key: str, kind: type, default: object = None) -> object:
    text = header.metadata.get(PREFIX + key)
    if text is None and default is not None:
        return default
    try:
        value: object = json.loads(text or "")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        raise DeltaError(f"{header.path}: damaged: {PREFIX}{key} cannot be read", fix="save it again")
    return cast(object, value)


def _patches(group: Mapping[str, Any], shelves: dict[str, Suffixes], where: Path) -> list[Patch]:
    """Restore the patches of one kind and options, taking their tensors off the shelves."""
    try:
        method = method_named(group["kind"])
        options = config.build(method.Options, group["options"], f"{group['kind']}: ")
    except ConfigError as error:
        raise DeltaError(f"{where}: {str(error)[:200]}", fix="update vgm_peft, or use the version that wrote it") from None
    sites = [_site(place) for place in group["sites"]]
    return [_restore(method, options, site, shelves.pop(site.name, {}), where) for site in sites]


def _site(place: list[Any]) -> Site:
    part, module, op, shape, tensor = place
    sound = op in get_args(Op) and tensor in ("weight", "bias") and isinstance(shape, list)
    if not sound or not all(type(n) is int and 0 < n < 2**24 for n in shape) or len(shape) not in AXES.get(op, (1,)):
        raise ValueError(f"no site: {shown(str(place))}")
    return Site(str(part), str(module), op, tuple(shape), tensor)


def _restore(method: type[Patch], options: object, site: Site, stored: Suffixes, where: Path) -> Patch:
    try:
        with torch.device("meta"):  # no memory for initial values, whatever size the file claims
            patch = method(site, options) if site.op in method.ops else None
    except (DeltaError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:  # sizes beyond torch's own
        raise DeltaError(f"{where}: no {method.kind} has the options that stand there ({str(error)[:200]})") from None
    if patch is None:
        raise DeltaError(f"{where}: {shown(str(site))} cannot be changed by {method.kind}", expected=" or ".join(method.ops))
    wanted = patch.state_dict()
    odd = [key for key, value in stored.items() if value.dtype not in DTYPES]
    if odd:
        raise DeltaError(f"{where}: tensor {shown(f'{site.name}/{odd[0]}')} is of {stored[odd[0]].dtype}", expected="floats")
    wrong = {*wanted} ^ {*stored} | {key for key in {*wanted} & {*stored} if wanted[key].shape != stored[key].shape}
    for key in sorted(wrong):
        found, expected = (_spell_shape(table.get(key)) for table in (stored, wanted))
        raise DeltaError(f"{where}: tensor {shown(f'{site.name}/{key}')} is {found}", expected=expected, fix="save it again")
    if any(True for _ in patch.buffers()):  # what a method computes for itself is not in the file
        patch = method(site, options, torch.Generator().manual_seed(0))
    patch.load_state_dict(stored, assign=True)
    return patch


def _spell_shape(tensor: Tensor | None) -> str:
    return "not there" if tensor is None else "x".join(map(str, tensor.shape)) or "a scalar"


def _words(header: Header, shelves: dict[str, Suffixes]) -> dict[str, Word]:
    tokens = cast("list[object]", _table(header, "words", list, []))
    leads = cast("list[object]", _table(header, "leads", list, []))
    words: dict[str, Word] = {}
    if len({str(token) for token in tokens}) != len(tokens) or any(token not in tokens for token in leads):
        raise DeltaError(f"{header.path}: damaged: a word is there twice, or leads and is not there", fix="save it again")
    for number, token in enumerate(tokens):
        rows = shelves.pop(f"word/{number}", {})
        if not isinstance(token, str) or not token or not _are_rows(list(rows.values())):
            raise DeltaError(f"{header.path}: damaged: the rows of word {number} are missing or no rows", fix="save it again")
        words[token] = Word(token, rows, leads=token in leads)
    return words


def _are_rows(stacks: list[Tensor]) -> bool:
    """Say whether these are a word's rows for each text encoder: (vectors, width) or (layers, vectors, width), as many each."""
    sound = all(r.dim() in (2, 3) and r.numel() and r.dtype in DTYPES for r in stacks)
    return sound and len({r.shape[:-1] for r in stacks}) == 1


FORMAT = Format("native", "vgm_peft: every kind of delta, exactly", recognises, read, spell)
