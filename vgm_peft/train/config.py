"""What a run is: one complete, printable configuration, in frozen dataclasses by owner.

`bind` turns a nested table (defaults < recipe < flags, see `recipes.py`) into a `RunConfig`; `table` turns it back, with
every value spelt out, so that the `run.toml` in a run's folder repeats the run. What only one task or one method knows
(`task.token`, `delta.rank`) is declared by that task or method and bound here without being named.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from vgm_peft.config import Table, build, to_table
from vgm_peft.errors import ConfigError, nearest
from vgm_peft.train.config_data import ConceptConfig, DataConfig, check_concepts
from vgm_peft.train.config_learning import HeldOutConfig, LossConfig, OptimiserConfig, ScoresConfig
from vgm_peft.train.limits import within

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from vgm_peft.delta import Patch
    from vgm_peft.train.task import Task

Precision = Literal["no", "bf16", "fp16"]
OFTEN = (50, 500)
"""Fewest and most steps between two checkpoints where nobody says how many. One costs what a few steps cost: 0.1 s for a
LoRA of the Toybox (3 MiB), 0.9 s for one of SDXL at rank 16 (263 MiB, both measured on a busy machine of two cores).
"""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """`[task]`: what the run is for; the further keys of the table are the task's own options."""

    name: str = "dreambooth"
    """A line of the tasks table: `dreambooth`, `finetune`, `textual-inversion`, `controlnet`."""
    start: str = ""
    """Side networks: the saved one, a folder or file, that the run goes on from; left out: a fresh one."""
    options: Mapping[str, object] = field(default_factory=dict[str, object])
    """The task's own options; written as further keys of `[task]`."""


@dataclass(frozen=True, kw_only=True)
class DeltaConfig:
    """`[delta]`: what is trained and where; the further keys of the table are the method's own options."""

    kind: str = "lora"
    """A line of the deltas table."""
    sites: tuple[str, ...] = ()
    """Which layers: names of the family's presets (`attention`, `attention+mlp`, `conv`, `all`) or patterns; `-` takes away.
    Left out: those that the method's literature trains."""
    rate: float | None = None
    """Learning rate of this method as a multiple of `optimiser.lr`; left out: what the literature uses, relative to LoRA."""
    text: bool = False
    """Train the text encoders too (the preset `text`), at `optimiser.text_lr`; prompts are then encoded at every step."""
    mix: tuple[Mapping[str, object], ...] = ()
    """`[[delta.mix]]`: further methods on other layers, each with its `kind`, `sites` and its own options."""
    options: Mapping[str, object] = field(default_factory=dict[str, object])
    """The method's own options, such as `rank`; written as further keys of `[delta]`."""

    def __post_init__(self) -> None:
        within("rate", 1.0 if self.rate is None else self.rate, 0.0, 1e9)

    def pieces(self) -> "list[DeltaConfig]":
        """The methods of the delta, each with its layers: this one, then those of `mix`."""
        patterns = (*(self.sites or self.method().where), *(("text",) if self.text else ()))
        for i, more in enumerate(self.mix):
            if misplaced := {"mix", "text"} & more.keys():
                raise ConfigError(f'unknown setting "delta.mix[{i}].{min(misplaced)}"')
        more = [build(DeltaConfig, _divided("delta", m), f"delta.mix[{i}].") for i, m in enumerate(self.mix)]
        return [replace(self, sites=patterns, mix=()), *(replace(m, sites=m.sites or m.method().where) for m in more)]

    def method(self) -> "type[Patch]":
        """The method that `kind` names."""
        from vgm_peft.deltas import method_named

        return method_named(self.kind)


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """`[compute]`: what the arithmetic costs; the trained parameters are float32 whatever stands here."""

    precision: Precision = "no"
    """`no` is float32; `bf16` or `fp16` keep the frozen base in that type and compute in it."""
    gradient_checkpointing: bool = False
    """Compute the denoiser's activations twice instead of keeping them: about a third slower, far less memory."""
    deterministic: bool = False
    """On a GPU, only algorithms that give the same bits every time, which a resumed run needs to be exact; slower.
    On a CPU it is always so."""


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """`[preview]`: pictures made on the way, by the base's own pipeline with the delta as it then is."""

    prompts: tuple[str, ...] = ()
    """What to draw; left out: what the task suggests."""
    every: int = 0
    """Steps between two previews; 0 is none on the way, only at the end."""
    count: int = 2
    """Pictures each time, going round the prompts; 0 is no previews at all."""
    steps: int = 25
    guidance: float | None = None
    """Classifier-free guidance, 0 .. 100; the base's own when left out."""

    def __post_init__(self) -> None:
        within("every", self.every, 0, 10**9)
        within("count", self.count, 0, 64)
        within("steps", self.steps, 1, 1000)
        within("guidance", self.guidance or 0.0, 0.0, 100.0)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """`[checkpoint]`: what lets a run go on after it was stopped."""

    every: int | None = None
    """Steps between two checkpoints; 0 is only when the run is interrupted. Left out: a tenth of the run, in `OFTEN`."""
    keep: int = 2
    """How many to keep while the run goes on, the newest ones."""
    leave: int = 1
    """How many to leave when it has ended well: from the last one it can be lengthened by more `--steps`."""

    def __post_init__(self) -> None:
        within("every", self.every or 0, 0, 10**9)
        within("keep", self.keep, 1, 10**6)
        within("leave", self.leave, 1, 10**6)

    def settled(self, steps: int) -> "CheckpointConfig":
        """The same with `every` filled in for a run of so many steps."""
        least, most = OFTEN
        return self if self.every is not None else replace(self, every=min(most, max(least, -(-steps // 10))))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run, completely."""

    task: TaskConfig = TaskConfig()
    base: str = "toybox"
    """`toybox`, a diffusers folder, a single `.safetensors` checkpoint, or a hub id."""
    steps: int = 400
    """Optimiser steps."""
    accumulation: int = 1
    """Micro-batches whose gradients are averaged into one step."""
    seed: int = 0
    """Everything random in the run comes from this number and the step."""
    ema: float = 0.0
    """Decay of the moving average of the parameters, which is then what is saved; 0 is none, 0.99 .. 0.9999 are usual."""
    output: str = ""
    """The run's folder; left out: `runs/<task>-<pictures>-<n>`."""
    exports: tuple[str, ...] = ()
    """Tools to write it for beside the native file, such as `comfyui` and `diffusers`: targets of `vgm-delta export`."""
    data: DataConfig = DataConfig()
    concept: tuple[ConceptConfig, ...] = ()
    """`[[concept]]`: several folders in place of `data.images`."""
    delta: DeltaConfig | None = None
    """Present when the task trains a delta; left out: the defaults, or for side networks none, but the network itself."""
    optimiser: OptimiserConfig = OptimiserConfig()
    loss: LossConfig = LossConfig()
    held_out: HeldOutConfig = HeldOutConfig()
    scores: ScoresConfig = ScoresConfig()
    compute: ComputeConfig = ComputeConfig()
    preview: PreviewConfig = PreviewConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self) -> None:
        within("steps", self.steps, 1, 10**9)
        within("accumulation", self.accumulation, 1, 10**6)
        within("seed", self.seed, 0, 2**63 - 1)
        within("ema", self.ema, 0.0, 0.999999)
        check_concepts(self.concept, self.data.images)
        object.__setattr__(self, "checkpoint", self.checkpoint.settled(self.steps))  # complete, also when printed
        object.__setattr__(self, "scores", self.scores.settled(self.base))
        if self.scores.every and self.scores.decide and self.held_out.stop_when_worse:
            raise ConfigError(
                "held_out.stop_when_worse is set, but the scores decide",
                expected="one of the two",
                fix="set scores.stop_when_worse, or scores.decide = false",
            )
        if self.optimiser.warmup >= self.steps:
            raise ConfigError(
                f"optimiser.warmup = {self.optimiser.warmup} of {self.steps} steps",
                expected="fewer warm-up steps than steps",
                fix="the rate would never reach its peak",
            )

    @property
    def concepts(self) -> tuple[ConceptConfig, ...]:
        """The folders of pictures. Raises `ConfigError` when none is named."""
        if self.concept:
            return self.concept
        if not self.data.images:
            raise ConfigError("no pictures are named", expected="--images DIR (data.images)")
        return (ConceptConfig(images=self.data.images),)

    def task_class(self) -> "type[Task[Any]]":
        """The task that `[task]` names."""
        from vgm_peft.train.tasks import task_named

        return task_named(self.task.name)


def bind(given: Table, where: str = "") -> RunConfig:
    """Bind a nested table to a complete `RunConfig`, the options of task and method included.

    `where` prefixes keys in errors. Raises `ConfigError` for anything unknown (with the nearest name), of a wrong type or
    out of range, before anything is loaded.
    """
    split = {key: _divided(key, inner) if isinstance(inner, dict) else inner for key, inner in given.items()}
    config = build(RunConfig, split, where)
    task = config.task_class()
    config = replace(config, task=replace(config.task, options=_options("task", TaskConfig, task.Options, config.task.options)))
    if config.data.control_dropout and not task.drops_controls:
        raise ConfigError(f"{where}data.control_dropout is set, but nothing that steers {config.task.name} can be left out")
    if config.data.annotator and not task.steered:
        raise ConfigError(f"{where}data.annotator is set, but {config.task.name} learns from no control pictures")
    if config.task.start and not task.continues:
        raise ConfigError(f"{where}task.start is set, but {config.task.name} begins from nothing saved", fix="leave it out")
    if task.trains_delta == "never" and config.delta is not None:
        raise ConfigError(f"{where}delta is set, but {config.task.name} trains no delta", fix="leave it out")
    if task.trains_delta != "always" and config.delta is None:
        return config
    delta = config.delta or DeltaConfig()
    first, *more = (replace(p, rate=p.method().rate if p.rate is None else p.rate) for p in delta.pieces())
    mix = tuple(
        {"kind": p.kind, "sites": p.sites, "rate": p.rate} | _delta_options(f"delta.mix[{i}]", p) for i, p in enumerate(more)
    )
    sites = delta.sites or delta.method().where
    return replace(config, delta=replace(delta, sites=sites, rate=first.rate, options=_delta_options("delta", first), mix=mix))


def _divided(section: str, inner: Mapping[str, object]) -> Mapping[str, object]:
    """Set the further keys of `[task]` and `[delta]`, which only the task or method knows, apart under `options`."""
    owner = _OWNERS.get(section)
    if owner is None:
        return inner
    own = {f.name for f in fields(owner)} - {"options"}
    return {k: inner[k] for k in inner if k in own} | {"options": {k: v for k, v in inner.items() if k not in own}}


_OWNERS: Mapping[str, "type[DataclassInstance]"] = {"task": TaskConfig, "delta": DeltaConfig}


def _delta_options(section: str, piece: DeltaConfig) -> Table:
    return _options(section, DeltaConfig, piece.method().Options, piece.options)


def _options(section: str, owner: type, options: type, given: Mapping[str, object]) -> Table:
    """Bind the further keys of a section to the options that its task or method declares; return them all, spelt out."""
    own = [f.name for f in fields(owner) if f.name != "options"]
    known = [f.name for f in fields(options) if f.init]
    for key in given:
        if key not in known:
            raise ConfigError(f'unknown setting "{section}.{key}"', fix=nearest(key, own + known))
    return to_table(build(options, given, f"{section}."))


def table(config: RunConfig) -> Table:
    """Return the configuration as a nested table with every value spelt out; `bind` of it gives an equal configuration."""
    out = to_table(config)
    for section in ("task", "delta"):
        inner = out.get(section)
        if isinstance(inner, dict):
            options = cast(Table, inner.pop("options"))
            out[section] = inner | options
    return out
