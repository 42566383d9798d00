"""`attach` and `detach`: one delta on a plain diffusers pipeline, live, and off again without a trace.

Works on any stock pipeline whose family is known, whatever its task (text-to-image, image-to-image, inpainting,
ControlNet). Pipelines made from one another share their networks; a delta attached through one is on all of them.
"""

import warnings
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vgm_peft.attachment import Attachment
from vgm_peft.delta import Delta
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.family import Base
from vgm_peft.site import locate

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from vgm_peft.words import WordAttachment

_carried: "WeakKeyDictionary[nn.Module, list[Handle]]" = WeakKeyDictionary()
"""Denoiser -> the handles on it, oldest first; the denoiser is what pipelines made from one another share."""


class Handle:
    """One delta, live on a pipeline; what `attach` returns. A context manager that detaches on leaving.

    `scale` may be changed at any time and takes effect at the next forward; at 0 the pipeline behaves as the base does,
    bit for bit, the delta's words included (they are then not words at all).
    """

    def __init__(self, base: Base, delta: Delta, scale: float, name: str) -> None:
        """Attach; everything is checked before anything is touched. Raises `DeltaError` when any of it does not fit."""
        self.name, self.delta = name, delta
        self._base, self._attachment, self._words = base, None, cast("WordAttachment | None", None)
        self._scale = 0.0
        fits(base, delta, name)
        attachment = Attachment(base.parts, ready(delta, base), 0.0)
        try:
            self._attachment = attachment
            self.scale = scale
        except BaseException:
            attachment.remove()
            raise
        _carried.setdefault(base.denoiser, []).append(self)

    @property
    def scale(self) -> float:
        """Strength: `W + scale * dW`."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        from vgm_peft.words import WordAttachment

        if self._attachment is None:
            raise DeltaError(f"{self.name}: already detached", fix="attach it again")
        if not -1e6 < value < 1e6:
            raise ConfigError(f"scale = {value} for {self.name}", expected="a finite number, usually 0 .. 1")
        if value != 0.0 and self._words is None and self.delta.words:
            self._words = WordAttachment(self._base.pipe, self.delta.words.values(), rename=True)
            for old, new in self.tokens.items():
                if old != new:
                    warnings.warn(renamed(self.name, old, new), stacklevel=3)
        elif value == 0.0 and self._words is not None:
            self._words.remove()
            self._words = None
        self._attachment.strength = self._scale = float(value)

    @property
    def strengths(self) -> dict[str, float]:
        """Further factors by part (`unet`, `text_encoder`) or site name; changes take effect at the next forward."""
        if self._attachment is None:
            raise DeltaError(f"{self.name}: already detached", fix="attach it again")
        return self._attachment.strengths

    @property
    def tokens(self) -> dict[str, str]:
        """Its words: how the file calls them -> how prompts do; the second of two with one token has a number in it."""
        return {} if self._words is None else dict(zip(self.delta.words, self._words.rows, strict=True))

    @property
    def attached(self) -> bool:
        """Whether the delta is still on the pipeline."""
        return self._attachment is not None

    def remove(self) -> None:
        """Take the delta off (idempotent): parameters, buffers, hooks and tokenizers are those of before."""
        if self._attachment is None:
            return
        if self._words is not None:
            self._words.remove()
            self._words = None
        self._attachment.remove()
        self._attachment = None
        _carried[self._base.denoiser].remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = f"scale={self._scale:g}" if self.attached else "detached"
        return f"<{self.name} on {self._base.family.name}, {state}>"


def attach(pipe: "DiffusionPipeline", source: "Delta | Path | str", scale: float = 1.0) -> Handle:
    """Put a delta on a stock diffusers pipeline, live, and return the handle that takes it off.

    `source` is a file of any format that can be read, or a `Delta` in memory. The base's own tensors, classes and
    state-dict keys never change. The patches are copied, in the base's dtype and place and without dropout: a delta
    given in memory is left as it was, and training it further does not show. Raises `BaseModelError` for a pipeline of
    no known family, `DeltaError` for a delta of another family, one that is on the pipeline already, or a damaged file.
    """
    base = base_of(pipe)
    if isinstance(source, Delta):
        delta, name = source, source.metadata.get("name", "the delta")
    else:
        path = Path(source).expanduser()
        delta, name = read_delta(path, base), str(path)
    for other in carried(base):
        if other.delta is delta or other.name == name and not isinstance(source, Delta):
            raise DeltaError(f"{name} is on this pipeline already", fix="change the scale of the handle you have, or detach it")
    return Handle(base, delta, scale, name)


def detach(pipe: "DiffusionPipeline", handle: Handle | None = None) -> None:
    """Take one delta (or, without a handle, every delta) off a pipeline, giving back the base bit for bit.

    Raises `DeltaError` when the handle is not on this pipeline, so that a mistake is not silent.
    """
    base = base_of(pipe)
    handles = carried(base)
    if handle is not None and handle not in handles:
        raise DeltaError(f"{handle!r} is not on this pipeline", fix="give the handle that attach returned for it")
    for each in reversed(handles if handle is None else [handle]):
        each.remove()


def carried(base: Base) -> list[Handle]:
    """The handles on a base, oldest first."""
    return list(_carried.get(base.denoiser, []))


def base_of(pipe: "DiffusionPipeline") -> Base:
    """Look at a stock pipeline as a base model. Raises `BaseModelError` when its family is unknown."""
    from vgm_peft.families import family_of

    return Base(pipe, family_of(pipe), "")


def read_delta(path: Path, base: Base) -> Delta:
    """Read a delta file for a base. Raises `DeltaError`."""
    from vgm_peft.formats import read

    if not path.exists():
        raise DeltaError(f"{path}: no such file", fix="check the path; a run's delta is <run folder>/delta.safetensors")
    return read(path, base)


def renamed(name: str, old: str, new: str) -> str:
    """Say that a word goes by another token than its file says."""
    return f'the word "{old}" is there already: that of {name} is written "{new}" in prompts'


def fits(base: Base, delta: Delta, name: str) -> None:
    """Refuse a delta of another family, one that is empty, and one that holds values that are not finite."""
    if delta.family != base.family.name:
        raise DeltaError(
            f"{name}: a delta for {delta.family}, and this base is {base.family.name}",
            fix=f"use it with a base of the family {delta.family}",
        )
    if not delta.patches and not delta.words:
        raise DeltaError(f"{name}: holds neither a patch nor a word", fix="the file is not a trained delta")
    rows = ((f"{w.token}/{part}", t) for w in delta.words.values() for part, t in w.rows.items())
    for key, tensor in (*delta.parameters(), *rows):
        if not bool(torch.isfinite(tensor.detach()).all()):
            raise DeltaError(
                f"{name}: {key} holds values that are not finite", fix="the training of this delta failed; train again"
            )


def ready(delta: Delta, base: Base) -> Delta:
    """Return a copy of a delta for use, not training: no dropout, no gradients, each patch in its layer's dtype and place."""
    copy = Delta(delta.family, deepcopy(delta.patches), delta.words, delta.metadata).train(False)
    device = _execution_device(base)
    for patch in copy:
        tensor = cast(Tensor, getattr(locate(base.parts, patch.site), patch.site.tensor))
        dtype = tensor.dtype if tensor.is_floating_point() else None
        patch.requires_grad_(False).to(device=device or tensor.device, dtype=dtype)
    return copy


def _execution_device(base: Base) -> torch.device | None:
    """Where the pipeline computes when it is offloaded; `None` when its layers simply stay where they are."""
    pipe: Any = base.pipe
    return cast(torch.device, pipe._execution_device) if hasattr(base.denoiser, "_hf_hook") else None
