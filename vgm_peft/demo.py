"""`make demo`: the main job on any machine, in minutes. Five pictures of a toy go in; a delta and new pictures come out.

The toy is a Toybox subject that the base model has never seen. The run is an ordinary `vgm-train dreambooth` with its
shipped recipe, the pictures are ordinary stacks: nothing here is special to the demo but the choice of prompts.
"""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vgm_peft.config import Table
from vgm_peft.errors import VgmError

if TYPE_CHECKING:
    from PIL import Image

    from vgm_peft.family import Base

SUBJECT, STYLE = "robot", "toon"
PLACES = ("on a wooden floor, on the left", "on sand, on the right", "at night, in the centre", "on grass, on the right")
SEED = 7


def main() -> int:
    """Train, draw, and say where everything is and what to type next. Returns the exit status."""
    from vgm_peft.families import load, toybox_folder
    from vgm_peft.picture import grid, write_image
    from vgm_peft.train.recipes import resolve
    from vgm_peft.train.run import train

    started = time.monotonic()
    assets = toybox_folder().parent
    images, style = assets / "subjects" / SUBJECT, assets / "deltas" / f"{STYLE}.safetensors"
    print(f"Teaching the Toybox base a toy it has never seen, from the five pictures in {images} ...", flush=True)
    base = load("toybox")
    asked: Table = {
        "task": {"name": "dreambooth", "class_prompt": f"a photo of a {SUBJECT}"},
        "data": {"images": str(images)},
        "output": str(_free(Path("runs/demo"))),
        "exports": ["kohya", "diffusers", "peft"],
    }
    result = train(resolve(asked).config, base=base)
    if result.delta is None:
        print(f"Stopped; go on with: vgm-train --resume {result.folder}")
        return 130

    print("Drawing it in new places ...", flush=True)
    plain, taught = _rows(base, result.delta, style)
    references = [_open(path) for path in sorted(images.glob("*.png"))[: len(plain)]]
    sheet = grid(
        [references, plain, taught],
        [*PLACES, f"... in {STYLE} style"],
        ["what it learned from (other places)", "the base, asked for a robot", "with the delta"],
        f"Toybox, DreamBooth LoRA, {result.steps} steps; seed {SEED}. Last column: the same delta and a style delta together.",
    )
    picture = write_image(sheet, result.folder / "demo.png")
    minutes = (time.monotonic() - started) / 60
    print(_summary(result.folder, result.delta, picture, minutes))
    return 0


def _rows(base: "Base", delta: Path, style: Path) -> "tuple[list[Image.Image], list[Image.Image]]":
    """Draw every prompt without and with the delta; the last one also with the style."""
    from vgm_peft.stack import DeltaUse, Stack, generate

    plain: list[Image.Image] = []
    taught: list[Image.Image] = []
    learned, styled = DeltaUse(file=str(delta)), DeltaUse(file=str(style))
    for place, extra in [*((place, ()) for place in PLACES), (PLACES[0], (styled,))]:
        words = f"a photo of a robot {place}", f"a photo of a sks robot {place}"
        for row, prompt, deltas in ((plain, words[0], ()), (taught, words[1], (learned, *extra))):
            row.append(generate(base, Stack(prompt=prompt, deltas=deltas, seed=SEED))[0].image)
    return plain, taught


def _open(path: Path) -> "Image.Image":
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def _free(folder: Path) -> Path:
    """The folder itself, or the first of `folder-2`, `folder-3`, ... that does not exist: runs are never overwritten."""
    candidates = (folder, *(folder.with_name(f"{folder.name}-{n}") for n in range(2, 10_000)))
    return next(c for c in candidates if not c.exists())


def _summary(folder: Path, delta: Path, picture: Path, minutes: float) -> str:
    exports = "\n".join(f"               {path}" for path in sorted((folder / "exports").glob("*")))
    return f"""
Done in {minutes:.1f} minutes.
  the grid     {picture}
  the delta    {delta}
  for others   (kohya: ComfyUI, A1111, Forge, InvokeAI; diffusers: load_lora_weights; peft: PeftModel)
{exports}
  the record   {folder}/run.toml, manifest.json, metrics.jsonl, samples/

Next:
  source .venv/bin/activate
  vgm-generate --delta {delta} --prompt "a photo of a sks robot on the beach" --output robot.png
  vgm-train dreambooth --images ./your-pictures --base stable-diffusion-v1-5/stable-diffusion-v1-5    (on a GPU)
  vgm-studio"""


if __name__ == "__main__":
    # Before torch: threads that wait by spinning cost a factor of a hundred as soon as another process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        sys.exit(main())
    except VgmError as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(2)
