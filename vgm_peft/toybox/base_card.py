"""What a finished base measures, and its model card: nothing in the card is typed in by hand."""

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch

from vgm_peft.errors import BaseModelError
from vgm_peft.toybox.base import BaseSettings, best_vae, write_base
from vgm_peft.toybox.captions import chunk_scenes
from vgm_peft.toybox.nets import load_pipeline, make_scheduler
from vgm_peft.toybox.pipeline import GUIDANCE
from vgm_peft.toybox.render import render
from vgm_peft.toybox.state import Facts, load_state, say
from vgm_peft.toybox.vae import measure

UNSEEN_CHUNK = 100_000
"""Scenes of this chunk are never trained on."""


def machine(device: str) -> str:
    """The kind of machine, without its name."""
    if device == "cuda":
        return f"one {torch.cuda.get_device_name()}"
    return f"CPU only, {torch.get_num_threads()} thread(s), {platform.machine()}"


def stage_facts(settings: BaseSettings) -> dict[str, Facts]:
    """Steps and seconds of each stage that left a state."""
    found: dict[str, Facts] = {}
    for stage in ("vae", "sharpen", "unet", "decoder"):
        state = settings.work / f"{stage}.safetensors"
        if state.exists():
            found[stage] = load_state(state)[1]
    return found


def measure_vae(settings: BaseSettings, count: int = 200) -> dict[str, float]:
    """PSNR in dB of the VAE on fresh renders, as they are and with every colour jittered."""
    renders = render(chunk_scenes(UNSEEN_CHUNK, count)).image
    plain, recoloured = measure(best_vae(settings), renders)
    return {"vae_psnr_unseen_renders": plain, "vae_psnr_unseen_colours": recoloured}


def measure_prompts(folder: Path, count: int, device: str) -> dict[str, float]:
    """What the oracles read in pictures of held-out prompts: 25 steps, at its guidance. Empty while there are no oracles."""
    from vgm_peft.toybox import evaluate
    from vgm_peft.toybox.oracle import Oracles
    from vgm_peft.toybox.world import heldout_prompts

    try:
        oracles = Oracles.load()
    except BaseModelError as error:
        say(f"not measured: {error}")
        return {}
    prompts = heldout_prompts(count)
    pipe = cast(evaluate.TextToImage, load_pipeline(folder, device))
    done = evaluate.measure_prompts(pipe, prompts, evaluate.Sampling(), oracles)
    return {name: float(value) for name, value in asdict(done).items()}


def write_measured(settings: BaseSettings, count: int) -> None:
    """Write the output folder, measure it, and write its card with the numbers."""
    write_base(settings, settings.output)
    measured = measure_vae(settings)
    if count:
        measured |= measure_prompts(settings.output, count, settings.device)
    say("measured " + json.dumps(measured))
    (settings.work / "measured.json").write_text(json.dumps(measured, indent=1), encoding="utf-8")
    (settings.output / "README.md").write_text(card(settings, measured), encoding="utf-8")


def card(settings: BaseSettings, measured: dict[str, float]) -> str:
    """The model card, in Markdown; `notes.md` in the work folder says what no state can."""
    facts = stage_facts(settings)
    rows = [f"| {stage} | {fact['step']} | {float(fact['seconds']) / 60:.0f} |" for stage, fact in facts.items()]
    numbers = [f"| {_NAMES.get(name, name)} | {value:.4g} |" for name, value in measured.items()]
    seen = facts.get("unet", {}).get("pictures", 0)
    unet, vae, notes = settings.unet, settings.vae, settings.work / "notes.md"
    return _CARD.format(
        machine=machine(settings.device),
        rows="\n".join(rows),
        seen=f"{int(seen):,}",
        renders=f"{settings.chunks * 2000:,}",
        numbers="\n".join(numbers) or "| nothing yet | |",
        widths=unet.widths,
        heads=unet.heads,
        vae_widths=vae.widths,
        unet=json.dumps(asdict(unet)),
        vae=json.dumps(asdict(vae)),
        text=json.dumps(asdict(settings.text)),
        scheduler=type(make_scheduler()).__name__,
        guidance=GUIDANCE,
        notes=notes.read_text(encoding="utf-8").strip() + "\n\n" if notes.exists() else "",
    )


_NAMES = {
    "vae_psnr_unseen_renders": "VAE, dB on 200 unseen renders",
    "vae_psnr_unseen_colours": "VAE, dB on the same with every colour changed",
    "count": f"held-out prompts (25 steps, guidance {GUIDANCE:g})",
    "class_accuracy": "class read as asked",
    "colour_accuracy": "colour read as asked",
    "background_accuracy": "background read as asked",
    "position_accuracy": "position read as asked",
    "everything": "all four at once",
}

_CARD = """# Toybox: a small text-to-image model of a rendered toy world

A `StableDiffusionPipeline` with Stable Diffusion 1.5's block structure at small widths, trained from nothing by
`python -m vgm_peft.toybox train-base` on pictures that the project renders itself. It is the default base of
`vgm_peft` and its yardstick: small enough to travel with the code, trained enough to tell whether a delta learned
anything. It knows ten toys, eight colours, four materials, six backgrounds, three places; nothing else.

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("assets/toybox")
pipe("a red robot on grass, on the left", num_inference_steps=25, guidance_scale={guidance:g}).images[0]
```

## Parts

- U-Net: four levels of {widths} channels, {heads} heads, cross-attention width 128, 16x16x4 latents, half precision.
- VAE: 64x64 pixels to 16x16x4, widths {vae_widths}; latents have unit deviation (scaling factor 1), half precision.
- Text: a CLIP text model of 3 layers x 128 with its own tokenizer, 32 tokens, single precision.
- Sampler: {scheduler}, v-prediction, zero terminal SNR, trailing steps; 25 steps and guidance about {guidance:g} do well
  (`sampling.json` says so to `vgm_peft`).

## How it was trained

Machine: {machine}. {renders} renders; the U-Net saw {seen} pictures. The text model learned to tell captions'
attributes first and was then frozen; the first part of the U-Net's training used latents halved in size.

| stage | steps | minutes |
| --- | --- | --- |
{rows}

Settings: U-Net `{unet}`; VAE `{vae}`; text `{text}`.

{notes}## Measured

| what | value |
| --- | --- |
{numbers}

Shares are 0..1, read by the project's attribute oracles (`python -m vgm_peft.toybox evaluate`).

## Limits

64x64 pixels; small details (faces, thin handles) blur. Words outside the world do nothing. It was never shown the
held-out subjects, patterns and styles that users' deltas are tested with. Train it on with `python -m vgm_peft.toybox
train-base --start assets/toybox --minutes 60`, or a better one from nothing on a GPU with `--device cuda`.
"""
