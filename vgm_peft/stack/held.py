"""The deltas of a stack in memory: read once for as long as their files have the same bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from vgm_peft.attachment import check_fusible
from vgm_peft.delta import Delta
from vgm_peft.errors import DeltaError
from vgm_peft.family import Base
from vgm_peft.site import locate
from vgm_peft.stack.files import delta_sha256
from vgm_peft.stack.handle import fits, read_delta
from vgm_peft.stack.recipe import Stack


@dataclass(frozen=True)
class Held:
    """One delta that was read and checked for a base."""

    delta: Delta
    digest: str
    """SHA-256 of its file; empty for one that was given in memory."""
    fusible: bool
    """Whether it can be fused; if not (it follows the timestep, weights are quantised, offloaded, shared), it acts live."""

    @classmethod
    def of(cls, base: Base, delta: Delta, name: str, digest: str = "") -> Self:
        """Check a delta. Raises `DeltaError` when it does not fit the base."""
        fits(base, delta, name)
        for patch in delta:
            locate(base.parts, patch.site)
        try:
            check_fusible(base.parts, delta)
        except DeltaError:
            return cls(delta, digest, False)
        return cls(delta, digest, True)


def hold(base: Base, stack: Stack, given: Mapping[str, Delta], before: Mapping[str, Held]) -> dict[str, Held]:
    """Return the deltas of a stack by their files: given ones, those of `before` whose bytes are the same, and the rest read.

    Of those at strength 0 there are only such as are known already.
    """
    held: dict[str, Held] = {}
    for use in stack.deltas:
        known = before.get(use.file)
        if use.file in held or use.strength == 0.0 and known is None:
            continue
        path, delta, digest = stack.path(use.file), given.get(use.file), ""
        if delta is None and use.strength != 0.0 and path.exists():
            digest = delta_sha256(path)
        if known is not None and (use.strength == 0.0 or known.delta is delta or known.digest == digest != ""):
            held[use.file] = known
        else:
            held[use.file] = Held.of(base, read_delta(path, base) if delta is None else delta, use.file, digest)
    return held
