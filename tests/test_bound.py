"""The bound against the formulas of Nichol & Dhariwal's code, worked out one picture at a time."""

import math

import numpy as np
import pytest
import torch

from clipward.diffusion.bound import variational_bound
from clipward.diffusion.schedule import Schedule


@pytest.mark.parametrize("t", [0, 1, 400, 999])
def test_the_bound_is_that_of_the_published_code(t: int) -> None:
    betas = np.linspace(1e-4, 0.02, 1000, dtype=np.float64)
    alphas_cumprod = np.cumprod(1 - betas)
    alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
    posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
    posterior_log_variance_clipped = np.log(np.append(posterior_variance[1], posterior_variance[1:]))
    x0, predicted = torch.rand(2, 2, 3, 4, 4, dtype=torch.float64) * 1.9 - 0.95  # inside the outermost levels
    predicted = x0 + 0.01 * predicted  # near it, so that t = 0 has likelihoods to tell apart
    share = torch.rand(2, 3, 4, 4, dtype=torch.float64) * 2 - 1
    x = math.sqrt(alphas_cumprod[t]) * x0 + math.sqrt(1 - alphas_cumprod[t]) * torch.randn_like(x0)

    frac = (share + 1) / 2
    model_log_variance = frac * math.log(betas[t]) + (1 - frac) * posterior_log_variance_clipped[t]
    coef1 = betas[t] * math.sqrt(alphas_cumprod_prev[t]) / (1 - alphas_cumprod[t])
    coef2 = (1 - alphas_cumprod_prev[t]) * math.sqrt(1 - betas[t]) / (1 - alphas_cumprod[t])
    model_mean, true_mean = coef1 * predicted + coef2 * x, coef1 * x0 + coef2 * x
    if t == 0:
        centered, inv_stdv = x0 - model_mean, torch.exp(-0.5 * model_log_variance)

        def cdf(z: torch.Tensor) -> torch.Tensor:
            return 0.5 * (1 + torch.erf(z / math.sqrt(2)))

        expected = -torch.log(
            (cdf(inv_stdv * (centered + 1 / 255)) - cdf(inv_stdv * (centered - 1 / 255))).clamp(1e-12)
        )
    else:
        logvar1 = posterior_log_variance_clipped[t]
        expected = 0.5 * (
            -1.0
            + model_log_variance
            - logvar1
            + torch.exp(logvar1 - model_log_variance)
            + ((true_mean - model_mean) ** 2) * torch.exp(-model_log_variance)
        )
    expected = expected.flatten(1).mean(dim=1) / math.log(2)
    ours = variational_bound(
        *(v.float() for v in (x0, x, predicted, share)), torch.tensor([t, t]), Schedule.from_name("linear")
    )
    torch.testing.assert_close(ours.double(), expected, rtol=2e-3, atol=1e-4)


def test_the_outermost_levels_reach_to_infinity() -> None:
    x0 = torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1)
    far = 3 * x0
    bound = variational_bound(
        x0, x0, far, torch.ones_like(x0), torch.zeros(2, dtype=torch.long), Schedule.from_name("linear")
    )
    assert bound.abs().max() < 1e-3


def test_the_bound_trains_the_variance_alone() -> None:
    x0, x = torch.rand(2, 2, 3, 4, 4) * 2 - 1
    predicted, share = x0.clone().requires_grad_(), torch.zeros_like(x0, requires_grad=True)
    t = torch.tensor([0, 500])
    variational_bound(x0, x, predicted, share, t, Schedule.from_name("linear")).sum().backward()
    assert predicted.grad is None
    assert (share.grad.flatten(1).abs().sum(dim=1) > 0).all()
