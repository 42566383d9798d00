"""What the tests of this room stand on: deltas with random values, and pictures drawn by stock pipelines."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vgm_peft.delta import Delta, Word
from vgm_peft.deltas import method_named
from vgm_peft.family import Base
from vgm_peft.site import choose, locate

PROMPT = "a red duck on a table"


def make_delta(
    base: Base, kind: str, patterns: Sequence[str] = ("attention",), seed: int = 3, size: float = 0.3, **options: Any
) -> Delta:
    """A delta of one kind on a base, no value of it zero."""
    method = method_named(kind)
    sites = choose(base.sites, list(patterns), base.family.presets, method.ops)
    return shake(Delta.fit(base.family.name, method, sites, method.Options(**options)), seed, size)


def shake(delta: Delta, seed: int = 3, size: float = 0.3) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in delta.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return delta


def make_word(base: Base, token: str, vectors: int = 1, seed: int = 5) -> Word:
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, Tensor] = {}
    for part in base.family.parts[1:]:
        table = base.parts[part].get_input_embeddings().weight  # type: ignore[operator]
        rows[part] = 0.5 * torch.randn(vectors, table.shape[1], generator=generator)
    return Word(token, rows)


def picture(pipe: Any, prompt: str = PROMPT) -> Tensor:
    """Two steps of a stock pipeline, text encoders included, decoded to (1, P, Q, 3) in 0 .. 1."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        drawn = pipe(
            prompt, num_inference_steps=2, guidance_scale=3.0, generator=generator, output_type="np", height=64, width=64
        )
    return torch.from_numpy(drawn.images)


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest expected value."""
    found, expected = found.detach(), expected.detach()
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-300))


def assert_same_change(found: Delta, expected: Delta, base: Base, bound: float = 1e-6) -> None:
    """Both change the same tensors of the base by the same dW."""
    assert set(found.patches) == set(expected.patches)
    known = {site.name for site in base.sites}
    for name, patch in expected.patches.items():
        weight = getattr(locate(base.parts, patch.site), patch.site.tensor) if name in known else torch.zeros(patch.site.shape)
        assert difference(found.patches[name].change(weight), patch.change(weight)) <= bound, name
