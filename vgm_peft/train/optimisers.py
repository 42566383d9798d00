"""The optimisers by name, each from the library of those who made it; a new one is a line in the table.

Adafactor: Shazeer & Stern 2018, arXiv 1804.04235. Lion: 2302.06675. Prodigy: 2306.06101. Schedule-free: 2405.15682.
CAME: 2307.02047. 8-bit AdamW: 2110.02861.
"""

import importlib
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vgm_peft.errors import ConfigError, nearest
from vgm_peft.train.config_learning import OptimiserConfig
from vgm_peft.train.task import Group


@dataclass(frozen=True)
class Kind:
    """Where an optimiser comes from and what it must be told."""

    module: str
    name: str
    extra: str = ""
    """The extra of this package that brings its library."""
    takes: tuple[str, ...] = ("weight_decay",)
    """Which settings of `[optimiser]` its class knows, besides the rate."""
    always: Mapping[str, object] = field(default_factory=dict[str, object])
    device: str = ""
    """The only device that it runs on, where there is one."""
    one_rate: bool = False
    """Whether all parameters must have the same rate."""
    averages: bool = False
    """Whether the parameters to use are not those to train: it has a mode for each, and needs no schedule."""


ADAM = ("betas", "eps", "weight_decay")
TABLE: Mapping[str, Kind] = {
    # One fused kernel for all tensors: on a CPU the plain per-tensor loop costs a LoRA step as much as a tenth of its time.
    "adamw": Kind("torch.optim", "AdamW", takes=ADAM, always={"fused": True}),
    "adafactor": Kind("torch.optim", "Adafactor"),
    "adamw8bit": Kind("bitsandbytes.optim", "AdamW8bit", "adamw8bit", ADAM, device="cuda"),
    "lion": Kind("lion_pytorch", "Lion", "optimisers", ("betas", "weight_decay")),
    "prodigy": Kind("prodigyopt", "Prodigy", "optimisers", ADAM, one_rate=True),
    "schedule-free": Kind("schedulefree", "AdamWScheduleFree", "optimisers", ADAM, averages=True),
    "came": Kind("came_pytorch", "CAME", "optimisers"),
}


def kind_named(name: str) -> Kind:
    """Return a line of the table. Raises `ConfigError` with the nearest known name."""
    if name not in TABLE:
        raise ConfigError(f'optimiser.name = "{name}"', fix=nearest(name, list(TABLE)))
    return TABLE[name]


def build_optimiser(groups: Sequence[Group], config: OptimiserConfig) -> torch.optim.Optimizer:
    """Make the optimiser; each of its groups keeps its peak rate under `peak`. Raises `ConfigError`."""
    kind = kind_named(config.name)
    cls: Any = _class(config.name, kind)
    rates = {g.rate for g in groups}
    if kind.one_rate and len(rates) > 1:
        many = ", ".join(f"{rate:g}" for rate in sorted(rates))
        raise ConfigError(
            f"{config.name} finds one rate for all, but the parts have {len(rates)}: {many}",
            fix="take another optimiser, or leave out what sets rates apart (text_lr, delta.rate, LoRA+)",
        )
    tables = [{"params": list(g.parameters.values()), "lr": g.rate, "peak": g.rate, **_own(g, config)} for g in groups]
    try:
        optimiser: Any = cls(tables, lr=config.lr, **_arguments(config, kind, cls))
    except (AssertionError, ValueError, TypeError) as error:
        raise ConfigError(f"optimiser: {config.name} refuses its settings ({str(error) or 'no reason given'})") from None
    if kind.averages:
        optimiser.train()
    return optimiser


def _own(group: Group, config: OptimiserConfig) -> dict[str, object]:
    """What `optim` and the optimiser's class read in a group of parameters."""
    own: dict[str, object] = {"weight_decay": config.weight_decay if group.decay is None else group.decay}
    if group.span != (0.0, 1.0):
        own["span"] = group.span
    if group.length is not None:
        own |= {"length": group.length.kind, "mean_length": group.length.mean}
    return own


def check_optimiser(config: OptimiserConfig, device: str, ema: float) -> None:
    """Raise `ConfigError` for an optimiser that is not there, not for this device, or at odds with other settings."""
    kind = kind_named(config.name)
    _arguments(config, kind, _class(config.name, kind))
    if kind.device and kind.device != device:
        raise ConfigError(f'optimiser.name = "{config.name}" runs on {kind.device} alone', expected=f"another on {device}")
    if kind.averages and (ema or config.schedule != "constant"):
        raise ConfigError(
            f"{config.name} averages and slows down by itself", expected='ema = 0 and optimiser.schedule = "constant"'
        )


def effective(optimiser: torch.optim.Optimizer) -> list[dict[str, object]]:
    """What each group of parameters is really optimised with, the library's own defaults included; for the manifest."""
    plain = (int, float, bool, str, tuple, type(None))
    groups = [{k: v for k, v in group.items() if k != "params" and isinstance(v, plain)} for group in optimiser.param_groups]
    return [{k: str(v) if v in (math.inf, -math.inf) else v for k, v in group.items()} for group in groups]  # JSON has no inf


def _class(name: str, kind: Kind) -> type[torch.optim.Optimizer]:
    try:
        return getattr(importlib.import_module(kind.module), kind.name)
    except ImportError as error:
        library = kind.module.split(".")[0]
        raise ConfigError(
            f'optimiser.name = "{name}" needs {library}, which cannot be imported ({error})',
            fix=f'pip install "vgm_peft[{kind.extra}]"',
        ) from None


def _arguments(config: OptimiserConfig, kind: Kind, cls: type) -> dict[str, Any]:
    """The settings its class takes; those left at our default are, but for the plain one, what its own authors chose."""
    ours = OptimiserConfig()
    given = {name: getattr(config, name) for name in kind.takes}
    if kind is not TABLE[ours.name]:
        given = {name: value for name, value in given.items() if name == "weight_decay" or value != getattr(ours, name)}
    known = [name for name in inspect.signature(cls).parameters if name not in ("params", "lr", *ADAM)]
    for key in config.options:
        if key not in known:
            raise ConfigError(f'unknown setting "optimiser.options.{key}"', fix=nearest(key, known))
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in config.options.items()}
    return {**given, **kind.always, **plain}
