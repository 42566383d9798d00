"""Which runs a comparison has, the configuration of each, and where its record lies."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vgm_peft.config import Table, merge
from vgm_peft.digests import digest_of_files
from vgm_peft.errors import ConfigError
from vgm_peft.families import toybox_folder
from vgm_peft.toybox.cast import subject_named
from vgm_peft.toybox.gallery import write_subject
from vgm_peft.train.config import RunConfig
from vgm_peft.train.durable import write_text
from vgm_peft.train.limits import within
from vgm_peft.train.origin import differences, origin
from vgm_peft.train.recipes import resolve

Record = Mapping[str, Any]
DRAWING = ("text_encoder", "unet", "vae")
"""The base's parts without which it draws nothing; its image encoder is none of them."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared."""

    methods: tuple[str, ...]
    subjects: tuple[str, ...] = ("robot",)
    seeds: int = 3
    steps: int | None = None
    """Optimiser steps of every run; `None` is what the recipes say."""
    pictures: int = 24
    """Pictures per measurement, of which each delta has three."""
    sampling_steps: int = 25
    settings: Table
    """Laid over every recipe, as `vgm-train --set` has them."""
    output: Path

    def __post_init__(self) -> None:
        from vgm_peft.deltas import method_named

        within("seeds", self.seeds, 1, 1000)
        within("pictures", self.pictures, 1, 10_000)
        within("sampling_steps", self.sampling_steps, 1, 1000)
        for kind in self.methods:
            method_named(kind)
        for name in self.subjects:
            subject_named(name)
        for name, given in (("methods", self.methods), ("subjects", self.subjects)):
            if not given or len(set(given)) != len(given):
                raise ConfigError(f"{name} = {list(given)}", expected="at least one, and none twice")

    def trials(self) -> list["Trial"]:
        """Every run, seed by seed, so that an early look at the sheet has something of every method."""
        return [
            Trial(self, subject, kind, seed) for subject in self.subjects for seed in range(self.seeds) for kind in self.methods
        ]

    def pictures_of(self, subject: str) -> Path:
        """The folder of five pictures of a subject: the one that ships, or one rendered into the output."""
        shipped = toybox_folder().parent / "subjects" / subject
        if shipped.is_dir():
            return shipped
        made = self.output / "subjects" / subject
        if not made.is_dir():
            write_subject(made, subject)
        return made


@dataclass(frozen=True)
class Trial:
    """One run: a method, a subject, a seed."""

    plan: Plan
    subject: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.subject}-{self.method}-{self.seed}"

    @property
    def record(self) -> Path:
        """The JSON that is written when it is done."""
        return self.plan.output / "runs" / f"{self.name}.json"

    @property
    def picture(self) -> Path:
        """The subject as this delta draws it."""
        return self.record.with_suffix(".png")

    @property
    def folder(self) -> Path:
        """Where `train` works."""
        return self.record.with_suffix("")

    def config(self, over: Table | None = None) -> RunConfig:
        """The method's shipped recipe, or the LoRA's with this method in it; over it the plan's settings, and then `over`."""
        asked: Table = {
            "task": {"name": "dreambooth", "class_prompt": f"a photo of a {subject_named(self.subject).class_word}"},
            "data": {"images": str(self.plan.pictures_of(self.subject))},
            "delta": {"kind": self.method},
            "preview": {"count": 0},
            "seed": self.seed,
            "output": str(self.folder),
        }
        if self.plan.steps is not None:
            asked["steps"] = self.plan.steps
        return resolve(merge(asked, self.plan.settings, over or {})).config

    def settings(self) -> Record:
        """All that decides its result, as it stands in the record."""
        judging = {"the judging": {"pictures": self.plan.pictures, "steps": self.plan.sampling_steps}}
        return json.loads(json.dumps({**origin(self.config(), _base_digest(), self.subject), **judging}))

    def kept(self) -> Record | None:
        """Its record, if it is done. Raises `ConfigError` when that was made with other settings than are asked for now."""
        if not self.record.is_file():
            return None
        try:
            found = json.loads(self.record.read_text(encoding="utf-8"))
            before = found["settings"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{self.record}: no record of a run", fix="delete it, and it is made again") from None
        if changed := differences(before, self.settings()):
            raise ConfigError(
                f"{self.record} was made otherwise (then -> now): {', '.join(changed)}",
                fix="delete it to have it made again, or name another --output",
            )
        return found

    def keep(self, record: Record) -> None:
        """Write the record, last of all: while there is none, the run is not done."""
        write_text(self.record, json.dumps(record, indent=2) + "\n")


@cache
def _base_digest() -> str:
    """SHA-256 over the weights of the embedded base that draw: scores of another one are no part of the comparison."""
    folder = toybox_folder()
    return digest_of_files(sorted(path for part in DRAWING for path in (folder / part).glob("*.safetensors")))
