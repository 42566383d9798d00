"""What a delta file holds, said without a base: for `vgm-delta inspect` and lists of files."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from math import prod
from os import PathLike
from pathlib import Path

import torch

from vgm_peft.delta import Delta, Patch
from vgm_peft.errors import DeltaError
from vgm_peft.formats import file_of, open_header, read, sniff
from vgm_peft.formats.canonical import DTYPES
from vgm_peft.formats.vocabulary import change

Plain = str | int | float | bool | None


@dataclass(frozen=True)
class Group:
    """The patches of one kind and the same options."""

    kind: str
    options: dict[str, Plain]
    layers: int
    values: int


@dataclass(frozen=True)
class Norms:
    """Frobenius norms of dW at strength 1 over the layers, and where the largest is."""

    smallest: float
    median: float
    largest: float
    at: str


@dataclass(frozen=True)
class Summary:
    """All that is told of a file."""

    file: str
    format: str
    family: str
    size: int
    """Bytes."""
    values: int
    """Trained values."""
    dtypes: dict[str, int]
    """Stored values by dtype, those of the format's own (`alpha`) among them."""
    parts: dict[str, int]
    """Changed layers by part of the base."""
    groups: list[Group]
    ranks: dict[int, int]
    """Layers by rank, for kinds that have one."""
    norms: Norms | None
    """None when nothing is changed, or the changes depend on the base's own weights."""
    words: dict[str, dict[str, list[int]]]
    """Token -> part -> vectors and width."""
    metadata: dict[str, str] = field(default_factory=dict[str, str])


def summarise(path: str | PathLike[str]) -> Summary:
    """Read a file of any format and say what it holds. Raises `DeltaError` as `read` does."""
    delta, header = read(path), open_header(file_of(path))
    groups: dict[tuple[str, str], list[Patch]] = {}
    for patch in delta:
        groups.setdefault((patch.kind, repr(patch.options)), []).append(patch)
    ranks = Counter(rank for patch in delta if (rank := getattr(patch.options, "rank", None)) is not None)
    dtypes: Counter[str] = Counter()
    for entry in header.tensors.values():
        dtypes[str(DTYPES[entry.dtype]).removeprefix("torch.")] += prod(entry.shape)
    return Summary(
        file=Path(path).name,
        format=sniff(path),
        family=delta.family,
        size=header.size,
        values=delta.count(),
        dtypes=dict(dtypes),
        parts=dict(Counter(patch.site.part for patch in delta)),
        groups=[
            Group(kind, asdict(group[0].options), len(group), Delta(delta.family, {p.site.name: p for p in group}).count())
            for (kind, _), group in groups.items()
        ],
        ranks=dict(sorted(ranks.items())),
        norms=_norms(delta),
        words={token: {part: list(rows.shape) for part, rows in word.rows.items()} for token, word in delta.words.items()},
        metadata=dict(sorted(delta.metadata.items())),
    )


@torch.no_grad()
def _norms(delta: Delta) -> Norms | None:
    try:
        norms = {name: float(change(patch, None).norm()) for name, patch in delta.patches.items()}
    except DeltaError:
        return None
    if not norms:
        return None
    ordered = sorted(norms, key=norms.__getitem__)
    return Norms(norms[ordered[0]], norms[ordered[len(ordered) // 2]], norms[ordered[-1]], ordered[-1])
