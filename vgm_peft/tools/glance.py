"""What the header of a delta file says, without torch and without a single value: an answer at once, whatever the size.

A file of ours says everything. Files of other tools are grouped by the suffixes that they share, which tell the kind and the
rank; their family they may say in metadata, and only a reading of the file decides it.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from vgm_peft.errors import DeltaError
from vgm_peft.header import Entry, Header, open_header

OURS = "vgm_peft."
SUFFIX = re.compile(
    r"[._](lora_(?:up|down|mid|A|B)(?:\.\w+)?\.weight|lora(?:_linear_layer)?\.(?:up|down)\.weight|lora_magnitude_vector(?:\.weight)?"
    r"|(?:hada|lokr|oft|boft|hra|ia3|vera_lambda|fourierft|c3a)_\w+(?:\.weight)?|[ab][12]\.weight|alpha|dora_scale|rescale|on_input|weight|diff|diff_b|w_norm|b_norm)$"
)
KINDS = (
    (("dora_scale", "lora_magnitude"), "DoRA"),
    (("hada_",), "LoHa"),
    (("lokr_",), "LoKr"),
    (("oft_", "boft_"), "OFT"),
    (("a1.", "b1."), "GLoRA"),
    (("lora_", "lora."), "LoRA"),
    (("on_input", "ia3_"), "IA3"),
    (("hra_",), "HRA"),
    (("vera_",), "VeRA"),
    (("fourierft_",), "FourierFT"),
    (("c3a_",), "C3A"),
    (("w_norm", "b_norm"), "norms"),
    (("diff",), "full difference"),
)
"""How suffixes of one module begin -> what they spell, the first that is there."""
RANK_AXES = {"lora_down.": 0, "lora_A.": 0, "lora.down.": 0, "lora_linear_layer.down.": 0, "hada_w1_b": 0, "lokr_w2_b": 0}
PARTS = re.compile(
    r"(lora_unet|lora_te\d?|lora_transformer|lycoris|unet|text_encoder(?:_\d)?|transformer|diffusion_model|base_model\.model)[._]"
)
COUNTS = ("dtypes", "kinds", "ranks", "parts")
"""What of a `Glance` is counted."""
EMBEDDINGS = ("emb_params", "clip_l", "clip_g", "clip_h")


@dataclass(frozen=True)
class Glance:
    """What a header says."""

    file: str
    tool: str
    """Whose spelling it is."""
    base: str
    """The base that it says it is for; empty when it does not say."""
    size: int
    """Bytes."""
    dtypes: dict[str, int]
    """Stored values by dtype."""
    kinds: dict[str, int]
    """Changed tensors (of other tools' files: modules) by kind."""
    ranks: dict[int, int]
    """The same by rank, for kinds that have one."""
    parts: dict[str, int]
    """The same by part of the base."""
    options: list[dict[str, Any]]
    """Kind and settings of each group of a file of ours."""
    words: dict[str, dict[str, list[int]]]
    """Token -> part -> vectors and width; what another tool's file does not name is under its own tensor's name."""
    others: int
    """Tensors whose names say nothing here."""
    metadata: dict[str, str] = field(default_factory=dict[str, str])


def glance(path: Path) -> Glance:
    """Read a header and say what it says. Raises `DeltaError` when the file is damaged or no safetensors file."""
    header = open_header(path)
    return _ours(header) if f"{OURS}version" in header.metadata else _theirs(header)


def _ours(header: Header) -> Glance:
    try:
        groups: list[dict[str, Any]] = json.loads(header.metadata[f"{OURS}patches"])
        words: list[str] = json.loads(header.metadata.get(f"{OURS}words", "[]"))
        sites = [(group["kind"], group["options"], site[0]) for group in groups for site in group["sites"]]
        options = [{"kind": g["kind"], **g["options"], "tensors": len(g["sites"])} for g in groups]
    except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        raise DeltaError(f"{header.path}: damaged: what it says of itself cannot be read ({error})") from None
    return Glance(
        **_common(header),
        tool="vgm_peft",
        base=header.metadata.get(f"{OURS}family", ""),
        kinds=dict(Counter(str(kind) for kind, _, _ in sites)),
        ranks=_counted(options["rank"] for _, options, _ in sites if isinstance(options.get("rank"), int)),
        parts=dict(Counter(str(part) for _, _, part in sites)),
        options=options,
        words={word: _rows(header, f"word/{n}/") for n, word in enumerate(words)},
        others=0,
        metadata={key: text for key, text in sorted(header.metadata.items()) if not key.startswith(OURS)},
    )


def _theirs(header: Header) -> Glance:
    modules: dict[str, dict[str, Entry]] = {}
    words: dict[str, dict[str, list[int]]] = {}
    others = 0
    for name, entry in header.tensors.items():
        if name in EMBEDDINGS or len(header.tensors) == 1 and len(entry.shape) == 2:
            words.setdefault("(the file's name)", {})[name] = list(entry.shape)
        elif (match := SUFFIX.search(name)) is not None:
            modules.setdefault(name[: match.start()], {})[match[1]] = entry
        else:
            others += 1
    ranks = (rank for tensors in modules.values() if (rank := _rank(tensors)) is not None)
    parts = [match[1] if (match := PARTS.match(name)) else "?" for name in modules]
    says = header.metadata.get("modelspec.architecture") or header.metadata.get("ss_base_model_version", "")
    if modules and all(part == "base_model.model" for part in parts):  # the folder's name is all that tells it
        parts = [header.path.parent.name] * len(modules)
    return Glance(
        **_common(header),
        tool="an embedding" if words and not modules else _tool(header),
        base=says,
        kinds=dict(Counter(_kind(tensors) for tensors in modules.values())),
        ranks=_counted(ranks),
        parts=dict(Counter(parts)),
        options=[],
        words=words,
        others=others,
        metadata=dict(sorted(header.metadata.items())),
    )


def together(seen: Sequence[Glance], name: str) -> Glance:
    """Sum up what the headers of the files of one folder say; that of a single file is returned as it is."""
    if len(seen) == 1:
        return seen[0]
    counts = {key: dict(sum((Counter(getattr(one, key)) for one in seen), Counter())) for key in COUNTS}
    said = seen[0].metadata.items()
    return Glance(
        file=name,
        tool=seen[0].tool,
        base=next((one.base for one in seen if one.base), ""),
        size=sum(one.size for one in seen),
        options=[],
        words={token: rows for one in seen for token, rows in one.words.items()},
        others=sum(one.others for one in seen),
        metadata={key: text for key, text in said if all(one.metadata.get(key) == text for one in seen)},
        **counts,
    )


def _tool(header: Header) -> str:
    """Whose spelling it is, by the names of weights."""
    if all(name.startswith("base_model.") for name in header.tensors):
        return "peft"
    dotted = any(".lora_A" in name or ".lora." in name or "processor" in name for name in header.tensors)
    return "diffusers or peft" if dotted else "kohya or LyCORIS"


def _common(header: Header) -> dict[str, Any]:
    dtypes: Counter[str] = Counter()
    for entry in header.tensors.values():
        dtypes[entry.dtype.lower()] += prod(entry.shape)
    return {"file": header.path.name, "size": header.size, "dtypes": dict(dtypes)}


def _rows(header: Header, prefix: str) -> dict[str, list[int]]:
    return {name.removeprefix(prefix): list(e.shape) for name, e in header.tensors.items() if name.startswith(prefix)}


def _kind(tensors: Mapping[str, Entry]) -> str:
    return next((word for begins, word in KINDS if any(name.startswith(begins) for name in tensors)), "?")


def _rank(tensors: Mapping[str, Entry]) -> int | None:
    for name, entry in tensors.items():
        for begin, axis in RANK_AXES.items():
            if name.startswith(begin) and len(entry.shape) > axis:
                return entry.shape[axis]
    return None


def _counted(ranks: Iterable[int]) -> dict[int, int]:
    return dict(sorted(Counter(ranks).items()))
