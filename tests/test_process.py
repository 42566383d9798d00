"""`Process` against diffusers' DDPMScheduler, and the loss weights against their formulas."""

from typing import Any, Literal, cast

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from vgm_peft.errors import BaseModelError
from vgm_peft.process import Process

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
Kind = Literal["epsilon", "v_prediction"]


def config(schedule: str = "scaled_linear", kind: Kind = "epsilon", **more: object) -> dict[str, Any]:
    return {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": schedule,
        "prediction_type": kind,
        **more,
    }


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(5, 4, 8, 8, generator=generator), torch.randn(5, 4, 8, 8, generator=generator)
    return x0, noise, torch.tensor([0, 1, 333, 750, 999])


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_agrees_with_diffusers(schedule: str, zero: bool) -> None:
    settings = config(schedule, "v_prediction", rescale_betas_zero_snr=zero)
    ours, theirs = Process.of(settings), DDPMScheduler(**settings)
    # Theirs is a product of a thousand float32 factors; ours is float64, so the difference is theirs.
    alphas = cast(Tensor, cast(Any, theirs).alphas_cumprod)
    torch.testing.assert_close(ours.alphas.float(), alphas, rtol=2e-5, atol=3e-6)
    given = Process("v_prediction", alphas.double())
    x0, noise, t = drawn()
    torch.testing.assert_close(given.corrupt(x0, noise, t), theirs.add_noise(x0, noise, cast(Any, t)), rtol=0, atol=1e-6)
    torch.testing.assert_close(given.target(x0, noise, t), theirs.get_velocity(x0, noise, cast(Any, t)), rtol=0, atol=1e-6)


def test_trained_betas_are_taken_as_they_are() -> None:
    ours = Process.of(config(trained_betas=[0.1, 0.2, 0.5]))
    torch.testing.assert_close(ours.alphas, torch.tensor([0.9, 0.72, 0.36], dtype=torch.float64))


def test_zero_terminal_snr_ends_at_nothing_and_begins_where_it_began() -> None:
    plain, zero = Process.of(config(kind="v_prediction")), Process.of(config(kind="v_prediction"), zero_terminal_snr=True)
    assert zero.alphas[-1] == 0 and zero.snr(torch.tensor([999])) == 0
    torch.testing.assert_close(zero.alphas[0], plain.alphas[0])
    assert (zero.alphas.diff() < 0).all()
    off = Process.of(config(kind="v_prediction", rescale_betas_zero_snr=True), zero_terminal_snr=False)
    assert torch.equal(off.alphas, plain.alphas)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_clean_inverts(kind: Kind) -> None:
    process = Process.of(config(kind=kind))
    x0, noise, t = (v.double() if v.is_floating_point() else v for v in drawn())
    noisy, target = process.corrupt(x0, noise, t), process.target(x0, noise, t)
    torch.testing.assert_close(process.clean(noisy, target, t), x0, rtol=0, atol=1e-12)


def test_clean_survives_the_last_step_of_zero_terminal_snr() -> None:
    process = Process.of(config(kind="v_prediction"), zero_terminal_snr=True)
    x0, noise, _ = drawn()
    t = torch.full((5,), 999)
    noisy = process.corrupt(x0, noise, t)
    assert torch.equal(noisy, noise), "the last step holds no signal"
    torch.testing.assert_close(process.clean(noisy, process.target(x0, noise, t), t), x0)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 1e9])
def test_min_snr_is_the_formula(gamma: float) -> None:
    t = torch.arange(1000)
    for kind, below in (("epsilon", lambda snr: snr), ("v_prediction", lambda snr: snr + 1)):
        process = Process.of(config(kind=cast(Kind, kind)))
        snr = process.alphas / (1 - process.alphas)
        expected = torch.minimum(snr, torch.tensor(gamma, dtype=torch.float64)) / below(snr)
        torch.testing.assert_close(process.weight(t, gamma), expected.float())
        assert torch.equal(process.weight(t), torch.ones(1000))
    zero = Process.of(config(kind="v_prediction"), zero_terminal_snr=True)
    assert zero.weight(torch.tensor([999]), gamma) == 0 and zero.weight(t, gamma).isfinite().all()


def test_min_snr_weighs_both_predictions_alike_on_x0() -> None:
    """Either prediction's error is an error of x0 times a known rate: the weighted losses are the same loss."""
    t = torch.tensor([10, 400, 900])
    e, v = Process.of(config()), Process.of(config(kind="v_prediction"))
    snr = e.snr(t)
    # |eps error|^2 = snr |x0 error|^2; |v error|^2 = (snr + 1) |x0 error|^2.
    torch.testing.assert_close(e.weight(t, 5.0).double() * snr, v.weight(t, 5.0).double() * (snr + 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (config(kind=cast(Kind, "sample")), "epsilon or v_prediction"),
        (config("sigmoid"), "beta_schedule"),
        (config(rescale_betas_zero_snr=True), "zero-terminal SNR with epsilon"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BaseModelError, match=words):
        Process.of(settings)
