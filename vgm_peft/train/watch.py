"""What is said while a run goes: a loss or gradient far out of its usual range, and parts that no gradient reaches.

The loss of a diffusion model varies by orders of magnitude with the timestep, so the usual range is taken on the logarithm,
from the median and the median deviation, which a few outliers do not move (Hampel 1974). Parts are looked at only until their
first gradient, so after a few steps watching costs nothing.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from torch import nn

from vgm_peft.train.journal import Taken

WINDOW, FEWEST = 64, 16
"""Steps that the usual range is taken from, and how many there must be before it is known."""
FAR, TIMES = 6.0, 4.0
"""A spike is this many robust deviations above the median of the logarithms, and at least this many times the median."""
PAUSE = 25
"""Steps between two warnings of the same thing."""
SIGMA = 1.4826
"""Standard deviation of a normal variable as a multiple of its median deviation."""


class Watch:
    """Looks at every step of one run. What it says depends on the steps alone, resumed or not."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], patience: float, late: frozenset[str] = frozenset()) -> None:
        """Watch the units of these parameters (named `unit/parameter`); `patience` steps before silence is remarked upon.

        Those that are `late`, trained in a later part of the run alone, may be silent.
        """
        self._late = late
        self.units: dict[str, list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            self.units.setdefault(unit_of(name), []).append(parameter)
        self.patience = math.ceil(patience)
        self._ranges = {"loss": _Range("loss"), "norm": _Range("gradient")}

    def replay(self, history: Iterable[Mapping[str, Any]]) -> None:
        """Take in the journal's lines of the steps that were done before."""
        for line in history:
            self._judge(int(line["step"]), {name: float(line[name]) for name in self._ranges})

    def gradients(self, waiting: set[str]) -> None:
        """Strike from `waiting` the units that have a gradient now; between backward and the optimiser's step."""
        waiting -= {unit for unit in waiting if any(p.grad is not None and bool(p.grad.any()) for p in self.units[unit])}

    def step(self, step: int, taken: Taken, waiting: set[str]) -> tuple[str, ...]:
        """Return what is to be said after step number `step` (from 1)."""
        said = self._judge(step, {"loss": taken.loss, "norm": taken.norm})
        if (silent := waiting - self._late) and step == self.patience:
            said.append(f"no gradient has reached {len(silent)} of {len(self.units)} parts yet: {some(sorted(silent))}")
        return tuple(said)

    def _judge(self, step: int, values: Mapping[str, float]) -> list[str]:
        return [text for name, value in values.items() if (text := self._ranges[name].judge(step, value))]


class _Range:
    """The usual range of one number."""

    def __init__(self, name: str) -> None:
        self.name, self._logs, self._quiet_until = name, deque[float](maxlen=WINDOW), 0

    def judge(self, step: int, value: float) -> str:
        """Take in a value; return what is odd about it, if anything."""
        log = math.log(max(value, 1e-30))
        middle = median(self._logs) if len(self._logs) >= FEWEST else math.inf
        spread = SIGMA * median(abs(x - middle) for x in self._logs) if math.isfinite(middle) else 0.0
        self._logs.append(log)
        if log - middle <= max(math.log(TIMES), FAR * spread) or step < self._quiet_until:
            return ""
        self._quiet_until = step + PAUSE
        return f"the {self.name} is {value:.3g}, {math.exp(log - middle):.0f} times its usual {math.exp(middle):.3g}"


def unit_of(name: str) -> str:
    """The unit that a parameter belongs to."""
    return name.rsplit("/", 1)[0]


def some(names: Sequence[str], most: int = 8) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
