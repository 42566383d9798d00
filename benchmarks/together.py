"""Two subjects and a style in one picture, a delta each, on the embedded base: added up, in regions, in turns, merged.

The robot is asked for on the left and the mug on the right. The oracles look at both halves of every picture: how like its
own subject each half is, how like the other's it has become (what leaked), whether the picture has the style, and which
ground it shows. No delta and real renders are the two ends of the scale. A grid of pictures and a table come of it.

Deltas that are trained already are kept, so that the same command goes on where it was stopped.

With a T2I-Adapter for masks each way is also drawn with the outlines of a render to follow, as Mix-of-Show draws several
concepts: nothing else says where a subject stands that was taught by pictures of it in the middle.

    python benchmarks/together.py [--output runs/together] [--count 12] [--ways plain,noise] [--adapter runs/mask/t2i-adapter]
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from vgm_peft.cli import main
from vgm_peft.config import Table, merge
from vgm_peft.families import load
from vgm_peft.family import Base
from vgm_peft.picture import grid, write_image
from vgm_peft.stack import ControlUse, DeltaUse, Region, Stack, generate
from vgm_peft.toybox.cast import subject_named, subject_scenes
from vgm_peft.toybox.oracle import Oracles
from vgm_peft.toybox.oracle_net import HEADS
from vgm_peft.toybox.render import render
from vgm_peft.toybox.world import BACKGROUND_PHRASES, BACKGROUNDS, Scene
from vgm_peft.train import train
from vgm_peft.train.recipes import resolve

ROOT = Path(__file__).parents[1]
LEFT, RIGHT, STYLE = ("robot", "sks"), ("mug", "zwx"), ("toon", "ohwx")
"""What is asked for on the left and on the right and how, with the word that each was taught by."""
HALVES = (Region(name="left", box=(0.0, 0.0, 0.5, 1.0)), Region(name="right", box=(0.5, 0.0, 1.0, 1.0)))


@dataclass(frozen=True)
class Asked:
    """One picture to draw: its ground, its seed, and what its outlines follow."""

    ground: str
    seed: int
    controls: tuple[ControlUse, ...] = ()

    def prompt(self, left: str, right: str, style: str) -> str:
        """Both toys, as captions of two say it."""
        return f"{style}a {left} on the left and a {right} on the right, {BACKGROUND_PHRASES[self.ground]}"


@dataclass(frozen=True)
class Score:
    """Shares of the way from the base without deltas (0) to real renders (1), but `style` and `ground`: shares of pictures."""

    left: float
    right: float
    leak: float
    style: float
    ground: float


def files(output: Path) -> dict[str, Path]:
    """Train what is not trained yet."""
    found: dict[str, Path] = {}
    for (what, word), recipe in ((LEFT, "dreambooth"), (RIGHT, "dreambooth"), (STYLE, "finetune")):
        folder = output / what
        found[what] = folder / "delta.safetensors"
        if found[what].is_file():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        kind = "styles" if what == STYLE[0] else "subjects"
        own: Table = {"data": {"trigger": word}} if kind == "styles" else {"task": {"class_prompt": f"a {what}", "token": word}}
        common: Table = {
            "data": {"images": str(ROOT / "assets" / kind / what)},
            "preview": {"count": 0},
            "output": str(folder),
        }
        train(resolve(merge(own, common), ROOT / "training" / f"{recipe}-lora-toybox.toml").config)
    return found


Way = Callable[[Mapping[str, Path], Path, Asked], Stack]
SAID = (f"{LEFT[1]} {LEFT[0]}", f"{RIGHT[1]} {RIGHT[0]}")


def plainly(given: Mapping[str, Path], work: Path, asked: Asked) -> Stack:
    """The base alone."""
    return Stack(prompt=asked.prompt(LEFT[0], RIGHT[0], ""), seed=asked.seed)


def added(given: Mapping[str, Path], work: Path, asked: Asked) -> Stack:
    """All three everywhere, as every program adds them."""
    uses = tuple(DeltaUse(file=str(path)) for path in given.values())
    return Stack(prompt=asked.prompt(*SAID, f"{STYLE[1]}, "), seed=asked.seed, deltas=uses)


def regional(given: Mapping[str, Path], work: Path, asked: Asked) -> Stack:
    """Each subject's delta and prompt in its half, the style everywhere."""
    halves = tuple(
        replace(half, prompt=f"{STYLE[1]}, a {said} {BACKGROUND_PHRASES[asked.ground]}, on the {half.name}")
        for half, said in zip(HALVES, SAID, strict=True)
    )
    where = {LEFT[0]: "left", RIGHT[0]: "right"}
    uses = tuple(DeltaUse(file=str(path), region=where.get(name, "")) for name, path in given.items())
    return replace(added(given, work, asked), deltas=uses, regions=halves)


def attended(given: Mapping[str, Path], work: Path, asked: Asked) -> Stack:
    """As `regional`, but in one forward: cross-attentions read in each half a prompt with the word of its subject alone."""
    said = ((SAID[0], RIGHT[0]), (LEFT[0], SAID[1]))
    halves = tuple(replace(half, prompt=asked.prompt(*pair, f"{STYLE[1]}, ")) for half, pair in zip(HALVES, said, strict=True))
    return replace(regional(given, work, asked), regions=halves, regional="attention")


def in_turns(given: Mapping[str, Path], work: Path, asked: Asked) -> Stack:
    """One in every step, in turn."""
    return replace(added(given, work, asked), combine="switch")


def averaged(given: Mapping[str, Path], work: Path, asked: Asked) -> Stack:
    """Each in a forward of its own, their guidance averaged."""
    return replace(added(given, work, asked), combine="composite")


def _merged(method: str, *flags: str) -> Way:
    def way(given: Mapping[str, Path], work: Path, asked: Asked) -> Stack:
        target = work / f"merged-{method}.safetensors"
        if not target.is_file():
            if main("delta", ["merge", *map(str, given.values()), "--output", str(target), "--method", method, *flags]):
                raise SystemExit(1)
        return replace(added(given, work, asked), deltas=(DeltaUse(file=str(target)),))

    way.__doc__ = f"Merged beforehand by `vgm-delta merge --method {method}`."
    return way


PROMPTS = (f"a photo of a {SAID[0]}", f"a photo of a {SAID[1]}", f"{STYLE[1]}, a red car on grass")
WAYS: Mapping[str, tuple[str, Way]] = {
    "base": ("the base", plainly),
    "plain": ("added up", added),
    "noise": ("in regions", regional),
    "attention": ("regional prompts", attended),
    "switch": ("in turns", in_turns),
    "composite": ("guidance averaged", averaged),
    "fusion": ("gradient fusion", _merged("fusion", "--base", "toybox", "--prompts", *PROMPTS)),
    "ties": ("TIES", _merged("ties")),
}


@dataclass(frozen=True)
class Judge:
    """The oracles with renders of what is asked for: the same halves, in the same style."""

    oracles: Oracles
    references: tuple[Tensor, Tensor]
    """Left halves and right halves of renders of both."""
    real: Tensor

    @staticmethod
    def make() -> "Judge":
        """Render what is compared with, and what real renders of it reach."""
        known, other = (render(list(_scenes(24, seed))).image for seed in (7001, 7002))
        return Judge(Oracles.load(), _halves(known), other)

    def identities(self, pictures: Tensor) -> dict[str, Tensor]:
        """How like the left halves are to the robot and to the mug, and the right ones to the mug and to the robot, (B,)."""
        left, right = _halves(pictures)
        flipped = tuple(half.flip(2) for half in self.references)
        return {
            "left": self.oracles.identity(left, self.references[0]),
            "right": self.oracles.identity(right, self.references[1]),
            "left leak": self.oracles.identity(left, flipped[1]),
            "right leak": self.oracles.identity(right, flipped[0]),
        }

    def score(self, pictures: Tensor, asked: Sequence[Asked], base: dict[str, float]) -> Score:
        """Judge pictures (B, P, Q, 3)."""
        found, real = _means(self.identities(pictures)), _means(self.identities(self.real))
        reading = self.oracles.read(pictures)
        style = float(reading.probabilities["style"][:, HEADS["style"].index(STYLE[0])].mean())
        grounds = [read == one.ground for read, one in zip(reading.words("background"), asked, strict=True)]
        way = {key: (found[key] - base[key]) / (real[key] - base[key]) for key in ("left", "right")}
        leak = max(found[f"{side} leak"] - real[f"{side} leak"] for side in ("left", "right"))
        return Score(way["left"], way["right"], max(0.0, leak), style, sum(grounds) / len(grounds))


def _scenes(count: int, seed: int) -> list[Scene]:
    """Both subjects beside one another, in the style, in lights and places of their own."""
    pairs = zip(*(subject_scenes(name, count, seed=seed) for name in (LEFT[0], RIGHT[0])), strict=True)
    toys = ((subject_named(LEFT[0]).toy, "left"), (subject_named(RIGHT[0]).toy, "right"))
    return [
        replace(
            one,
            toys=tuple(
                replace(toy, position=side, size="small", turn=scene.toys[0].turn)
                for (toy, side), scene in zip(toys, (one, other), strict=True)
            ),
            background=BACKGROUNDS[i % len(BACKGROUNDS)],
            style=STYLE[0],
        )
        for i, (one, other) in enumerate(pairs)
    ]


def _halves(pictures: Tensor) -> tuple[Tensor, Tensor]:
    middle = pictures.shape[2] // 2
    return pictures[:, :, :middle].contiguous(), pictures[:, :, middle:].contiguous()


def _means(found: Mapping[str, Tensor]) -> dict[str, float]:
    return {key: float(values.mean()) for key, values in found.items()}


def drawn(base: Base, way: Way, given: Mapping[str, Path], work: Path, asked: Sequence[Asked]) -> Tensor:
    """Draw the pictures of a way, (B, P, Q, 3) uint8."""
    stacks = [replace(way(given, work, one), guidance=base.guidance(), controls=one.controls) for one in asked]
    pictures = [generate(base, stack, tell=lambda text: None)[0].image for stack in stacks]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))


def outlined(adapter: Path, work: Path, count: int) -> list[tuple[ControlUse, ...]]:
    """Write masks of renders, and say for each that the adapter reads it."""
    masks = [Image.fromarray(mask.numpy()) for mask in (render(_scenes(count, 7003)).mask > 0).to(torch.uint8) * 255]
    places = [work / f"outline-{i}.png" for i in range(count)]
    for mask, place in zip(masks, places, strict=True):
        mask.save(place)
    return [(ControlUse(network=str(adapter.absolute()), image=str(place.absolute())),) for place in places]


def measure(output: Path, count: int, ways: Sequence[str], adapter: Path | None) -> None:
    """Train, draw, judge, and write the table and the grid."""
    base, judge, given = load("toybox"), Judge.make(), files(output)
    base.pipe.set_progress_bar_config(disable=True)
    controls = [()] * count if adapter is None else outlined(adapter, output, count)
    asked = [Asked(BACKGROUNDS[i % len(BACKGROUNDS)], 100 + i, controls[i]) for i in range(count)]
    tag = "together" if adapter is None else "together-outlined"
    table: dict[str, dict[str, float]] = {}
    columns: list[list[Image.Image]] = []
    alone: dict[str, float] = {}
    for name in ways:
        pictures = drawn(base, WAYS[name][1], given, output, asked)
        alone = alone or _means(judge.identities(pictures))
        table[name] = {key: round(value, 3) for key, value in asdict(judge.score(pictures, asked, alone)).items()}
        columns.append([Image.fromarray(picture.numpy()) for picture in pictures[:4]])
        print(name, json.dumps(table[name]), flush=True)
    real = judge.score(judge.real, [Asked(scene.background, 0) for scene in _scenes(24, 7002)], alone)
    table["renders"] = {key: round(value, 3) for key, value in asdict(real).items()}
    (output / f"{tag}.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    columns.append([Image.fromarray(picture.numpy()) for picture in judge.real[:4]])
    rows = [[column[i] for column in columns] for i in range(4)]
    heads = [*(WAYS[name][0] for name in ways), "real renders"]
    write_image(grid(rows, heads, [BACKGROUND_PHRASES[one.ground] for one in asked[:4]]), output / f"{tag}.png")


def run() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/together"))
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--adapter", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    ways = ["base", *(way for way in args.ways.split(",") if way != "base")]
    measure(args.output, args.count, ways, args.adapter)


if __name__ == "__main__":
    run()
