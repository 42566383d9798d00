"""What a file for other tools says of itself: the metadata that UIs show, and nothing that is nobody's business.

Written are `modelspec.*` (Stability's model specification 1.0.1), the `ss_*` keys of kohya that UIs show or decide by, and the
two `sshs_*` hashes by which they know a file again. Of a delta's own metadata only what is public goes along, and of that
nothing that looks like a path on somebody's machine. There is no date unless one is asked for: same delta, same bytes.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from vgm_peft.delta import Delta
from vgm_peft.family import Base
from vgm_peft.formats.books import Book
from vgm_peft.formats.canonical import data_digest, window_digest
from vgm_peft.formats.format import Parcel
from vgm_peft.formats.forms import name_of
from vgm_peft.formats.names import ALPHA, MAGNITUDE, UP
from vgm_peft.formats.vocabulary import Suffixes, rank_of

ARCHITECTURE = "modelspec.architecture"
SPEC: Mapping[str, str] = {"modelspec.sai_model_spec": "1.0.1", "modelspec.implementation": "vgm_peft"}
PUBLIC = frozenset(
    ("ss_output_name", "ss_resolution", "ss_clip_skip", "ss_seed", "ss_steps", "ss_epoch", "ss_num_train_images")
    + ("ss_learning_rate", "ss_sd_model_name", "ss_tag_frequency")
)
"""What of a delta's own `ss_` metadata is written; the others may hold paths and names of the machine. `modelspec.` is all."""
TRANSLATED: Mapping[str, str] = {
    "base": "ss_sd_model_name",
    "steps": "ss_steps",
    "seed": "ss_seed",
    "resolution": "ss_resolution",
    "token": "modelspec.trigger_phrase",
}
"""What a run writes into its own file -> what UIs call it."""
PATH = re.compile(r"""(?:^|[\s"'(=,;])(?:/[\w.-]+/|~/|\\\\|[A-Za-z]:[\\/])""")
"""The beginning of a path on a machine; the one in a data URL or a hub id is none."""
LEGACY = (0x100000, 0x10000)
"""First byte and number of bytes of a file that the older of the two hashes is taken over."""

NAMELESS = frozenset(("lora", "norm"))
"""Forms that LyCORIS has no `algo` for: the first is its default, the second goes by `train_norm`."""
ALGORITHMS: Mapping[str, str] = {"oft": "diag-oft", "diff": "full", "bias": "full"}
"""LyCORIS' words for forms, where they are not the form's own name."""


def public(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what of a delta's own metadata may be in a file for others."""
    own = {TRANSLATED[key]: text for key, text in metadata.items() if key in TRANSLATED and text}
    own |= {key: text for key, text in metadata.items() if key in PUBLIC or key.startswith("modelspec.")}
    return {key: text for key, text in own.items() if not PATH.search(text)}


def stamps(delta: Delta, base: Base | None, book: Book) -> dict[str, str]:
    """Return what any file of a delta says: the specification, the base, the resolution, the delta's own public metadata."""
    prediction = None if base is None else base.process.prediction
    said = dict(book.family.stamps([patch.site for patch in delta], prediction))
    if ARCHITECTURE in said:
        said[ARCHITECTURE] += "/lora"
    own = public(delta.metadata)
    if "ss_resolution" not in own and base is not None:
        own["ss_resolution"] = f"({base.resolution}, {base.resolution})"
    sides = re.findall(r"\d+", own.get("ss_resolution", ""))
    if sides:
        own.setdefault("modelspec.resolution", f"{sides[0]}x{sides[-1]}")
    return {**SPEC, **own, **said}


def modelspec(said: Mapping[str, str]) -> dict[str, str]:
    """Return the part that is not kohya's alone."""
    return {key: text for key, text in said.items() if key.startswith("modelspec.")}


def network(modules: Sequence[Suffixes]) -> dict[str, str]:
    """Describe the kind of delta as kohya and LyCORIS do: by the commonest that kohya's own code cannot read."""
    ranks = {rank for suffixes in modules if (rank := rank_of(suffixes)) is not None}
    alphas = {float(suffixes[ALPHA]) for suffixes in modules if ALPHA in suffixes}
    kinds = Counter(word for suffixes in modules if (word := _algorithm(suffixes)) is not None)
    out = {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic" if ranks else "1",  # 1: what has no rank
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic" if alphas else "1.0",
    }
    scales = [suffixes[MAGNITUDE] for suffixes in modules if MAGNITUDE in suffixes]
    lowrank = any(UP in suffixes for suffixes in modules)
    args = {"algo": max(sorted(kinds), key=kinds.__getitem__, default="locon" if lowrank else "full")}
    if scales:
        args |= {"dora_wd": "True", "wd_on_output": str(scales[0].shape[1] == 1)}
    if any("w_norm" in suffixes for suffixes in modules):
        args["train_norm"] = "True"
    if args == {"algo": "locon"}:
        return {**out, "ss_network_module": "networks.lora"}
    return {**out, "ss_network_args": json.dumps(args)}


def _algorithm(suffixes: Suffixes) -> str | None:
    """Return LyCORIS' word for a module's kind; None for a LoRA, and for a normalisation, which has none of its own."""
    form = name_of(suffixes)
    return None if form in NAMELESS else ALGORITHMS.get(form, form)


def sealed(parcel: Parcel, more: Mapping[str, str]) -> Parcel:
    """Return a file's content with more metadata and, where UIs look for them, the two hashes over it.

    `sshs_model_hash` is SHA-256 over the tensors' bytes; `sshs_legacy_hash` the first 8 letters of that over 64 KiB from the
    first MiB on, in a file that has the `ss_` metadata only (of a smaller file: over nothing).
    """
    metadata = {**parcel.metadata, **more}
    named = {key: text for key, text in metadata.items() if key.startswith("ss_")}
    if not named:
        return replace(parcel, metadata=metadata)
    return replace(parcel, metadata={**metadata, **_hashes(parcel.tensors, named)})


def _hashes(tensors: Mapping[str, Tensor], named: Mapping[str, str]) -> dict[str, str]:
    return {
        "sshs_model_hash": data_digest(tensors),
        "sshs_legacy_hash": window_digest(tensors, named, *LEGACY)[:8],
    }
