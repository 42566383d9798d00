"""What words learn beside weights, on the embedded base: one subject and one style, by LoRA, Textual Inversion, layer-wise
words and pivotal tuning, by the shipped recipes, judged by the oracles; a grid of pictures and a table.

Runs that are done are kept, so that the same command goes on where it was stopped.

    python benchmarks/words.py [--output runs/words] [--seed 0] [--count 24]
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from vgm_peft.config import Table, merge
from vgm_peft.families import load
from vgm_peft.family import Base
from vgm_peft.picture import grid, write_image
from vgm_peft.stack import attach
from vgm_peft.toybox.cast import subject_named
from vgm_peft.toybox.evaluate import Sampling, TextToImage, measure_subject, sample
from vgm_peft.toybox.oracle import Oracles
from vgm_peft.toybox.oracle_net import HEADS
from vgm_peft.toybox.render import render
from vgm_peft.toybox.world import heldout_prompts
from vgm_peft.train import train
from vgm_peft.train.config import RunConfig
from vgm_peft.train.durable import write_text
from vgm_peft.train.recipes import resolve

ASSETS, TRAINING = Path(__file__).parents[1] / "assets", Path(__file__).parents[1] / "training"
SUBJECT, STYLE = "robot", "toon"
PLACES = ("on grass", "in the sky", "at night")
SCENES = ("a large matte red car on grass", "a small glossy green duck on sand", "a striped yellow house in a studio")


@dataclass(frozen=True)
class Entry:
    """A run, and how prompts name what it learned."""

    label: str
    recipe: str
    name: str
    settings: Table

    def config(self, what: str, output: Path, seed: int) -> RunConfig:
        """The recipe with what the run is about."""
        images = ASSETS / ("subjects" if what == SUBJECT else "styles") / what
        common: Table = {"data": {"images": str(images)}, "preview": {"count": 0}, "output": str(output), "seed": seed}
        return resolve(merge(self.settings, common), TRAINING / f"{self.recipe}.toml").config


LAYERED: Table = {"task": {"layered": True, "vectors": 4}}
ROBOT: Table = {"task": {"token": "<robot>", "init_word": SUBJECT}}
TOON: Table = {"task": {"token": "<toon>", "init_word": "cartoon"}, "data": {"trigger": "<toon>"}}
ALONE: Table = merge(TOON, {"task": {"kind": "style"}})
CLASS: Table = {"task": {"class_prompt": f"a {SUBJECT}"}}
WORDS: Table = {"task": {"vectors": 2, "word_lr": 1e-2, "word_until": 0.5, "norm": "pull"}}
ENTRIES: Mapping[str, Sequence[Entry]] = {
    SUBJECT: (
        Entry("LoRA", "dreambooth-lora-toybox", f"sks {SUBJECT}", CLASS),
        Entry("Textual Inversion", "textual-inversion-toybox", "<robot>", ROBOT),
        Entry("layer-wise word", "textual-inversion-toybox", "<robot>", merge(ROBOT, LAYERED)),
        Entry(
            "pivotal tuning", "dreambooth-pivotal-toybox", f"<robot> {SUBJECT}", merge(CLASS, {"task": {"token": "<robot>"}})
        ),
    ),
    STYLE: (
        Entry("LoRA", "finetune-lora-toybox", "ohwx", {"data": {"trigger": "ohwx"}}),
        Entry("Textual Inversion", "textual-inversion-toybox", "<toon>", ALONE),
        Entry("layer-wise word", "textual-inversion-toybox", "<toon>", merge(ALONE, LAYERED)),
        Entry("pivotal tuning", "finetune-lora-toybox", "<toon>", merge(TOON, WORDS)),
    ),
}


def judged(base: Base, what: str, name: str, count: int) -> dict[str, float]:
    """Likeness to the subject, or the mean probability of the style; and the share of the rest of the prompt that is read."""
    how, oracles, pipe = Sampling(guidance=base.guidance()), Oracles.load(), cast(TextToImage, base.pipe)
    if what == SUBJECT:
        found = measure_subject(pipe, subject_named(SUBJECT), name, how, oracles, count)
        return {
            "score": found.identity,
            "prompt": (found.class_read + found.backgrounds_kept) / 2,
            "renders": found.identity_real,
        }
    prompts = heldout_prompts(count, 3)
    reading = oracles.read(sample(pipe, [_named(prompt.text, name) for prompt in prompts], how))
    right = [read == prompt.scene.toys[0].kind for read, prompt in zip(reading.words("class"), prompts, strict=True)]
    scenes = [replace(prompt.scene, style=STYLE) for prompt in prompts]
    drawn, real = (
        r.probabilities["style"][:, HEADS["style"].index(STYLE)] for r in (reading, oracles.read(render(scenes).image))
    )
    return {"score": float(drawn.mean()), "prompt": sum(right) / count, "renders": float(real.mean())}


def _named(text: str, name: str) -> str:
    return f"{name}, {text}" if name else text


def shown(base: Base, what: str, name: str) -> list[Image.Image]:
    """Three pictures, from the same noise for every run."""
    texts = [f"a photo of a {name} {place}" for place in PLACES] if what == SUBJECT else [_named(s, name) for s in SCENES]
    drawn = sample(cast(TextToImage, base.pipe), texts, Sampling(guidance=base.guidance(), seed=7))
    return [Image.fromarray(picture.numpy()) for picture in drawn]


def measure(base: Base, what: str, output: Path, seed: int, count: int) -> None:
    """Train what is not trained yet, judge, draw the grid and print the table."""
    columns, pictures, table = ["the base"], [shown(base, what, SUBJECT if what == SUBJECT else "")], {}
    table["the base"] = judged(base, what, SUBJECT if what == SUBJECT else "", count)
    for entry in ENTRIES[what]:
        folder = output / f"{what}-{entry.label.replace(' ', '-').lower()}-{seed}"
        file = folder / "delta.safetensors"
        if not file.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            train(entry.config(what, folder, seed), base=base)
        with attach(base.pipe, file):
            table[entry.label] = {**judged(base, what, entry.name, count), "kilobytes": file.stat().st_size / 1000}
            pictures.append(shown(base, what, entry.name))
        columns.append(entry.label)
        print(what, entry.label, json.dumps({key: round(value, 3) for key, value in table[entry.label].items()}), flush=True)
    write_text(output / f"{what}-{seed}.json", json.dumps(table, indent=2) + "\n")
    rows = [[column[i] for column in pictures] for i in range(len(pictures[0]))]
    write_image(grid(rows, columns, PLACES if what == SUBJECT else SCENES), output / f"{what}.png")


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/words"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    base = load("toybox")
    base.pipe.set_progress_bar_config(disable=True)
    for what in ENTRIES:
        measure(base, what, args.output, args.seed, args.count)


if __name__ == "__main__":
    main()
