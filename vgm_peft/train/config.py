"""What a run is: one complete, printable configuration, in frozen dataclasses by owner.

`bind` turns a nested table (defaults < recipe < flags, see `recipes.py`) into a `RunConfig`; `table` turns it back, with
every value spelt out, so that the `run.toml` in a run's folder repeats the run. What only one task or one method knows
(`task.token`, `delta.rank`) is declared by that task or method and bound here without being named.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from vgm_peft.config import Table, build, to_table
from vgm_peft.errors import ConfigError, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from vgm_peft.delta import Patch
    from vgm_peft.train.task import Task

Schedule = Literal["constant", "linear", "cosine", "polynomial", "inverse_sqrt"]
Precision = Literal["no", "bf16", "fp16"]


def within(name: str, value: float, low: float, high: float) -> None:
    """Raise `ConfigError` unless `low <= value <= high` (so never for what is not a number)."""
    if not (math.isfinite(value) and low <= value <= high):
        raise ConfigError(f"{name} = {value}", expected=f"{low:g} .. {high:g}" if high < 1e4 else f"at least {low:g}")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """`[task]`: what the run is for; the further keys of the table are the task's own options."""

    name: str = "dreambooth"
    """A line of the tasks table: `dreambooth`, `finetune`, `textual-inversion`, `controlnet`."""
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
class DataConfig:
    """`[data]`: the pictures and how they become batches."""

    images: str = ""
    """The folder of pictures; captions stand beside them in `.txt` files or in `metadata.jsonl`."""
    resolution: int = 0
    """Side in pixels of the square whose area every bucket keeps; 0 is the size that the base was made for."""
    buckets: bool = True
    """Sort pictures by aspect into buckets of about the same area; off: one square, centre crop."""
    batch: int = 1
    """Pictures per micro-batch and process."""
    flip: bool = False
    """Mirror pictures at random. Off by default: text, faces and logos suffer."""
    caption_dropout: float = 0.0
    """Share of captions replaced by the empty one, 0 .. 1, which keeps guidance working in long runs (0.1 is usual)."""

    def __post_init__(self) -> None:
        within("resolution", self.resolution, 0, 16384)
        within("batch", self.batch, 1, 65536)
        within("caption_dropout", self.caption_dropout, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """`[optimiser]`: how parameters follow their gradients."""

    name: Literal["adamw"] = "adamw"
    lr: float = 1e-4
    """Learning rate at its peak."""
    text_lr: float | None = None
    """Learning rate of text encoders; `lr` when left out. Half of `lr` or less is usual."""
    schedule: Schedule = "constant"
    """How the rate goes from its peak to the end of the run."""
    warmup: int = 0
    """Steps in which the rate rises linearly from near 0 to its peak."""
    weight_decay: float = 1e-2
    """Decoupled decay (Loshchilov & Hutter 2019, arXiv 1711.05101), per unit of learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 1.0
    """Largest norm of all gradients together; larger ones are scaled down to it. 0 is no limit."""

    def __post_init__(self) -> None:
        within("lr", self.lr, 0.0, 100.0)
        within("text_lr", self.text_lr or 0.0, 0.0, 100.0)
        within("warmup", self.warmup, 0, 10**9)
        within("weight_decay", self.weight_decay, 0.0, 100.0)
        within("eps", self.eps, 1e-16, 1.0)
        within("clip", self.clip, 0.0, 1e9)
        for name, beta in zip(("first", "second"), self.betas, strict=True):
            within(f"the {name} of betas", beta, 0.0, 0.9999999)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """`[loss]`: the denoising objective."""

    min_snr: float | None = None
    """Gamma of the min-SNR weight (arXiv 2303.09556 eq. 8; 5 is usual): nearly clean steps count less. Left out: none."""
    noise_offset: float = 0.0
    """Noise that is the same all over a channel, as a share of the noise; 0.02 .. 0.1 helps very dark and bright pictures."""
    zero_terminal_snr: bool | None = None
    """Rescale the noise schedule so that the last step holds no picture (arXiv 2305.08891). Left out: as the base says."""
    stratified: bool = False
    """Spread the timesteps of a batch evenly over the schedule instead of drawing each alone: less noisy gradients."""

    def __post_init__(self) -> None:
        within("min_snr", 5.0 if self.min_snr is None else self.min_snr, 1e-6, 1e6)
        within("noise_offset", self.noise_offset, 0.0, 10.0)


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """`[compute]`: what the arithmetic costs; the trained parameters are float32 whatever stands here."""

    precision: Precision = "no"
    """`no` is float32; `bf16` or `fp16` keep the frozen base in that type and compute in it."""
    gradient_checkpointing: bool = False
    """Compute the denoiser's activations twice instead of keeping them: about a third slower, far less memory."""


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
    guidance: float = 5.0

    def __post_init__(self) -> None:
        within("every", self.every, 0, 10**9)
        within("count", self.count, 0, 64)
        within("steps", self.steps, 1, 1000)
        within("guidance", self.guidance, 0.0, 100.0)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """`[checkpoint]`: what lets a run go on after it was stopped."""

    every: int = 0
    """Steps between two checkpoints; 0 is only when the run is interrupted."""
    keep: int = 2
    """How many to keep, the newest ones."""

    def __post_init__(self) -> None:
        within("every", self.every, 0, 10**9)
        within("keep", self.keep, 1, 10**6)


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
    """Formats to write beside the native file, such as `kohya` and `diffusers`."""
    data: DataConfig = DataConfig()
    delta: DeltaConfig | None = None
    """Present when the task trains a delta; left out: the defaults."""
    optimiser: OptimiserConfig = OptimiserConfig()
    loss: LossConfig = LossConfig()
    compute: ComputeConfig = ComputeConfig()
    preview: PreviewConfig = PreviewConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self) -> None:
        within("steps", self.steps, 1, 10**9)
        within("accumulation", self.accumulation, 1, 10**6)
        within("seed", self.seed, 0, 2**63 - 1)
        within("ema", self.ema, 0.0, 0.999999)
        if self.optimiser.warmup >= self.steps:
            raise ConfigError(
                f"optimiser.warmup = {self.optimiser.warmup} of {self.steps} steps",
                expected="fewer warm-up steps than steps",
                fix="the rate would never reach its peak",
            )

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
    if not task.trains_delta:
        if config.delta is not None:
            raise ConfigError(f"{where}delta is set, but {config.task.name} trains no delta", fix="leave it out")
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
