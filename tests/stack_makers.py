"""Deltas and words with values in them, for the tests of stacks, pictures, commands and the Studio."""

from typing import Any

import torch

from vgm_peft.delta import Delta, Word
from vgm_peft.deltas import method_named
from vgm_peft.family import Base
from vgm_peft.site import choose
from vgm_peft.words import text_embeddings

SMALL: dict[str, Any] = {"steps": 2, "guidance": 3.0, "scheduler": "ddim"}


def small(**changes: Any) -> dict[str, Any]:
    """`SMALL` with changes."""
    return {**SMALL, **changes}


def make_delta(base: Base, kind: str = "lora", seed: int = 0, preset: str = "attention") -> Delta:
    """A delta with non-zero values on the denoiser and every text encoder."""
    presets = base.family.presets
    sites = choose(base.sites, [preset, "text"] if "text" in presets else [preset], presets)
    method = method_named(kind)
    delta = Delta.fit(base.family.name, method, [s for s in sites if s.op in method.ops], seed=seed)
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for _, p in delta.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return delta.train(False)


def make_word(base: Base, token: str = "<toy>", vectors: int = 2) -> Word:
    generator = torch.Generator().manual_seed(7)
    widths = {part: e.embedding_dim for part, e in text_embeddings(base.pipe).items()}
    return Word(token, {part: torch.randn(vectors, d, generator=generator) for part, d in widths.items()})
