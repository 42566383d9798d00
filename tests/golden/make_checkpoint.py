"""Makes `checkpoint-VERSION/`: a run that was stopped after two of its four steps, and what it comes to when it goes on.

    python -m tests.golden.make_checkpoint

One folder for each version of the checkpoints, kept for ever: `tests/train/test_golden.py` goes on with each, or finds it
refused by its version. So a folder that is there is never made again; raise `checkpoint.VERSION`, then run this.

All were made with torch 2.13 on a CPU, on the tiny SD-like base of the tests.
checkpoint-2   vgm_peft 0.1.0, commit c2d29c7 (2026-11-22)
checkpoint-3   the commit after it: the best step is kept by what it costs, which need not be a loss
"""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.train.ground import tiny_base
from vgm_peft.config import Table, merge
from vgm_peft.train import train
from vgm_peft.train.checkpoint import VERSION
from vgm_peft.train.config import bind

HERE = Path(__file__).parent
SETTINGS: Table = {
    "task": {"name": "finetune"},
    "steps": 4,
    "ema": 0.9,
    "data": {"resolution": 64, "batch": 1, "flip": True, "caption_dropout": 0.3},
    "delta": {"kind": "lora", "rank": 1, "dropout": 0.2, "sites": ["unet.mid_block.*to_v"]},
    "optimiser": {"lr": 0.01, "schedule": "cosine", "warmup": 1},
    "preview": {"count": 0},
    "checkpoint": {"every": 2, "leave": 2},
}


def draw_picture(folder: Path) -> None:
    """A picture with its caption. Its bytes are part of what a checkpoint must agree with, so they are kept too."""
    folder.mkdir()
    ramp = np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (64, 1))
    Image.fromarray(np.stack([ramp, ramp.T, np.full_like(ramp, 90)], 2)).save(folder / "0.png")
    (folder / "0.txt").write_text("a robot")


def main() -> int:
    """Make the folder of this version, unless it is there."""
    place = HERE / f"checkpoint-{VERSION}"
    if place.exists():
        print(f"{place} exists, and is kept as it is", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        images, run = Path(made, "me"), Path(made, "run")
        draw_picture(images)
        places: Table = {"data": {"images": str(images)}, "output": str(run)}
        delta = train(bind(merge(SETTINGS, places)), base=tiny_base("sd15")).delta
        assert delta is not None
        kept = Path(made, "kept")
        shutil.copytree(images, kept / "me")
        shutil.copytree(run / "checkpoints" / "step-000002", kept / "run" / "checkpoints" / "step-000002")
        shutil.copyfile(run / "run.toml", kept / "run" / "run.toml")
        shutil.copyfile(delta, kept / "delta.safetensors")
        shutil.copytree(kept, place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
