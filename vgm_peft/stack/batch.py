"""Different stacks for different pictures of one batch: a grid of strengths, or of deltas, in one pass of the denoiser.

What all of them have in common is fused; what one has alone acts on its own rows (`attachment.Attachment.rows`).
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from vgm_peft.attachment import Fusion
from vgm_peft.delta import Delta
from vgm_peft.drawing import drawn_by
from vgm_peft.errors import BaseModelError, ConfigError
from vgm_peft.family import Base, fitting_threads
from vgm_peft.picture import Picture
from vgm_peft.stack.controls import Controls
from vgm_peft.stack.held import Held, hold
from vgm_peft.stack.live import Live, Pace, strengths
from vgm_peft.stack.recipe import Stack
from vgm_peft.stack.runtime import Applied
from vgm_peft.stack.sampling import dressed, scheduler_for, to_image
from vgm_peft.stack.uses import DeltaUse

ONE_FOR_ALL = ("base", "base_digest", "steps", "guidance", "width", "height", "scheduler", "controls", "folder")
"""What a pass has only one of."""
ALONE = ("image", "regions", "combine", "count")
"""What a stack must leave at its default to be drawn beside others."""


@torch.no_grad()
def draw_together(base: Base, stacks: Sequence[Stack], *, given: Mapping[str, Delta] | None = None) -> list[Picture]:
    """Draw one picture of each stack in one pass, each as it is when it is drawn alone, up to float32 rounding.

    `given` as in `Stack.on`. Raises `ConfigError` for stacks of different steps, sizes, samplers, guidance or side networks,
    for ones that begin from a picture, have regions or combine deltas otherwise than by their sum, and for layer-wise words.
    """
    given = given or {}
    _check(stacks)
    records = [stack.pinned(skip=given) for stack in stacks]
    first, held = stacks[0], dict[str, Held]()
    for stack in stacks:
        held |= hold(base, stack, given, held)
    told = _read(base, stacks, {file: one.delta for file, one in held.items()})
    size = first.width or base.resolution, first.height or base.resolution
    guidance = base.guidance(first.guidance)
    pipe = cast(Any, base.pipe)
    with ExitStack() as on:
        _put_on(on, base, stacks, held)
        controls = Controls(base, first)
        on.callback(controls.remove)
        controls.put_on()
        controls.show(*size)
        on.enter_context(fitting_threads(base.denoiser))
        on.enter_context(dressed(pipe, scheduler_for(base, first.scheduler)))
        on.enter_context(drawn_by(base, pipe))
        pixels = pipe(
            **told,
            num_inference_steps=first.steps,
            guidance_scale=guidance,
            width=size[0],
            height=size[1],
            generator=[torch.Generator("cpu").manual_seed(stack.seed) for stack in stacks],
            output_type="np",
        ).images
    if not np.isfinite(pixels).all():
        raise BaseModelError("a picture is not finite", fix="use dtype bfloat16 or float32, or smaller strengths")
    settled = {"base_digest": base.digest, "width": size[0], "height": size[1], "guidance": guidance}
    said = [replace(record, **settled).beginning_at(record.folder) for record in records]
    return [Picture(to_image(one), record) for one, record in zip(pixels, said, strict=True)]


def _check(stacks: Sequence[Stack]) -> None:
    if not stacks:
        raise ConfigError("no stack to draw", expected="at least one")
    plain = Stack()
    for stack in stacks:
        for name in ONE_FOR_ALL:
            if getattr(stack, name) != getattr(stacks[0], name):
                raise ConfigError(
                    f"stacks with {name} = {getattr(stacks[0], name)!r} and {getattr(stack, name)!r} in one pass",
                    expected="the same " + ", ".join(ONE_FOR_ALL[2:-2]),
                    fix="draw them apart",
                )
        for name in ALONE:
            if getattr(stack, name) != getattr(plain, name):
                raise ConfigError(
                    f"a stack with {name} = {getattr(stack, name)!r} in one pass with others", fix="draw it alone"
                )


def _read(base: Base, stacks: Sequence[Stack], deltas: Mapping[str, Delta]) -> dict[str, Tensor]:
    """Return how a stock pipeline is told the prompts of all, each read with the words and text patches of its own stack."""
    told: list[dict[str, Tensor]] = []
    for stack in stacks:
        with Applied(base, replace(stack, controls=()).beginning_at(stack.folder), given=deltas, fuse=False) as applied:
            words = (word for delta in applied.deltas.values() for word in delta.words.values())
            if wide := next((word.token for word in words if word.layers), ""):
                raise ConfigError(f'the layer-wise word "{wide}" in one pass with other stacks', fix="draw this stack alone")
            told.append(applied.prompting())
    if len({one["prompt_embeds"].shape[1] for one in told}) > 1:
        raise ConfigError("prompts of different lengths in one pass", fix="draw them apart, or shorten the longest")
    keys = dict.fromkeys(key for one in told for key in one)  # a pipeline that is told no negative takes zeros
    return {
        key: torch.cat([one.get(key, torch.zeros_like(one[key.removeprefix("negative_")])) for one in told]) for key in keys
    }


def _put_on(on: ExitStack, base: Base, stacks: Sequence[Stack], held: Mapping[str, Held]) -> None:
    """Put the denoiser's changes on: fused what all stacks have in common, on the rows of one what it has alone."""

    def shared(use: DeltaUse) -> bool:
        return use.constant and held[use.file].fusible and all(use in stack.deltas for stack in stacks)

    present = [sorted((u for u in stack.deltas if u.strength != 0.0), key=lambda u: u.file) for stack in stacks]
    common = [(use, held[use.file].delta) for use in present[0] if shared(use)]
    on.enter_context(Fusion(base.parts, [(_drawing(base, delta), strengths(use, delta)) for use, delta in common]))
    live: list[Live] = []
    for number, uses in enumerate(present):
        for use in uses:
            if not shared(use):
                one = Live(base, use, held[use.file].delta)
                on.callback(one.attachment.remove)
                one.follow(use)
                one.attachment.rows = slice(number, None, len(stacks))  # in either half of guidance
                live.append(one)
    pace = Pace(base, live)
    on.callback(pace.remove)


def _drawing(base: Base, delta: Delta) -> Delta:
    """Return what a delta has for the denoiser."""
    mine = {name: patch for name, patch in delta.patches.items() if patch.site.part == base.family.denoiser}
    return Delta(delta.family, mine)
