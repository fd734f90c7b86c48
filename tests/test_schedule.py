import itertools

import pytest
import torch
from diffusers import DDPMScheduler

from clipward.diffusion.schedule import Schedule, time_travel
from clipward.errors import InputError


@pytest.mark.parametrize(("name", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_alpha_bar_is_that_of_diffusers(name: str, theirs: str) -> None:
    reference = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule=theirs).alphas_cumprod
    ours = Schedule.from_name(name).alpha_bar
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, reference.double(), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("skip_type", ["uniform", "uniform2", "quad"])
@pytest.mark.parametrize("n", [1, 2, 7, 50, 300, 800])
def test_exactly_n_steps_that_meet_and_never_repeat(skip_type: str, n: int) -> None:
    steps = Schedule.from_name("linear").steps(n, skip_type)
    assert len(steps) == n
    assert all(step.t > step.s for step in steps)
    assert all(a.s == b.t for a, b in itertools.pairwise(steps))
    assert steps[-1].s == -1
    assert steps[-1].alpha_bar_s == 1


def test_where_the_skip_types_go() -> None:
    schedule = Schedule.from_name("linear")

    def times(skip_type: str) -> list[int]:
        return [step.t for step in schedule.steps(50, skip_type)]

    assert times("uniform") == list(range(980, -1, -20))
    assert (times("uniform2")[0], times("uniform2")[-1]) == (999, 0)
    assert (times("quad")[0], times("quad")[-3:]) == (800, [2, 1, 0])


def test_the_posterior_variance_is_that_of_ho_et_al() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - betas, 0)
    step = Schedule.from_name("linear").step(500, 499)
    assert step.beta == pytest.approx(betas[500].item())
    expected = betas[500] * (1 - alpha_bar[499]) / (1 - alpha_bar[500])
    assert step.posterior_variance == pytest.approx(expected.item())
    assert Schedule.from_name("linear").step(0, -1).posterior_variance == 0


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
        (5, "log", "'log'"),
    ],
)
def test_bad_steps_are_refused(n: int, skip_type: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Schedule.from_name("linear").steps(n, skip_type)


def test_a_schedule_that_does_not_fall_is_refused() -> None:
    with pytest.raises(InputError):
        Schedule([0.9, 0.9, 0.1])
    with pytest.raises(InputError):
        Schedule.from_name("sigmoid")
