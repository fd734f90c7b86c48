"""A Gaussian prior with a Gaussian likelihood as the oracle, and the identities of the table, in float64.

Prior x0 ~ N(0, τ²), likelihood y | x0 ~ N(x0, ρ²): the ideal denoiser, the ideal gradients and the posterior
x0 | y ~ N(y·τ²/(τ²+ρ²), τ²ρ²/(τ²+ρ²)) are all in closed form.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from clipward.diffusion.denoiser import Prediction, add_noise, to_eps
from clipward.diffusion.sampling import MakeUpdate, Noise, ancestral, ddim, sample
from clipward.diffusion.schedule import Schedule, Scheduler, Step
from clipward.diffusion.solvers import SOLVERS
from clipward.guidance.core import (
    Clamp,
    GradientGuidance,
    GuidanceError,
    GuidanceInterval,
    GuidedDenoiser,
    RefuseFlat,
    SplitDenoiser,
    Sum,
    grad_clean,
    grad_denoised,
    grad_noisy,
    shift_eps,
    shift_mean,
    shift_x0,
)

TAU2, RHO2, Y = 0.5, 0.25, 0.8
POSTERIOR_MEAN, POSTERIOR_VAR = Y * TAU2 / (TAU2 + RHO2), TAU2 * RHO2 / (TAU2 + RHO2)
SCHEDULE = Schedule.from_name("linear")


def ideal(x: Tensor, step: Step) -> Prediction:
    """E[x0 | x_t] under the prior."""
    a = step.alpha_bar_t
    x0 = a**0.5 * TAU2 / (a * TAU2 + 1 - a) * x
    return Prediction(x0, to_eps(x0, x, a), x.new_tensor(step.posterior_variance))


def spread(step: Step) -> float:
    """Var[x0 | x_t] under the prior."""
    a = step.alpha_bar_t
    return TAU2 * (1 - a) / (a * TAU2 + 1 - a)


def log_likelihood(image: Tensor, step: Step) -> Tensor:
    """log p(y | x_t) as a function of x̂0: y is N(x̂0, ρ² + Var[x0 | x_t])."""
    return -((Y - image) ** 2).flatten(1).sum(dim=1) / (2 * (RHO2 + spread(step)))


def noisy_log_likelihood(image: Tensor, step: Step) -> Tensor:
    """The same as a function of x_t, as a model trained on noisy images knows it."""
    return log_likelihood(ideal(image, step).x0, step)


def land(gradient, objective, shift, update, n: int = 1000) -> Tensor:
    guidance = GradientGuidance(objective, torch.ones(64), gradient, shift)
    *_, last = sample(GuidedDenoiser(ideal, [guidance]), SCHEDULE.steps(n), update, Noise(range(64), (1, 16, 16)))
    return last.x


@pytest.mark.parametrize("update", [ancestral, ddim(1.0)], ids=["ddpm", "ddim eta=1"])
@pytest.mark.parametrize("shift", [shift_mean, shift_eps])
@pytest.mark.parametrize("gradient", [grad_denoised, grad_noisy])
def test_guided_sampling_lands_on_the_posterior(gradient, shift, update) -> None:
    x = land(gradient, log_likelihood if gradient is grad_denoised else noisy_log_likelihood, shift, update)
    assert x.mean().item() == pytest.approx(POSTERIOR_MEAN, abs=0.02)
    assert x.var().item() == pytest.approx(POSTERIOR_VAR, rel=0.05)


def test_score_addition_lands_on_the_posterior_without_noise_too() -> None:
    x = land(grad_denoised, log_likelihood, shift_eps, ddim(0.0))
    assert x.mean().item() == pytest.approx(POSTERIOR_MEAN, abs=0.02)
    assert x.var().item() == pytest.approx(POSTERIOR_VAR, rel=0.05)


def test_the_mean_shift_still_guides_without_noise_and_about_twice_as_hard() -> None:
    x = land(grad_denoised, log_likelihood, shift_mean, ddim(0.0))
    assert x.mean().item() > POSTERIOR_MEAN


def test_unguided_sampling_lands_on_the_prior() -> None:
    *_, last = sample(GuidedDenoiser(ideal, []), SCHEDULE.steps(1000), ancestral, Noise(range(64), (1, 16, 16)))
    assert last.x.mean().item() == pytest.approx(0, abs=0.02)
    assert last.x.var().item() == pytest.approx(TAU2, rel=0.05)


FEW = (10, 20, 50, 250)
FIRST_ORDER: dict[str, MakeUpdate] = {"ancestral": lambda: ancestral, "ddim": lambda: ddim(0.0)}


@pytest.mark.parametrize("n", FEW)
@pytest.mark.parametrize("solver", [*FIRST_ORDER, *SOLVERS])
def test_score_addition_lands_on_the_posterior_mean_in_any_number_of_steps(solver: str, n: int) -> None:
    make_update: MakeUpdate = (FIRST_ORDER | SOLVERS)[solver]
    guidance = GradientGuidance(noisy_log_likelihood, torch.ones(64), grad_noisy, shift_eps)
    denoise, steps = GuidedDenoiser(ideal, [guidance]), SCHEDULE.steps(n, Scheduler(skip_type="trailing"))
    *_, last = sample(denoise, steps, make_update(), Noise(range(64), (1, 16, 16)))
    # with a memory, what is remembered and what guides are of different orders, and their errors do not cancel
    close = 0.01 if solver in FIRST_ORDER else 0.02 if n == 250 else 0.12
    assert last.x.mean().item() == pytest.approx(POSTERIOR_MEAN, abs=close)


@pytest.mark.parametrize("n", FEW)
@pytest.mark.parametrize(("solver", "drift"), [("ddim", math.pi / 2), ("dpmpp_2m", math.pi / 2), ("sde_dpmpp_2m", 2.0)])
def test_a_limit_moves_a_picture_as_far_in_any_number_of_steps(solver: str, drift: float, n: int) -> None:
    """Closed form where data are a unit Gaussian and the limit r always binds, in s = √(1−ᾱ)/√ᾱ and z = x/√ᾱ.

    x̂0 = ᾱ·z + r·√(1−ᾱ), and dz/ds = (z − x̂0)/s without noise, or twice as much with it. From s = ∞, z ends at
    r·∫ds/(1+s²) = r·π/2, or on average at 2r·∫ds/(1+s²)^(3/2) = 2r.
    """

    def unit(x: Tensor, step: Step) -> Prediction:
        x0 = step.alpha_bar_t**0.5 * x
        return Prediction(x0, to_eps(x0, x, step.alpha_bar_t), x.new_tensor(step.posterior_variance))

    def brightness(image: Tensor, step: Step) -> Tensor:
        return image.flatten(1).sum(dim=1)

    make_update: MakeUpdate = (FIRST_ORDER | SOLVERS)[solver]
    guidance = GradientGuidance(brightness, torch.full((64,), 1e6), grad_noisy, shift_eps, limit=0.2)
    denoise, steps = GuidedDenoiser(unit, [guidance]), SCHEDULE.steps(n, Scheduler(skip_type="trailing"))
    *_, last = sample(denoise, steps, make_update(), Noise(range(64), (1, 16, 16)))
    assert last.x.mean().item() / 0.2 == pytest.approx(drift, rel=0.06 + 1.5 / n)


# identities


@pytest.fixture
def moment() -> tuple[Step, Tensor, Prediction, Tensor]:
    """A step, x_t, a prediction and a direction, in float64."""
    step = SCHEDULE.step(600, 580)
    x, x0, g = torch.randn(3, 2, 1, 4, 4, dtype=torch.float64)
    pred = Prediction(x0, to_eps(x0, x, step.alpha_bar_t), torch.tensor(step.posterior_variance, dtype=torch.float64))
    return step, x, pred, g


def no_noise(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def test_shift_mean_moves_the_mean_by_variance_times_gradient(moment) -> None:
    step, x, pred, g = moment
    for update in (ancestral, ddim(0.0), ddim(0.7)):
        before = update(x, pred, step, lambda: no_noise(x))
        after = update(x, shift_mean(pred, g, step), step, lambda: no_noise(x))
        torch.testing.assert_close(after - before, pred.variance * g, rtol=1e-10, atol=1e-12)


def test_shift_eps_adds_the_gradient_to_the_score_and_stays_on_x_t(moment) -> None:
    step, x, pred, g = moment
    shifted = shift_eps(pred, g, step)
    root = (1 - step.alpha_bar_t) ** 0.5
    torch.testing.assert_close(-shifted.eps / root, -pred.eps / root + g)
    torch.testing.assert_close(to_eps(shifted.x0, x, step.alpha_bar_t), shifted.eps)


def test_shift_eps_is_the_whole_guidance_of_ddim_by_dhariwal_and_nichol(moment) -> None:
    step, x, pred, g = moment
    eps = pred.eps - (1 - step.alpha_bar_t) ** 0.5 * g
    x0 = (x - (1 - step.alpha_bar_t) ** 0.5 * eps) / step.alpha_bar_t**0.5
    theirs = step.alpha_bar_s**0.5 * x0 + (1 - step.alpha_bar_s) ** 0.5 * eps
    torch.testing.assert_close(ddim(0.0)(x, shift_eps(pred, g, step), step, lambda: no_noise(x)), theirs)


def test_shift_x0_moves_the_picture_and_leaves_x_t(moment) -> None:
    step, x, pred, g = moment
    shifted = shift_x0(pred, g, step)
    torch.testing.assert_close(shifted.x0 - pred.x0, g)
    torch.testing.assert_close(add_noise(shifted.x0, shifted.eps, step.alpha_bar_t), x)


def test_the_three_gradients_agree_up_to_the_jacobian(moment) -> None:
    step, x, _, _ = moment
    x = x.requires_grad_()
    pred = ideal(x, step)
    jacobian = pred.x0.detach().flatten()[0] / x.detach().flatten()[0]
    through = grad_denoised(log_likelihood, pred, x, step)
    torch.testing.assert_close(through, grad_noisy(noisy_log_likelihood, pred, x, step))
    torch.testing.assert_close(through, jacobian * grad_clean(log_likelihood, pred, x, step))


def test_a_clamp_stays_on_x_t_and_stops_the_gradient_of_what_it_saturates(moment) -> None:
    step, x, _, _ = moment
    x = x.requires_grad_()
    pred = ideal(x, step)
    pred = pred._replace(x0=3 * pred.x0)
    clamped = Clamp()(pred, x, step)
    assert clamped.x0.abs().max() <= 1
    torch.testing.assert_close(to_eps(clamped.x0, x, step.alpha_bar_t), clamped.eps)
    gradient = grad_denoised(log_likelihood, clamped, x, step)
    assert torch.equal(gradient == 0, pred.x0.abs() > 1)


# per image


def test_each_image_has_its_own_weight_and_0_leaves_it_as_it_was() -> None:
    weight = torch.tensor([0.0, 1.0, 3.0])
    x, step = torch.randn(3, 1, 4, 4), SCHEDULE.step(400, 380)
    guided = GuidedDenoiser(ideal, [GradientGuidance(log_likelihood, weight, grad_denoised, shift_mean)])(x, step)
    plain = GuidedDenoiser(ideal, [])(x, step)
    assert torch.equal(guided.x0[0], plain.x0[0])
    for i in (1, 2):
        one = GradientGuidance(log_likelihood, weight[i : i + 1], grad_denoised, shift_mean)
        alone = GuidedDenoiser(ideal, [one])(x[i : i + 1], step)
        torch.testing.assert_close(guided.x0[i], alone.x0[0])
        assert not torch.equal(guided.x0[i], plain.x0[i])


def test_no_guidance_is_the_denoiser_itself_and_keeps_no_graph() -> None:
    x, step = torch.randn(2, 1, 4, 4), SCHEDULE.step(400, 380)
    guided, plain = GuidedDenoiser(ideal, [])(x, step), ideal(x, step)
    for field in ("x0", "eps", "variance"):
        assert torch.equal(getattr(guided, field), getattr(plain, field))
    assert guided.unguided_x0 is None
    assert not guided.x0.requires_grad


@pytest.mark.parametrize(
    "objective",
    [
        lambda image, step: image.flatten(1).sum(1) * torch.tensor([1.0, 0.0]),
        lambda image, step: image.flatten(1).sum(1) * torch.tensor([1.0, float("nan")]),
    ],
    ids=["zero", "nan"],
)
def test_a_guidance_that_does_nothing_is_an_error_that_says_where(objective) -> None:
    x, step = torch.randn(2, 1, 4, 4), SCHEDULE.step(400, 380)
    denoise = GuidedDenoiser(ideal, [GradientGuidance(objective, torch.ones(2), grad_denoised, shift_mean)])
    with pytest.raises(
        GuidanceError, match="no gradient, or one that is not finite or far too large, at t=400"
    ) as raised:
        denoise(x, step)
    assert raised.value.position == 1
    # an image that asked for no guidance may have any gradient
    GuidedDenoiser(ideal, [GradientGuidance(objective, torch.tensor([1.0, 0.0]), grad_denoised, shift_mean)])(x, step)


@pytest.mark.parametrize("size", [1e8, 1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("field", ["x0", "eps"])
def test_a_prediction_beyond_any_picture_is_an_error_and_no_clamp_hides_it(field: str, size: float) -> None:
    """Of two images, the second is moved by a large number, before a clamp that would make it black and white."""
    x, step = torch.randn(2, 1, 4, 4), SCHEDULE.step(400, 380)

    @dataclass
    class Move:
        weight: float

        def needs_graph(self, step: Step) -> bool:
            return False

        def __call__(self, pred: Prediction, x: torch.Tensor, step: Step) -> Prediction:
            move = torch.tensor([0.0, self.weight])[:, None, None, None]
            return pred._replace(**{field: getattr(pred, field) + move})

    for guidances in ([Move(size)], [Move(size), Clamp()] if field == "x0" else [Clamp(), Move(size)]):
        with pytest.raises(GuidanceError, match="far too large, at t=400") as raised:
            GuidedDenoiser(ideal, guidances)(x, step)
        assert raised.value.position == 1
    GuidedDenoiser(ideal, [Move(1e3), Clamp()])(x, step)

    def broken(x: torch.Tensor, step: Step) -> Prediction:
        return Move(size)(ideal(x, step), x, step)

    with pytest.raises(GuidanceError, match="the network's prediction is not finite at t=400"):
        GuidedDenoiser(broken, [Clamp()] if field == "x0" else [])(x, step)


def test_a_limit_does_not_turn_a_gradient_that_overflows_into_none() -> None:
    x, step = torch.randn(2, 1, 4, 4), SCHEDULE.step(400, 380)
    guidance = GradientGuidance(log_likelihood, torch.tensor([1.0, 3e38]), grad_denoised, shift_eps, limit=1.0)
    with pytest.raises(GuidanceError, match="far too large") as raised:
        GuidedDenoiser(ideal, [guidance])(x, step)
    assert raised.value.position == 1


def test_a_flat_picture_is_an_error_that_says_where() -> None:
    step, x = SCHEDULE.step(7, 6), torch.randn(2, 3, 8, 8)
    x0 = torch.stack([torch.rand(3, 8, 8), torch.full((3, 8, 8), -0.99)])
    pred = Prediction(x0, x, torch.tensor(0.1))
    with pytest.raises(GuidanceError, match="near-constant picture at t=7") as raised:
        RefuseFlat(torch.ones(2))(pred, x, step)
    assert raised.value.position == 1
    assert RefuseFlat(torch.tensor([1.0, 0.0]))(pred, x, step) is pred


def test_an_interval_has_a_guidance_act_within_it_alone() -> None:
    guidance = GuidanceInterval(GradientGuidance(log_likelihood, torch.ones(2), grad_denoised, shift_mean), 100, 500)
    assert [guidance.needs_graph(SCHEDULE.step(t, t - 1)) for t in (100, 101, 500, 501)] == [False, True, True, False]
    x = torch.randn(2, 3, 8, 8)
    for t in (100, 300, 501):
        step = SCHEDULE.step(t, t - 1)
        pred, plain = GuidedDenoiser(ideal, [guidance])(x, step), ideal(x, step)
        assert torch.equal(pred.x0, plain.x0) == (t != 300)


def test_guidances_together_each_see_what_came() -> None:
    step, x = SCHEDULE.step(700, 680), torch.randn(2, 3, 8, 8)
    one, two = (GradientGuidance(log_likelihood, torch.full((2,), w), grad_clean, shift_eps) for w in (1.0, 2.0))
    plain, both = ideal(x, step), Sum([one, two])(ideal(x, step), x, step)
    for field in ("x0", "eps"):
        moves = [getattr(guidance(plain, x, step), field) - getattr(plain, field) for guidance in (one, two)]
        torch.testing.assert_close(getattr(both, field), getattr(plain, field) + sum(moves))
    sequential = two(one(plain, x, step), x, step)
    assert not torch.allclose(sequential.x0, both.x0)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_part_that_is_computed_again_fits_the_others(broken: int) -> None:
    x, step = torch.randn(3, 1, 4, 4), SCHEDULE.step(400, 380)
    again = []

    def denoise(image: torch.Tensor, step: Step) -> Prediction:
        pred = ideal(image, step)._replace(variance=torch.tensor(step.posterior_variance))
        first = torch.equal(image, x[broken : broken + 1]) and not again
        return pred._replace(x0=pred.x0 * torch.nan) if first else pred

    @contextmanager
    def in_float32() -> Iterator[None]:
        again.append(True)
        yield

    found = SplitDenoiser([GuidedDenoiser(denoise, [], in_float32) for _ in range(3)], 1)(x, step)
    torch.testing.assert_close(found.x0, ideal(x, step).x0)
    assert again == [True]
    assert found.variance.ndim == 0


def test_what_half_precision_breaks_is_computed_again_and_nothing_else() -> None:
    """A gradient that overflows in float16 for the second of three images."""
    x, step = torch.randn(3, 1, 4, 4), SCHEDULE.step(400, 380)
    size = torch.tensor([1.0, 1e4, 1.0])

    def objective(image: torch.Tensor, step: Step) -> torch.Tensor:
        half = torch.is_autocast_enabled("cpu")
        at = image.half() if half else image
        return (at.flatten(1).sum(1) * size.to(at.dtype)).float() * 10

    def guided(in_float32) -> GuidedDenoiser:
        return GuidedDenoiser(ideal, [GradientGuidance(objective, torch.ones(3), grad_clean, shift_mean)], in_float32)

    exact = guided(None)(x, step)
    denoise = guided(lambda: torch.autocast("cpu", enabled=False))
    with torch.autocast("cpu", torch.float16):
        for _ in range(2):
            pred = denoise(x, step)
        with pytest.raises(GuidanceError, match="not finite") as raised:
            guided(None)(x, step)
    assert raised.value.position == 1
    assert denoise.retries.tolist() == [0, 2, 0]
    torch.testing.assert_close(pred.x0, exact.x0, rtol=1e-3, atol=1e-3)
    assert torch.equal(pred.x0[1], exact.x0[1])


def test_a_small_gradient_survives_float16() -> None:
    pred, step = Prediction(torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4), torch.tensor(0.1)), SCHEDULE.step(7, 6)
    with torch.autocast("cpu", torch.float16):
        g = grad_clean(lambda image, step: (image.half() * 1e-8).float().flatten(1).sum(1), pred, pred.x0, step)
    assert g.min() > 0
