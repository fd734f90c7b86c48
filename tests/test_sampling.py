"""diffusers' schedulers as the oracle: the same numbers from the same noise and network."""

import pytest
import torch
from conftest import TINY_UNET, randomise
from diffusers import DDIMScheduler, DDPMScheduler

from clipward.diffusion.denoiser import NetworkDenoiser, Prediction
from clipward.diffusion.sampling import Noise, ancestral, ddim, sample
from clipward.diffusion.schedule import Schedule, time_travel
from clipward.errors import InputError
from clipward.guidance.core import Clamp, GuidedDenoiser
from clipward.networks.unet import UNet

PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SHAPE = (3, 16, 16)


@pytest.fixture(scope="module")
def network() -> UNet:
    return randomise(UNet(TINY_UNET)).double().eval()


class Float64(torch.nn.Module):
    """Keeps the network's own precision inside, as the reference does."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.network(x.double(), t)


def theirs_walk(scheduler: DDPMScheduler, network: UNet, noise: Noise, n: int, **kwargs: float) -> torch.Tensor:
    scheduler.set_timesteps(n)
    x = noise(0)
    for k, t in enumerate(scheduler.timesteps, start=1):
        with torch.no_grad():
            output = network(x.double(), t.repeat(len(x))).float()
        if isinstance(scheduler, DDIMScheduler):
            x = scheduler.step(
                output, t, x, variance_noise=noise(k), use_clipped_model_output=True, **kwargs
            ).prev_sample
        else:
            # DDPMScheduler draws its own noise: let it draw none, and add ours
            variance = scheduler._get_variance(t)
            quiet = type(scheduler).from_config(scheduler.config)
            quiet.set_timesteps(n)
            quiet._get_variance = lambda t, predicted_variance=None: torch.zeros(())
            x = quiet.step(output, t, x).prev_sample
            x = x + (variance**0.5 * noise(k) if t > 0 else 0)
    return x


def ours_walk(
    network: UNet, parametrisation: str, var_type: str, noise: Noise, n: int, clamp: bool, update
) -> torch.Tensor:
    denoise = NetworkDenoiser(Float64(network), parametrisation, var_type)
    guided = GuidedDenoiser(denoise, [Clamp()] if clamp else [])
    *_, last = sample(guided, Schedule.from_name("linear").steps(n), update, noise)
    return last.x


@pytest.mark.parametrize("parametrisation", ["eps", "x0", "v"])
@pytest.mark.parametrize("var_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("clamp", [False, True])
def test_ancestral_equals_ddpm_scheduler(network: UNet, parametrisation: str, var_type: str, clamp: bool) -> None:
    scheduler = DDPMScheduler(
        1000,
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type=PREDICTION_TYPES[parametrisation],
        variance_type=var_type,
        clip_sample=clamp,
        timestep_spacing="leading",
    )
    noise = Noise([3, 4], SHAPE)
    ours = ours_walk(network, parametrisation, var_type, noise, 10, clamp, ancestral)
    theirs = theirs_walk(scheduler, network, noise, 10)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("parametrisation", ["eps", "x0", "v"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clamp", [False, True])
def test_ddim_equals_ddim_scheduler(network: UNet, parametrisation: str, eta: float, clamp: bool) -> None:
    scheduler = DDIMScheduler(
        1000,
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type=PREDICTION_TYPES[parametrisation],
        clip_sample=clamp,
        set_alpha_to_one=True,
        timestep_spacing="leading",
    )
    noise = Noise([3, 4], SHAPE)
    ours = ours_walk(network, parametrisation, "fixed_small", noise, 10, clamp, ddim(eta))
    theirs = theirs_walk(scheduler, network, noise, 10, eta=eta)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * theirs.abs().max().item())


def test_one_step_of_every_update_in_float64() -> None:
    """Posterior mean as a weighted sum of x0 and x_t (Ho et al. 2020, eq. 7) against our √ᾱ_s·x0 + … form."""
    step = Schedule.from_name("linear").step(700, 640)
    x, x0 = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.rand(2, 3, 4, 4, dtype=torch.float64)
    at, as_, alpha = step.alpha_bar_t, step.alpha_bar_s, step.alpha_bar_t / step.alpha_bar_s
    eps = (x - at**0.5 * x0) / (1 - at) ** 0.5
    z = torch.randn_like(x)
    variance = torch.tensor(step.posterior_variance, dtype=torch.float64)
    mean = as_**0.5 * (1 - alpha) / (1 - at) * x0 + alpha**0.5 * (1 - as_) / (1 - at) * x
    ours = ancestral(x, Prediction(x0, eps, variance), step, lambda: z)
    torch.testing.assert_close(ours, mean + variance.sqrt() * z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ddim(1.0)(x, Prediction(x0, eps, variance), step, lambda: z), ours)


def test_a_learned_variance_lies_between_small_and_large() -> None:
    step = Schedule.from_name("linear").step(500, 480)

    class Learned(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, torch.tensor([-1.0, 0.0, 1.0])[:, None, None].expand(x.shape)], dim=1)

    x = torch.randn(1, 3, 2, 2)
    variance = NetworkDenoiser(Learned(), "eps", "learned_range")(x, step).variance[0, :, 0, 0]
    small, large = step.posterior_variance, step.beta
    torch.testing.assert_close(variance, torch.tensor([small, (small * large) ** 0.5, large]))
    # read as a fixed variance, the extra channels are left alone
    assert NetworkDenoiser(Learned(), "eps", "fixed_large")(x, step).variance.item() == pytest.approx(large)


def test_learned_range_of_a_network_without_it_is_refused(network: UNet) -> None:
    with pytest.raises(InputError, match="learned_range"):
        NetworkDenoiser(Float64(network), "eps", "learned_range")(
            torch.zeros(1, *SHAPE), Schedule.from_name("linear").step(5, 4)
        )


def test_noise_depends_on_seed_and_step_alone() -> None:
    together, alone = Noise([5, 6, 7], SHAPE), Noise([6], SHAPE)
    for k in (0, 1, 50):
        assert torch.equal(together(k)[1], alone(k)[0])
    assert torch.equal(together(3), together(3))
    assert not torch.equal(together(0)[0], together(1)[0])
    assert not torch.equal(together(0)[0], together(0)[1])


def test_noise_is_standard_normal() -> None:
    draws = Noise(range(64), SHAPE)(9)
    assert draws.mean().item() == pytest.approx(0, abs=0.02)
    assert draws.std().item() == pytest.approx(1, abs=0.02)


def test_an_upward_step_adds_the_noise_of_its_level() -> None:
    steps = [Schedule.from_name("linear").step(999, 100), Schedule.from_name("linear").step(100, 500)]
    steps[1] = type(steps[1])(100, 500, steps[1].alpha_bar_t, steps[1].alpha_bar_s)

    def denoise(x: torch.Tensor, step: object) -> Prediction:
        return Prediction(torch.full_like(x, 0.5), torch.zeros_like(x), x.new_zeros(()))

    walk = list(sample(denoise, steps, ddim(0), Noise(range(32), SHAPE)))
    expected_mean = walk[0].x.mean() * (steps[1].alpha_bar_s / steps[1].alpha_bar_t) ** 0.5
    assert walk[1].x.mean().item() == pytest.approx(expected_mean.item(), abs=0.02)
    assert (walk[1].x0 == 0.5).all()  # of the step before, since nothing is predicted
    assert walk[1].x.std().item() == pytest.approx((1 - steps[1].alpha_bar_s / steps[1].alpha_bar_t) ** 0.5, rel=0.02)


def test_time_travel_lands_where_the_plain_walk_does() -> None:
    schedule = Schedule.from_name("cosine")

    def denoise(x: torch.Tensor, step: object) -> Prediction:
        return Prediction(torch.full_like(x, 0.25), x, x.new_zeros(()))

    *_, last = sample(denoise, time_travel(schedule.steps(5), 3), ancestral, Noise([1], SHAPE))
    torch.testing.assert_close(last.x, torch.full((1, *SHAPE), 0.25))


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_an_eta_out_of_range_is_refused(eta: float) -> None:
    with pytest.raises(InputError, match="ddim_eta"):
        ddim(eta)
