"""One run from its configuration to its folder: set up, train, check, save."""

import os
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from vgm_peft.data import Cache, Report, View, describe_views
from vgm_peft.digests import digest_of_file
from vgm_peft.errors import ConfigError
from vgm_peft.families import outline, size_of
from vgm_peft.family import Base, fitting_threads
from vgm_peft.score import Scorer
from vgm_peft.scores import TABLE as SCORERS
from vgm_peft.scores import scorer_named
from vgm_peft.train import loop
from vgm_peft.train.checkpoint import restore, thin
from vgm_peft.train.config import RunConfig
from vgm_peft.train.durable import write_text
from vgm_peft.train.exam import Examiner
from vgm_peft.train.folder import RECIPE, choose_folder, claimed
from vgm_peft.train.learned import Beginning, demand_changed, demand_learned, fingerprints, patience
from vgm_peft.train.manifest import describe, write_manifest
from vgm_peft.train.optimisers import check_optimiser
from vgm_peft.train.origin import origin
from vgm_peft.train.probe import GATE_DRAWS
from vgm_peft.train.recipes import portable
from vgm_peft.train.report import write_report
from vgm_peft.train.survey import keep, kept_when_refused, plan, survey
from vgm_peft.train.task import Setup, Task, own_chance

if TYPE_CHECKING:
    from accelerate import Accelerator

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class RunResult:
    """What a run left behind."""

    folder: Path
    delta: Path | None
    """The file (or, for a side network, the folder) that was trained; `None` when the run was interrupted."""
    steps: int
    """Steps done, those before a resume included."""
    finished: bool
    weights: str = ""
    """Which step's were taken and why, in plain words."""
    samples: tuple[Path, ...] = ()
    """Previews drawn."""
    notices: tuple[str, ...] = ()
    """What the user should know."""
    prompts: tuple[str, ...] = ()
    """Prompts to try the result with."""
    main: bool = True
    """False in all but one of several processes."""


def train(config: RunConfig, *, resume: Path | None = None, base: Base | None = None) -> RunResult:
    """Train, and return where everything is.

    `resume` is the folder of an interrupted run of the same configuration; the result is then that of a run that was never
    interrupted, byte for byte. `base` saves loading the one that the configuration names; it comes back as it was, on the
    run's device and in its precision. Raises `VgmError` for what the user can mend.
    """
    accelerator = _accelerator(config)
    check_optimiser(config.optimiser, accelerator.device.type, config.ema)
    scorer = _scorer(config)
    folder = _agree(accelerator, resume or choose_folder(config))
    with ExitStack() as cleanup:
        cleanup.enter_context(own_chance(accelerator.device))
        cleanup.enter_context(_deterministic(config))
        if accelerator.is_main_process:
            cleanup.enter_context(claimed(folder, resume is not None))
        with kept_when_refused(folder) if accelerator.is_main_process and resume is None else nullcontext():
            report, views = _read(config, base, quiet=not accelerator.is_main_process)
        cache = Cache(gib=config.data.cache_gib)
        cleanup.callback(cache.close)
        setup = Setup(config, _ready(config, base, accelerator, cleanup), cache, accelerator, cleanup, surveyed=report)
        cleanup.enter_context(fitting_threads(setup.base.denoiser))
        _remark(setup)
        with _main_first(accelerator):
            task = config.task_class().prepare(setup)
            examiner = Examiner(task, setup, scorer) if scorer else None
        desk = loop.set_up(task, setup, folder, examiner)
        state = desk.state
        beginning = Beginning(fingerprints(state.parameters), desk.judge.probe.losses(GATE_DRAWS))
        state.origin = origin(config, setup.base.digest, task.facts()["data"], scorer.digest if scorer else "")
        facts = {**describe(config, setup.base, state, accelerator), **task.facts(), "notices": setup.notices}
        if examiner:
            facts["scores"] = examiner.facts()
        if resume is not None and restore(desk.checkpoints, state, setup.notice) is None and accelerator.is_main_process:
            print("note: there is no checkpoint yet: the run begins again")  # not kept: it says nothing of the result
        if accelerator.is_main_process:
            write_text(folder / RECIPE, portable(config, folder))
            keep(report, views or plan(report, config, size_of(setup.base)), folder)
            write_manifest(folder, facts)
            cleanup.callback(write_report, folder)  # however it ends
        finished, done = loop.run(desk), state.step
        delta, weights = _conclude(task, desk, facts, beginning) if finished else (None, "")
        accelerator.wait_for_everyone()
        drawn, notices, prompts = tuple(desk.previews.drawn), tuple(setup.notices), tuple(desk.previews.prompts())
        return RunResult(folder, delta, done, finished, weights, drawn, notices, prompts, accelerator.is_main_process)


def _read(config: RunConfig, base: Base | None, quiet: bool) -> tuple[Report, list[View]]:
    """Judge the pictures before the base is loaded, and say what they are; no views where only a loaded base tells its size."""
    report = survey(config, quiet)
    size = size_of(base) if base else outline(config.base).size
    views = plan(report, config, size) if size else []
    if not quiet:
        print("\n".join([str(report), *(describe_views(report.examples, views) if views else [])]), flush=True)
    return report, views


def _scorer(config: RunConfig) -> Scorer | None:
    """Load what is to score pictures, before any weight of the base is read. Raises `VgmError` for what the user can mend."""
    plan = config.scores
    if not plan.every:
        return None
    if config.task_class().exam is Task.exam:
        raise ConfigError(f"scores.every is set, but {config.task.name} runs have no scores", fix="set held_out.every instead")
    if plan.by is None:
        raise ConfigError(
            f"scores.every is set, but not what scores pictures of {config.base}",
            expected="scores.by = one of " + ", ".join(SCORERS),
            fix='for example --set scores.by=clip --set scores.model="openai/clip-vit-large-patch14"',
        )
    return scorer_named(plan.by).load(plan.model)


def _accelerator(config: RunConfig) -> "Accelerator":
    """Make the accelerator; one process on a CPU is its smallest case."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    # Accelerate keeps the first run's precision for the life of the process; a second run may want another.
    cast(Any, AcceleratorState)._reset_state()
    cast(Any, GradientState)._reset_state()
    precision = config.compute.precision
    if precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError('compute.precision = "fp16" needs a GPU', expected='"no" or "bf16" on this machine')
    return Accelerator(mixed_precision=precision, gradient_accumulation_steps=config.accumulation)


def _ready(config: RunConfig, base: Base | None, accelerator: "Accelerator", cleanup: ExitStack) -> Base:
    """Load the base, frozen, on the device and in the precision of the run; the VAE stays in float32."""
    from vgm_peft.families import load

    base = base or load(config.base)
    base.freeze()
    dtype = DTYPES[config.compute.precision]
    for name, module in base.pipe.components.items():
        if isinstance(module, nn.Module):
            module.to(accelerator.device)
            if dtype != torch.float32 and name in base.family.parts:
                module.to(dtype)
    if config.compute.gradient_checkpointing:
        cast(Any, base.denoiser).enable_gradient_checkpointing()
        cleanup.callback(cast(Any, base.denoiser).disable_gradient_checkpointing)
    return base


@contextmanager
def _deterministic(config: RunConfig) -> Generator[None]:
    """Have a GPU take only algorithms that give the same bits every time, where that is asked for."""
    before = torch.are_deterministic_algorithms_enabled()
    if config.compute.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _agree(accelerator: "Accelerator", folder: Path) -> Path:
    """The main process's choice of folder, for all."""
    if accelerator.num_processes == 1:
        return folder
    from accelerate.utils import broadcast_object_list

    return Path(broadcast_object_list([str(folder)])[0])


@contextmanager
def _main_first(accelerator: "Accelerator") -> Generator[None]:
    """Let the main process fill the cache before the others read it."""
    with accelerator.main_process_first():
        yield


def _remark(setup: Setup) -> None:
    """Note what the user should know of the settings on this machine."""
    config = setup.config
    if setup.device.type == "cpu" and config.compute.precision == "bf16":
        setup.notice('bf16 is many times slower on most CPUs: --set compute.precision="no" there')
    if config.held_out.every and not config.held_out.pictures:
        setup.notice("no pictures are kept back: the held-out loss is that of the training pictures, with unseen noise")


def _conclude(task: Task[Any], desk: loop.Desk, facts: Mapping[str, object], beginning: Beginning) -> tuple[Path | None, str]:
    """Go back to the best step where one was sought, demand that something was learned, and save it; also say which it is."""
    config, state, done = desk.config, desk.state, desk.state.step
    if desk.judge.decides:
        desk.accelerator.wait_for_everyone()  # the main process writes it
        restore(desk.judge.folder, state, desk.notices.append)
    demand_learned(state, beginning.values, patience(config))
    with state.average.in_place():
        demand_changed(beginning.answers, desk.judge.probe.losses(GATE_DRAWS))
    weights = desk.judge.verdict(state, done)
    return _save(task, desk, {**facts, "weights": weights}), weights


def _save(task: Task[Any], desk: loop.Desk, facts: Mapping[str, object]) -> Path | None:
    """Save what was trained, or its moving average, and complete the manifest."""
    if not desk.accelerator.is_main_process:
        return None
    with desk.state.average.in_place():
        path = task.save(desk.folder)
    made = path.rglob("*") if path.is_dir() else [path, *(desk.folder / "exports").rglob("*")]
    files = sorted(p for p in made if p.is_file())
    digests = {p.relative_to(desk.folder).as_posix(): digest_of_file(p) for p in files}
    write_manifest(desk.folder, {**facts, "result": digests})
    kept = desk.config.checkpoint  # of a run that was killed as it removed one, there may still be more than it keeps
    thin(desk.checkpoints, min(kept.leave, kept.keep))  # only now: until the result is there, they are all there is
    return path
