"""Training and judging every run of a plan that is not done yet; what is done stays done, whatever interrupts it."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgm_peft.bench.plan import Plan, Record, Trial
from vgm_peft.bench.times import step_times
from vgm_peft.train.durable import saving, write_text

if TYPE_CHECKING:
    from vgm_peft.bench.judge import Judge
    from vgm_peft.family import Base

Say = Callable[[str], None]


class Stopped(Exception):
    """The user has stopped a training; what was done before it is kept."""


def run(plan: Plan, say: Say = print) -> list[Record]:
    """Do what is left of a plan and return the records of all of it, in its order, each with its method's `step_ms`.

    One line is said per run, with the time that the rest will take. A run that was interrupted is begun again. Raises
    `ConfigError` before anything is trained for a mistake in any configuration, and for a record with other settings;
    `Stopped` when a training is interrupted.
    """
    trials = plan.trials()
    done = {trial.name: record for trial in trials if (record := trial.kept()) is not None}
    for trial in trials:
        trial.config()
    left = [trial for trial in trials if trial.name not in done]
    say(f"{len(trials)} runs, {len(done)} done; records are in {plan.output / 'runs'}")
    with saving(plan.output):
        (plan.output / "runs").mkdir(parents=True, exist_ok=True)
    judges: dict[str, Judge] = {}
    started = time.monotonic()
    for number, trial in enumerate(left, 1):
        record = done[trial.name] = _done(trial, _base(), _judge(judges, _base(), trial))
        say(_progress(record, number, len(left), time.monotonic() - started))
    times = step_times(plan, _base, say)
    return [{**done[trial.name], "step_ms": times[trial.method]} for trial in trials]


@cache
def _base() -> "Base":
    from vgm_peft.families import load

    return load("toybox")


def base_record(plan: Plan, subject: str) -> Path:
    """Where the scores of the untouched base are kept, and beside it its picture."""
    return plan.output / "runs" / f"{subject}-base.json"


def _judge(judges: "dict[str, Judge]", base: "Base", trial: Trial) -> "Judge":
    """The judge of a subject; the base's own scores are kept with the records."""
    from vgm_peft.bench.judge import Judge
    from vgm_peft.picture import write_image

    if trial.subject not in judges:
        judges.clear()  # subjects come one after another
        judge = judges[trial.subject] = Judge(base, trial.subject, trial.plan.pictures, trial.plan.sampling_steps)
        path = base_record(trial.plan, trial.subject)
        write_image(judge.picture(token=""), path.with_suffix(".png"))
        write_text(path, json.dumps({"scores": asdict(judge.base_scores())}, indent=2) + "\n")
    return judges[trial.subject]


def _done(trial: Trial, base: "Base", judge: "Judge") -> Record:
    """Train, judge, draw, and keep the record, in this order."""
    from vgm_peft.formats import read
    from vgm_peft.picture import write_image
    from vgm_peft.stack import attach
    from vgm_peft.train.run import train

    started = time.monotonic()
    with saving(trial.folder):
        shutil.rmtree(trial.folder, ignore_errors=True)
    result = train(trial.config(), base=base)
    if result.delta is None:
        raise Stopped
    with attach(base.pipe, result.delta):
        scores = judge.scores()
        write_image(judge.picture(), trial.picture)
    record: dict[str, Any] = {
        "method": trial.method,
        "subject": trial.subject,
        "seed": trial.seed,
        "steps": result.steps,
        "scores": asdict(scores),
        "trained": read(result.delta).count(),
        "file_bytes": result.delta.stat().st_size,
        "minutes": round((time.monotonic() - started) / 60, 2),
        "settings": trial.settings(),
    }
    trial.keep(record)
    return record


def _progress(record: Record, number: int, count: int, seconds: float) -> str:
    scores, rest = record["scores"], seconds / number * (count - number)
    told = f"identity {scores['identity']:.2f}, prompt {scores['prompt']:.2f}, drift {scores['drift']:.3f}"
    left = f"; about {rest / 60:.0f} min left" if number < count else ""
    who = f"{record['subject']} {record['method']} seed {record['seed']}"
    return f"[{number}/{count}] {who}: {told} ({record['minutes']:.1f} min){left}"
