"""Putting what a file says of its modules onto ours: whole, or cut where another tool keeps several in one tensor.

FLUX's and SD3's authors have query, key and value in one layer, diffusers in three. A LoRA of the one is a LoRA of each of
the three with the same `lora_down` and its own rows of `lora_up`; ranks that a piece does not use (block-diagonal files have
such) are left out. All is exact: what cannot be cut exactly is refused.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from vgm_peft.errors import DeltaError
from vgm_peft.family import Place, Share
from vgm_peft.formats.books import Reading
from vgm_peft.formats.names import ALPHA, BIAS, DOWN, MAGNITUDE, MID, UP
from vgm_peft.formats.vocabulary import Suffixes
from vgm_peft.header import listed, shown

ROWS = frozenset((UP, BIAS, MAGNITUDE, "hada_w1_a", "hada_w2_a", "b1.weight", "diff", "diff_b"))
"""Suffixes that have a row for every output."""
SHARED = frozenset((DOWN, MID, ALPHA, "hada_w1_b", "hada_w2_b", "a1.weight", "a2.weight", "b2.weight"))
"""Suffixes that every piece has whole."""
HALVES = ("w_norm", "b_norm")
"""A normalisation's two, of which one may be filling."""


def place(named: Mapping[str, Suffixes], reading: Reading, where: str) -> dict[Place, Suffixes]:
    """Return the tensors of every module of ours. Raises `DeltaError` listing all that are there in two spellings."""
    groups: dict[Place, Suffixes] = {}
    twice: list[str] = []
    for name, tensors in named.items():
        shares = reading.find(name)
        for share in shares:
            mine = _piece(share, tensors, f"{where}: {shown(name)}") if share.rows else tensors
            if share.place in groups:
                twice.append(name)
            groups[share.place] = without_filling(mine)
    if twice:
        raise DeltaError(
            f"{where}: {len(twice)} modules are there in two spellings ({listed(twice)})", expected="every module once"
        )
    return groups


def _piece(share: Share, tensors: Suffixes, where: str) -> Suffixes:
    """Return the rows of a fused module that are one of ours."""
    units = {suffix: 1 for suffix in ROWS & tensors.keys()}
    right = tensors.get("lokr_w2", tensors.get("lokr_w2_a"))
    if right is not None:  # every row of the left factor stands for as many outputs as the right one has
        units |= {suffix: len(right) for suffix in {"lokr_w1", "lokr_w1_a"} & tensors.keys()}
        units |= {suffix: 0 for suffix in {"lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"} & tensors.keys()}
    by_input = MAGNITUDE in tensors and tensors[MAGNITUDE].shape[:1] == (1,)
    left = sorted(tensors.keys() - units.keys() - SHARED)
    if left or by_input:
        raise DeltaError(
            f"{where}: this layer is several of ours, and {listed(left or [MAGNITUDE])} cannot be cut into theirs exactly",
            fix="train or export it with separate query, key and value",
        )
    pieces = {suffix: _rows(tensor, share, units.get(suffix, 0), where) for suffix, tensor in tensors.items()}
    return without_dead_ranks(pieces)


def _rows(tensor: Tensor, share: Share, unit: int, where: str) -> Tensor:
    """Return the rows of a tensor that has one for every `unit` outputs; 0: it has none of its own."""
    if not unit:
        return tensor
    bounds = [n for rows in share.rows for n in (rows.start, rows.stop)]
    if not tensor.dim() or len(tensor) * unit < max(bounds) or any(n % unit for n in bounds):
        size = "x".join(map(str, tensor.shape)) or "a scalar"
        raise DeltaError(
            f"{where}: {size} cannot be cut at the outputs {sorted(set(bounds))} exactly",
            fix="train or export it with separate query, key and value",
        )
    return torch.cat([tensor[rows.start // unit : rows.stop // unit] for rows in share.rows])


def without_dead_ranks(tensors: Suffixes) -> Suffixes:
    """Drop ranks that are zero in `lora_up`, with the scale kept."""
    down, up = tensors.get(DOWN), tensors.get(UP)
    if down is None or up is None or up.dim() < 2 or up.shape[1] != len(down):
        return tensors
    return _kept(tensors, up.transpose(0, 1).flatten(1).any(1))


def without_empty_ranks(tensors: Suffixes) -> Suffixes:
    """Drop ranks that are zero on both sides, with which files fill lower ranks up; the scale stays."""
    down, up = tensors.get(DOWN), tensors.get(UP)
    if down is None or up is None or up.dim() < 2 or up.shape[1] != len(down):
        return tensors
    if bool(down.flatten(1)[:, :1].any(1).all()):  # a first value that is not zero tells as much as all
        return tensors
    return _kept(tensors, down.flatten(1).any(1) | up.transpose(0, 1).flatten(1).any(1))


def _kept(tensors: Suffixes, live: Tensor) -> Suffixes:
    if bool(live.all()):
        return tensors
    if not bool(live.any()):
        live[0] = True
    down, up = tensors[DOWN], tensors[UP]
    alpha = float(tensors.get(ALPHA, torch.tensor(0.0))) or float(len(down))
    return {**tensors, DOWN: down[live], UP: up[:, live], ALPHA: torch.tensor(alpha * int(live.sum()) / len(down))}


def without_filling(tensors: Suffixes) -> Suffixes:
    """Drop the half of a normalisation's change that is there for the other's sake."""
    halves = [name for name in HALVES if name in tensors]
    live = {name for name in halves if bool(tensors[name].any())}
    return {name: tensor for name, tensor in tensors.items() if not live or name in live or name not in halves}
