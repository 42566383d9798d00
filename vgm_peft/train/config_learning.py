"""`[optimiser]`, `[loss]`, `[held_out]`, `[scores]`: how a run learns, what it minimises, when it has learned enough."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from vgm_peft.errors import ConfigError
from vgm_peft.scores import USUAL, scorer_named
from vgm_peft.train.limits import within

Schedule = Literal["constant", "linear", "cosine", "polynomial", "inverse_sqrt"]


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """`[optimiser]`: how parameters follow their gradients."""

    name: str = "adamw"
    """A line of the optimisers table: `adamw`, `adafactor`, or one of the extra `optimisers`: `adamw8bit`, `lion`,
    `prodigy`, `schedule-free`, `came`."""
    lr: float = 1e-4
    """Learning rate at its peak; for `prodigy`, which finds the rate itself, a multiple of it: 1 is usual."""
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
    options: Mapping[str, object] = field(default_factory=dict[str, object])
    """`[optimiser.options]`: further arguments of the optimiser's own class, by its own names, such as `d_coef`."""

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

    kind: Literal["mse", "huber", "smooth-l1"] = "mse"
    """How an error counts; the two others are the pseudo-Huber losses of arXiv 2403.16728, which outliers pull less."""
    huber_c: float = 0.1
    """Errors far above it count by their size instead of its square, 0 .. 1."""
    huber_schedule: Literal["snr", "exponential", "constant"] = "snr"
    """How that bound falls with the noise: as the signal does, exponentially from 1 to `huber_c`, or not."""
    min_snr: float | None = None
    """Gamma of the min-SNR weight (arXiv 2303.09556 eq. 8; 5 is usual): nearly clean steps count less. Left out: none."""
    debiased: bool = False
    """Weigh by 1/sqrt(SNR) (arXiv 2310.08442): very noisy steps count more."""
    p2: float = 0.0
    """Gamma of the P2 weight 1/(1 + SNR)^gamma (arXiv 2204.00227; 0.5 .. 1 is usual); 0 is none."""
    noise_offset: float = 0.0
    """Noise that is the same all over a channel, as a share of the noise; 0.02 .. 0.1 helps very dark and bright pictures."""
    zero_terminal_snr: bool | None = None
    """Rescale the noise schedule so that the last step holds no picture (arXiv 2305.08891). Left out: as the base says."""
    stratified: bool = False
    """Spread the timesteps of a batch evenly over the schedule instead of drawing each alone: less noisy gradients."""
    timesteps: Literal["uniform", "logit-normal", "cubic"] = "uniform"
    """How timesteps are drawn: alike, most from the middle (arXiv 2403.03206), or most from the noisy end (2302.08453)."""
    logit_mean: float = 0.0
    """Of `logit-normal`: below 0 is nearer to the picture, above 0 nearer to the noise."""
    logit_std: float = 1.0
    shift: float = 1.0
    """Above 1 timesteps move towards the noise, as larger pictures need (arXiv 2403.03206 eq. 23); 3 is usual there."""
    timestep_range: tuple[float, float] = (0.0, 1.0)
    """The part of the schedule that is trained, from the picture (0) to the noise (1)."""

    def __post_init__(self) -> None:
        within("huber_c", self.huber_c, 1e-6, 1.0)
        within("min_snr", 5.0 if self.min_snr is None else self.min_snr, 1e-6, 1e6)
        within("p2", self.p2, 0.0, 10.0)
        within("noise_offset", self.noise_offset, 0.0, 10.0)
        within("logit_mean", self.logit_mean, -10.0, 10.0)
        within("logit_std", self.logit_std, 1e-3, 10.0)
        within("shift", self.shift, 0.01, 100.0)
        first, last = self.timestep_range
        within("the first of timestep_range", first, 0.0, 1.0)
        within("the last of timestep_range", last, 0.0, 1.0)
        if first >= last:
            raise ConfigError(f"timestep_range = {list(self.timestep_range)}", expected="the first below the last")
        weights = [n for n, on in (("min_snr", self.min_snr is not None), ("debiased", self.debiased), ("p2", self.p2)) if on]
        if len(weights) > 1:
            raise ConfigError(f"{' and '.join(weights)} both weigh the timesteps", expected="one of them")


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """`[held_out]`: a loss that is measured, always on the same noise, and never trained on; the best step is the result."""

    every: int = 0
    """Steps between two measurements; 0 is none."""
    pictures: int = 0
    """Pictures kept back from training to measure on; 0 measures on the training pictures, with noise that they never saw."""
    draws: int = 8
    """Batches for one measurement, each with a noise and timesteps of its own."""
    stop_when_worse: int = 0
    """Stop after so many measurements in a row that were worse than the best; 0 goes on to the last step."""

    def __post_init__(self) -> None:
        within("every", self.every, 0, 10**9)
        within("pictures", self.pictures, 0, 10**6)
        within("draws", self.draws, 1, 10_000)
        within("stop_when_worse", self.stop_when_worse, 0, 10**6)
        if not self.every and (self.pictures or self.stop_when_worse):
            name = "pictures" if self.pictures else "stop_when_worse"
            raise ConfigError(f"{name} is set, but nothing is measured", fix="set every, for example every = 50")


@dataclass(frozen=True, kw_only=True)
class ScoresConfig:
    """`[scores]`: pictures are drawn on the way, always from the same noise, and read; the best step by that is the result."""

    every: int = 0
    """Steps between two measurements; 0 is none."""
    by: str | None = None
    """What reads them: `oracles` (on the Toybox, where it may be left out), `clip` or `dino`."""
    model: str = ""
    """Folder or hub id of the network that `clip` and `dino` read with."""
    prompts: tuple[str, ...] = ()
    """They ask for what is learned; left out: what the task suggests."""
    others: tuple[str, ...] = ()
    """They ask for what should stay as it was: of their pictures the drift is taken; left out: what the task suggests."""
    pictures: int = 6
    """Pictures of what is learned, and as many of others, drawn for one measurement."""
    steps: int = 15
    guidance: float | None = None
    """Classifier-free guidance, 0 .. 100; the base's own when left out."""
    decide: bool = True
    """Take the step of the highest total (`score.Scores.total`) for the best, and not that of the lowest held-out loss."""
    stop_when_worse: int = 0
    """Stop after so many measurements in a row that were worse than the best; 0 goes on to the last step."""

    def __post_init__(self) -> None:
        within("every", self.every, 0, 10**9)
        within("pictures", self.pictures, 1, 1000)
        within("steps", self.steps, 1, 1000)
        within("guidance", self.guidance or 0.0, 0.0, 100.0)
        within("stop_when_worse", self.stop_when_worse, 0, 10**6)
        if self.by is not None:
            scorer_named(self.by)
        if self.stop_when_worse and not (self.every and self.decide):
            what = "the scores do not decide" if self.every else "nothing is measured"
            raise ConfigError(f"stop_when_worse is set, but {what}", fix="set decide = true" if self.every else "set every")

    def settled(self, base: str) -> "ScoresConfig":
        """The same with `by` filled in, where something is known for this base."""
        return replace(self, by=USUAL.get(base)) if self.every and self.by is None else self
