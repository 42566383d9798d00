"""Regions: which prompt holds at which place of the picture, and cross-attentions that read each place's own.

Regionally controllable sampling is that of Mix-of-Show (Gu et al. 2023, arXiv 2305.18292, section 3.3 and figure 5): after a
cross-attention has read the prompt of the whole, it reads that of each region, and what it makes of that stands in the
region's places. Where regions overlap, they share the place.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.hooks import RemovableHandle

from vgm_peft.desk import cross_attentions
from vgm_peft.errors import DataError
from vgm_peft.stack.acting import Acting
from vgm_peft.stack.controls import pixels_of, read_picture
from vgm_peft.stack.recipe import Stack
from vgm_peft.stack.uses import Box, Region

TRACE = 1e-6
"""A share of a place below which it is rounding: boxes that meet leave nothing between them."""


class Places:
    """Where the prompts of a stack hold: place 0 is what no region covers, with the stack's own; the others are the regions."""

    def __init__(self, stack: Stack) -> None:
        """Read the masks. Raises `DataError` for one that cannot be read or is black all over."""
        self.prompts = (stack.prompt, *(region.prompt or stack.prompt for region in stack.regions))
        self.numbers = {region.name: number for number, region in enumerate(stack.regions, 1)}
        self._shapes = [_mask_of(stack, region) if region.mask else region.box for region in stack.regions]
        self._shares: dict[tuple[int, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self.prompts)

    def shares(self, height: int, width: int) -> Tensor:
        """Return how much each place counts where, (places, 1, height, width) in float64, which add up to 1 everywhere.

        What is covered in part (a box's edge within a latent, a grey mask) counts in part.
        """
        if (height, width) not in self._shares:
            drawn = [torch.zeros(0, height, width, dtype=torch.float64)]
            drawn += [_drawn(shape, height, width)[None] for shape in self._shapes]
            regions = torch.cat(drawn)
            covered = regions.sum(0, keepdim=True)
            full = covered > 1.0 - TRACE
            left = (1.0 - covered).masked_fill(full, 0.0)
            self._shares[height, width] = torch.cat([left, regions / torch.where(full, covered, 1.0)])[:, None]
        return self._shares[height, width]


def _mask_of(stack: Stack, region: Region) -> Tensor:
    mask = pixels_of(read_picture(stack.path(region.mask), "black"), None).mean(0).double()
    if not bool(mask.any()):
        raise DataError(f"{region.mask}: black all over", expected=f"a picture that is white where the region {region.name} is")
    return mask


def _drawn(shape: "Box | Tensor", height: int, width: int) -> Tensor:
    """Return how much of each of height x width places a box or a mask (P, Q) of any size covers, (height, width)."""
    if isinstance(shape, Tensor):
        return interpolate(shape[None, None], (height, width), mode="bilinear", antialias=True)[0, 0].clamp(0.0, 1.0)
    left, top, right, bottom = shape
    return _covered(top, bottom, height)[:, None] * _covered(left, right, width)


def _covered(begin: float, end: float, count: int) -> Tensor:
    """Return how much of each of `count` equal parts of 0 .. 1 lies between begin and end."""
    edges = torch.arange(count + 1, dtype=torch.float64)
    return (edges[1:].clamp(max=end * count) - edges[:-1].clamp(min=begin * count)).clamp(min=0.0)


class RegionalAttention:
    """Hooks by which every cross-attention of a denoiser reads the prompt of each place."""

    def __init__(self, denoiser: nn.Module, places: Places, acting: Acting) -> None:
        """Put them there; until `tell` they do nothing."""
        self._places, self._acting = places, acting
        self._states: Sequence[Tensor] = ()
        self._latents = (0, 0)
        self._again = False
        self._hooks: list[RemovableHandle] = []
        for name in cross_attentions(denoiser):
            layer = denoiser.get_submodule(name)
            self._hooks.append(layer.register_forward_pre_hook(self._before))
            self._hooks.append(layer.register_forward_hook(self._after, with_kwargs=True))

    def tell(self, states: Sequence[Tensor], latents: tuple[int, int]) -> None:
        """Say what regions read in the next call, (rows, T, D) each, and height and width of its latents."""
        self._states, self._latents = states, latents

    def _before(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """The call itself is for what no region covers, so what acts in a region alone rests."""
        if self._states and not self._again:
            self._acting.at(0)

    def _after(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        """Read on for the regions, and let each have its places."""
        if not self._states or self._again:
            return None
        size = grid(self._latents, output.shape[1])
        own, *others = self._places.shares(*size).to(output.dtype).to(output.device).flatten(2).mT
        further = cast(Tensor, kwargs["encoder_hidden_states"])[:, self._states[0].shape[1] :]
        blended = output * own
        self._again = True
        try:
            for number, (states, share) in enumerate(zip(self._states, others, strict=True), 1):
                self._acting.at(number)
                if further.shape[1]:  # what side networks added to the prompt is for every place
                    states = torch.cat([states, further], dim=1)
                blended = torch.addcmul(blended, layer(*args, **{**kwargs, "encoder_hidden_states": states}), share)
        finally:
            self._again = False
            self._acting.at(None)
        return blended

    def remove(self) -> None:
        """Take the hooks away; calling it again does nothing."""
        while self._hooks:
            self._hooks.pop().remove()


def grid(latents: tuple[int, int], tokens: int) -> tuple[int, int]:
    """Return height and width of a layer whose tokens are places of the picture. Raises `DataError` when they are not."""
    height, width = latents
    while height * width > tokens:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    if height * width != tokens:
        raise DataError(f"regions on a layer of {tokens} tokens", expected=f"halves of {latents[0]}x{latents[1]} latents")
    return height, width
