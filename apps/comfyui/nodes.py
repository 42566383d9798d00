"""The node `Load VGM delta`: a delta file onto a MODEL and a CLIP, with strengths and a range of the sampling.

Over the whole sampling a change is added to the weights, by ComfyUI's own patching, which moves, casts and undoes it like a
LoRA. Over a range of it, or when it depends on the timestep (T-LoRA), it acts live on the denoiser's layers instead, in those
calls of the model alone that fall into the range. Text encoders run before the sampling, so they are patched in any case.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vgm_peft.attachment import Attachment
from vgm_peft.delta import Delta
from vgm_peft.formats import read

from .places import DENOISER, Placed, place

PLAIN = (torch.float32, torch.float16, torch.bfloat16)
ZERO_TO_ONE = {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.001}
STRENGTH = {"default": 1.0, "min": -20.0, "max": 20.0, "step": 0.01}


class LoadDelta:
    """Load a delta file of vgm_peft (or of any tool that it reads) into a model and its text encoders."""

    RETURN_TYPES = ("MODEL", "CLIP")
    FUNCTION = "load"
    CATEGORY = "loaders"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the name that ComfyUI calls
        """What the node shows."""
        import folder_paths  # ComfyUI's own

        return {
            "required": {
                "model": ("MODEL",),
                "clip": ("CLIP",),
                "file": (folder_paths.get_filename_list("loras"),),
                "strength_model": ("FLOAT", STRENGTH),
                "strength_clip": ("FLOAT", STRENGTH),
                "start_percent": ("FLOAT", ZERO_TO_ONE),
                "end_percent": ("FLOAT", {**ZERO_TO_ONE, "default": 1.0}),
            }
        }

    def load(
        self,
        model: Any,
        clip: Any,
        file: str,
        strength_model: float = 1.0,
        strength_clip: float = 1.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
    ) -> tuple[Any, Any]:
        """Return a changed model and text encoder; those that came in stay as they were."""
        import folder_paths

        delta = read(folder_paths.get_full_path("loras", file)).train(False)
        for token in delta.words:
            logging.warning(
                "%s: the word %s is no change of weights; `vgm-delta export --for embedding` writes it", file, token
            )
        unet, texts = place(delta, model.model.state_dict(), clip.patcher.model.state_dict())
        model, clip = model.clone(), clip.clone()
        if strength_clip:
            clip.add_patches(dense(texts, clip.patcher), strength_clip)
        whole = start_percent <= 0.0 and end_percent >= 1.0
        timed = [placed for placed in unet if placed.patch.timed]
        fused = [placed for placed in unet if whole and not placed.patch.timed]
        live = timed if whole else unet
        if strength_model and fused:
            model.add_patches(dense(fused, model), strength_model)
        if strength_model and live:
            wrap(model, Live(live, strength_model, delta.family), start_percent, end_percent)
        return model, clip


def dense(placed: Sequence[Placed], patcher: Any) -> dict[str, tuple[Tensor]]:
    """The changes as ComfyUI takes them: tensor name -> dW, in the dtype of the weight, on the CPU."""
    stored = patcher.model.state_dict()
    patches: dict[str, tuple[Tensor]] = {}
    for one in placed:
        # what is on the card may be patched already; ComfyUI keeps the original aside then
        kept = getattr(patcher, "backup", {}).get(one.key)
        weight = stored[one.key] if kept is None else getattr(kept, "weight", kept)
        base = weight.detach().to("cpu", torch.float32).reshape(one.patch.site.shape)
        with torch.no_grad():
            change = one.patch.change(base).reshape(weight.shape)
        patches[one.key] = (change.to(weight.dtype if weight.dtype in PLAIN else torch.float32),)
    return patches


class Live:
    """Changes that act on the layers of a denoiser for as long as they are asked to."""

    def __init__(self, placed: Sequence[Placed], strength: float, family: str) -> None:
        """Take copies of the patches, named as the denoiser names its modules."""
        self.strength, self.delta = strength, Delta(family)
        for one in placed:
            patch = deepcopy(one.patch)
            module = one.key.removeprefix(f"{DENOISER}.").rpartition(".")[0]
            patch.site = replace(patch.site, module=module)
            self.delta.patches[patch.site.name] = patch.requires_grad_(False)

    def on(self, denoiser: torch.nn.Module, timestep: Tensor) -> Attachment:
        """Attach to a denoiser for one call of it, and tell the time to who depends on it."""
        (part,) = {patch.site.part for patch in self.delta}
        for patch in self.delta:
            tensor = getattr(denoiser.get_submodule(patch.site.module), patch.site.tensor)
            patch.to(tensor.dtype if tensor.dtype in PLAIN else torch.float32)
            if patch.timed:
                patch.at(timestep)
        return Attachment({part: denoiser}, self.delta, self.strength)

    def __deepcopy__(self, memo: object) -> "Live":
        """ComfyUI copies a model's options whenever it clones the model; these stay shared."""
        return self


def wrap(model: Any, live: Live, start: float, end: float) -> None:
    """Let changes act between two shares of the sampling, around whatever wraps the model's calls already."""
    inner: Callable[..., Tensor] | None = model.model_options.get("model_function_wrapper")
    sampling = model.get_model_object("model_sampling")
    first, last = sampling.percent_to_sigma(start), sampling.percent_to_sigma(end)

    def call(apply_model: Callable[..., Tensor], given: dict[str, Any]) -> Tensor:
        sigma = given["timestep"]
        with ExitStack() as stack:
            if last <= float(sigma.max()) <= first:
                stack.enter_context(live.on(model.model.diffusion_model, sampling.timestep(sigma)))
            if inner is not None:
                return inner(apply_model, given)
            return apply_model(given["input"], sigma, **given["c"])

    model.set_model_unet_function_wrapper(call)


NODE_CLASS_MAPPINGS = {"VgmLoadDelta": LoadDelta}
NODE_DISPLAY_NAME_MAPPINGS = {"VgmLoadDelta": "Load VGM delta"}
