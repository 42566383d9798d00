"""`python -m vgm_peft.toybox evaluate`: load a base, put a delta on it, measure, print."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn, cast

from diffusers import StableDiffusionPipeline
from tqdm import tqdm

from vgm_peft.errors import BaseModelError
from vgm_peft.toybox.assets import asset_folder
from vgm_peft.toybox.cast import subject_named
from vgm_peft.toybox.evaluate import Sampling, SubjectMeasure, TextToImage, closed, measure_prompts, measure_subject
from vgm_peft.toybox.oracle import Oracles
from vgm_peft.toybox.world import heldout_prompts

Report = dict[str, float | int | str]


def _load(base: str) -> StableDiffusionPipeline:
    folder = asset_folder("toybox", "model_index.json") if base == "toybox" else Path(base)
    if not (folder / "model_index.json").is_file():
        raise BaseModelError(f"{base} holds no diffusers pipeline", expected="a folder with model_index.json, or toybox")
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _subject_report(before: SubjectMeasure, after: SubjectMeasure | None) -> Report:
    now = after or before
    report: Report = {
        "subject_count": now.count,
        "identity": now.identity,
        "identity_base": before.identity,
        "identity_real": now.identity_real,
        "backgrounds_kept": now.backgrounds_kept,
        "subject_class_read": now.class_read,
        "plain_class_accuracy": now.class_accuracy,
        "plain_class_accuracy_base": before.class_accuracy,
        "plain_class_identity": now.class_identity,
        "plain_class_identity_base": before.class_identity,
    }
    return report | {"identity_closed": closed(before, after)} if after else report


def evaluate(args: argparse.Namespace) -> Report:
    """Measure as the flags ask."""
    pipe = _load(args.base)
    drawing = cast(TextToImage, pipe)
    how = Sampling(steps=args.steps, seed=args.seed, batch=args.batch)
    if args.guidance is not None:
        how = replace(how, guidance=args.guidance)
    oracles = Oracles.load()
    subject = subject_named(args.subject) if args.subject else None
    before, after, name = None, None, ""
    if subject is not None:
        name = args.token if args.alone else f"{args.token} {subject.class_word}"
        before = measure_subject(drawing, subject, name, how, oracles, args.subject_count)
    report: Report = {"base": args.base}
    if args.delta:
        from vgm_peft.stack import attach

        attach(pipe, args.delta, scale=args.scale)
        report |= {"delta": args.delta, "scale": args.scale}
        if subject is not None:
            after = measure_subject(drawing, subject, name, how, oracles, args.subject_count)
    if args.count:
        prompts = heldout_prompts(args.count, args.seed)
        with tqdm(total=args.count, desc="held-out prompts", unit="picture", disable=args.json) as bar:
            report |= asdict(measure_prompts(drawing, prompts, how, oracles, lambda n: _tick(bar, n)))
    if before is not None:
        report |= {"subject": args.subject} | _subject_report(before, after)
    return report


def _tick(bar: tqdm[NoReturn], count: int) -> None:
    bar.update(count)


def run(args: argparse.Namespace) -> None:
    """Measure and print: JSON, or a line a number."""
    report = evaluate(args)
    if args.json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            print(f"{name:28} {value}")
