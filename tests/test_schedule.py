import itertools
import math
from typing import get_args

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

from clipward.diffusion.schedule import Schedule, Scheduler, SkipType, half_log_snr, time_travel
from clipward.errors import InputError


@pytest.mark.parametrize(("name", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_alpha_bar_is_that_of_diffusers(name: str, theirs: str) -> None:
    reference = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule=theirs).alphas_cumprod
    ours = Schedule.from_name(name).alpha_bar
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, reference.double(), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("skip_type", get_args(SkipType))
@pytest.mark.parametrize("n", [1, 2, 7, 50, 300, 800])
def test_exactly_n_steps_that_meet_and_never_repeat(skip_type: str, n: int, name: str) -> None:
    steps = Schedule.from_name(name).steps(n, Scheduler(skip_type=skip_type))
    assert len(steps) == n
    assert 0 <= steps[-1].t <= steps[0].t < 1000
    assert all(step.t > step.s for step in steps)
    assert all(a.s == b.t for a, b in itertools.pairwise(steps))
    assert steps[-1].s == -1
    assert steps[-1].alpha_bar_s == 1


@pytest.mark.parametrize("skip_type", ["leading", "trailing", "uniform2"])
@pytest.mark.parametrize("n", [1, 2, 7, 60, 99, 100])
def test_equal_strides_end_once(skip_type: str, n: int) -> None:
    schedule = Schedule.from_name("linear", 100)
    steps = schedule.steps(n, Scheduler("ddim", skip_type, equal_strides=True))
    assert [step.s for step in steps].index(-1) == n - 1
    assert all(step.t - step.s == 100 // n for step in steps[:-1])
    above = steps[-1].t - 100 // n  # as diffusers' DDIM, which may not reach data where n does not divide T
    assert steps[-1].alpha_bar_s == (schedule.alpha_bar[above] if above >= 0 else 1)
    kept = schedule.steps(n, Scheduler("ddim", skip_type, equal_strides=True, to_data=False))
    assert kept[-1].alpha_bar_s == schedule.alpha_bar[max(above, 0)]


def test_where_the_skip_types_go() -> None:
    schedule = Schedule.from_name("linear")

    def times(skip_type: str) -> list[int]:
        return [step.t for step in schedule.steps(50, Scheduler(skip_type=skip_type))]

    assert times("uniform") == list(range(980, -1, -20))
    assert (times("uniform2")[0], times("uniform2")[-1]) == (999, 0)
    assert (times("quad")[0], times("quad")[-3:]) == (800, [2, 1, 0])
    assert times("trailing") == list(range(999, 0, -20))
    for skip_type in ("karras", "logsnr"):
        assert (times(skip_type)[0], times(skip_type)[-2:]) == (999, [1, 0])
    assert all(
        schedule.steps(1, Scheduler(skip_type=skip_type))[0].t == 999
        for skip_type in ("uniform2", "trailing", "karras", "logsnr")
    )


THEIR_SPACING = {
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "logsnr": {"use_lu_lambdas": True},
}


@pytest.mark.parametrize("skip_type", THEIR_SPACING)
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("n", [1, 3, 7, 10, 15, 20, 24, 30, 50])
def test_the_times_are_those_of_diffusers(skip_type: str, name: str, n: int) -> None:
    """Wherever diffusers' differ from one another."""
    theirs = {"cosine": "squaredcos_cap_v2"}.get(name, name)
    options = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": theirs, **THEIR_SPACING[skip_type]}
    scheduler = DPMSolverMultistepScheduler(1000, **options)
    schedule = Schedule.from_name(name)
    scheduler.alphas_cumprod = schedule.alpha_bar  # in float64, so that both round alike
    scheduler.register_to_config(beta_schedule="linear")  # it would not round those of a cosine
    scheduler.set_timesteps(n)
    times, ours = scheduler.timesteps.tolist(), [step.t for step in schedule.steps(n, Scheduler(skip_type=skip_type))]
    if len(set(times)) == n:
        assert ours == times
    else:
        assert sum(t in times for t in ours) >= len(set(times)) / 2


def test_where_rounded_times_meet_they_move_to_the_next() -> None:
    times = [step.t for step in Schedule.from_name("cosine").steps(16, Scheduler(skip_type="karras"))]
    assert times[:6] == [999, 998, 997, 996, 995, 994]


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_half_the_log_snr_is_what_diffusers_calls_lambda(name: str) -> None:
    schedule = Schedule.from_name(name)
    for a in schedule.alpha_bar[[0, 500, 999]].tolist():
        assert half_log_snr(a) == pytest.approx(math.log(a**0.5 / (1 - a) ** 0.5), abs=1e-9)
    assert half_log_snr(1.0) == math.inf


def test_the_posterior_variance_is_that_of_ho_et_al() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - betas, 0)
    step = Schedule.from_name("linear").step(500, 499)
    assert step.beta == pytest.approx(betas[500].item())
    expected = betas[500] * (1 - alpha_bar[499]) / (1 - alpha_bar[500])
    assert step.posterior_variance == pytest.approx(expected.item())
    assert Schedule.from_name("linear").step(0, -1).posterior_variance == 0


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_last_step_has_the_variance_of_the_one_before(name: str) -> None:
    schedule = Schedule.from_name(name)
    for n in (2, 50, 1000):
        *_, before, last = schedule.steps(n)
        assert last.variance_floor == before.posterior_variance
    assert schedule.steps(1)[-1].variance_floor == schedule.step(1, 0).posterior_variance
    assert Schedule.from_name(name, 1).steps(1)[-1].variance_floor > 0


def test_time_travel_goes_back_up_and_ends_at_the_data() -> None:
    steps = Schedule.from_name("cosine").steps(3)
    walk = [(step.t, step.s) for step in time_travel(steps, 2)]
    assert walk == [(666, 333), (333, 666), (666, 333), (333, 0), (0, 333), (333, 0), (0, -1)]
    assert time_travel(steps, 1) == steps


@pytest.mark.parametrize(
    ("n", "skip_type", "message"),
    [
        (0, "uniform", "skip_steps: got 0, expected 1 to 1000"),
        (1001, "uniform", "skip_steps: got 1001, expected 1 to 1000"),
        (801, "quad", "skip_steps: got 801, expected at most 800 for skip_type quad"),
        (1001, "karras", "skip_steps: got 1001, expected 1 to 1000"),
        (5, "log", "skip_type: got 'log', expected one of uniform, uniform2, leading, quad, trailing, karras, logsnr"),
    ],
)
def test_bad_steps_are_refused(n: int, skip_type: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Schedule.from_name("linear").steps(n, Scheduler(skip_type=skip_type))


def test_a_schedule_that_does_not_fall_is_refused() -> None:
    with pytest.raises(InputError):
        Schedule([0.9, 0.9, 0.1])
    with pytest.raises(InputError):
        Schedule.from_name("sigmoid")
