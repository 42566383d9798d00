"""Losses, weights, timesteps and masks against their formulas; what a run says of itself while it goes."""

import pytest
import torch
from torch import nn

from tests.train.ground import tiny_base
from vgm_peft.errors import ConfigError
from vgm_peft.process import Process
from vgm_peft.train.config import bind
from vgm_peft.train.config_learning import LossConfig
from vgm_peft.train.journal import Taken
from vgm_peft.train.losses import averaged, errors, huber_bound, timesteps, weights
from vgm_peft.train.objective import Lesson, Objective
from vgm_peft.train.task import Turn
from vgm_peft.train.watch import PAUSE, Watch

EPS = Process.of({"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
V = Process("v_prediction", EPS.alphas)
T = torch.tensor([0, 10, 500, 999])


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_pseudo_huber_is_a_square_for_small_errors_and_a_size_for_large(schedule: str) -> None:
    plain = LossConfig(kind="huber", huber_schedule=schedule)  # type: ignore[arg-type]
    smooth = LossConfig(kind="smooth-l1", huber_schedule=schedule)  # type: ignore[arg-type]
    c = huber_bound(T, EPS, plain).view(-1, 1)
    zero = torch.zeros(4, 1)
    tiny, huge = zero + 1e-2 * c.float(), zero + 1e3
    assert torch.allclose(errors(tiny, zero, T, EPS, plain), tiny**2, rtol=1e-3)
    assert torch.allclose(errors(huge, zero, T, EPS, plain), (2 * c * huge).float(), rtol=2e-3)
    assert torch.allclose(errors(huge, zero, T, EPS, smooth), 2 * huge, rtol=2e-3)


def test_the_bound_falls_from_the_picture_to_the_noise() -> None:
    for schedule, ends in {"exponential": (1.0, 0.1), "snr": (0.95, 0.1)}.items():
        bound = huber_bound(torch.arange(1000), EPS, LossConfig(huber_schedule=schedule))  # type: ignore[arg-type]
        assert torch.all(bound.diff() < 0) and bound[0] == pytest.approx(ends[0], abs=0.05)
        assert bound[-1] == pytest.approx(ends[1], abs=0.006)


@pytest.mark.parametrize(
    ("config", "formula"),
    [
        (LossConfig(min_snr=5.0), lambda snr: snr.clamp(max=5.0) / snr),
        (LossConfig(debiased=True), lambda snr: snr**-0.5),
        (LossConfig(p2=1.0), lambda snr: 1 / (1 + snr)),
        (LossConfig(p2=0.5), lambda snr: (1 + snr) ** -0.5),
    ],
    ids=["min-snr", "debiased", "p2", "p2 half"],
)
def test_weights_are_those_of_their_papers_and_the_same_objective_for_v(config: LossConfig, formula) -> None:  # noqa: ANN001
    of_noise, of_v = weights(T, EPS, config), weights(T, V, config)
    assert of_noise is not None and of_v is not None
    snr = EPS.alphas[T] / (1 - EPS.alphas[T])
    assert torch.allclose(of_noise, formula(snr).float())
    assert torch.allclose(of_v, (formula(snr) * snr / (snr + 1)).float())
    ended = weights(torch.tensor([999]), Process.of({**CONFIG_OF_V}, True), config)
    assert ended is not None and bool(torch.isfinite(ended).all())


CONFIG_OF_V = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "v_prediction"}


def test_nothing_weighs_by_default_and_two_weights_are_refused() -> None:
    assert weights(T, EPS, LossConfig()) is None
    with pytest.raises(ConfigError, match="min_snr and p2 both"):
        bind({"loss": {"min_snr": 5.0, "p2": 1.0}})


def _drawn(config: LossConfig, count: int = 20_000) -> torch.Tensor:
    t = timesteps(count, torch.Generator().manual_seed(0), EPS, config)
    assert t.dtype == torch.int64 and int(t.min()) >= 0 and int(t.max()) <= 999
    return t.double()


def test_plain_timesteps_are_the_ones_they_always_were() -> None:
    assert torch.equal(
        _drawn(LossConfig()).long(), torch.randint(0, 1000, (20_000,), generator=torch.Generator().manual_seed(0))
    )


@pytest.mark.parametrize("stratified", [False, True])
def test_distributions_have_their_quantiles(stratified: bool) -> None:
    """1 % of 1000 steps: three times the deviation of a quantile of 20,000 draws."""
    shares = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    normal = torch.special.ndtri(shares)
    expected = {
        LossConfig(timesteps="logit-normal", logit_mean=0.5, logit_std=0.8, stratified=stratified): torch.sigmoid(
            0.5 + 0.8 * normal
        ),
        LossConfig(timesteps="cubic", stratified=stratified): 1 - (1 - shares) ** 3,
        LossConfig(shift=3.0, stratified=stratified): 3 * shares / (1 + 2 * shares),
        LossConfig(timestep_range=(0.25, 0.75), stratified=stratified): 0.25 + 0.5 * shares,
    }
    for config, quantiles in expected.items():
        found = torch.quantile(_drawn(config), shares) / 1000
        assert torch.allclose(found, quantiles, atol=0.01), config


def test_a_range_is_kept_to() -> None:
    for kind in ("uniform", "logit-normal", "cubic"):
        t = _drawn(LossConfig(timesteps=kind, timestep_range=(0.2, 0.3)))  # type: ignore[arg-type]
        assert int(t.min()) >= 200 and int(t.max()) <= 299
    with pytest.raises(ConfigError, match="timestep_range"):
        bind({"loss": {"timestep_range": [0.5, 0.5]}})


def test_a_masked_loss_is_the_mean_over_the_mask() -> None:
    error = torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 1, 8, 8)
    mask[0, :, :4], mask[1] = 1.0, 0.5
    found = averaged(error, mask)
    assert torch.allclose(found, torch.stack([error[0, :, :4].mean(), error[1].mean(), torch.tensor(0.0)]))
    assert torch.allclose(averaged(error, torch.ones(3, 1, 8, 8)), averaged(error, None))


def test_no_gradient_comes_from_behind_a_mask() -> None:
    base, turn = tiny_base("sd15"), Turn(0, 0)
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1.0
    objective = Objective.of(base, LossConfig())
    with torch.no_grad():
        condition = base.family.encode_prompt(base, ["a robot"] * 2)
    seen: list[torch.Tensor] = []

    def teacher(query, target: torch.Tensor) -> torch.Tensor:  # noqa: ANN001
        seen.append(target.clone().requires_grad_())
        return seen[-1]

    objective.losses(Lesson(x0, condition, torch.zeros(2, 6), mask), turn, teacher=teacher).sum().backward()
    gradient = seen[0].grad
    assert gradient is not None and not bool(gradient[..., 4:].any()) and bool(gradient[..., :4].all())


def _steps(watch: Watch, losses: list[float], first: int = 1) -> dict[int, tuple[str, ...]]:
    said = {i: watch.step(i, Taken(loss, 0.1, 1.0), set()) for i, loss in enumerate(losses, first)}
    return {step: texts for step, texts in said.items() if texts}


def test_spikes_are_told_and_ordinary_scatter_is_not() -> None:
    """Losses as diffusion has them: over orders of magnitude by timestep alone."""
    draw = torch.Generator().manual_seed(0)
    usual = torch.exp(torch.randn(500, generator=draw) - 3).tolist()
    parameters = {"a/w": nn.Parameter(torch.zeros(1))}
    assert not _steps(Watch(parameters, 4), usual)
    steady = [0.1 + 0.001 * (i % 7) for i in range(100)]
    steady[50], steady[51], steady[50 + PAUSE] = 1.0, 1.0, 2.0
    said = _steps(Watch(parameters, 4), steady)
    assert list(said) == [51, 51 + PAUSE] and "10 times its usual" in said[51][0]
    resumed = Watch(parameters, 4)
    resumed.replay([{"step": i, "loss": loss, "norm": 1.0} for i, loss in enumerate(steady[:60], 1)])
    assert _steps(resumed, steady[60:], 61) == {51 + PAUSE: said[51 + PAUSE]}


def test_parts_without_a_gradient_are_named_once() -> None:
    parameters = {f"{unit}/w": nn.Parameter(torch.zeros(2)) for unit in ("alive", "dead")}
    watch, waiting = Watch(parameters, 3), {"alive", "dead"}
    said: list[str] = []
    for step in range(1, 8):
        parameters["alive/w"].grad = torch.ones(2)
        parameters["dead/w"].grad = torch.zeros(2)
        watch.gradients(waiting)
        said += watch.step(step, Taken(0.1, 0.1, 1.0), waiting)
    assert waiting == {"dead"} and len(said) == 1 and said[0].endswith("1 of 2 parts yet: dead")


def test_two_lessons_in_one_count_where_each_did() -> None:
    base = tiny_base("sd15")
    half = torch.zeros(1, 1, 4, 4)
    half[..., :2] = 1.0
    condition = base.family.encode_prompt(base, ["a toy"])
    masked = Lesson(torch.zeros(1, 4, 4, 4), condition, torch.zeros(1, 6), half)
    whole = Lesson(torch.ones(1, 4, 4, 4), condition, torch.ones(1, 6))
    both = masked + whole
    assert both.mask is not None and torch.equal(both.mask, torch.cat([half, torch.ones(1, 1, 4, 4)]))
    assert torch.equal(both.x0, torch.cat([masked.x0, whole.x0])) and len(both.condition) == 2
    assert (whole + whole).mask is None
