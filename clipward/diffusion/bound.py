"""The variational bound, which is what a learned variance is trained by (Nichol & Dhariwal 2021)."""

import math

import torch
from torch import Tensor

from clipward.diffusion.denoiser import learned_log_variance
from clipward.diffusion.schedule import Schedule, posterior_variance


def variational_bound(
    x0: Tensor, x: Tensor, predicted_x0: Tensor, share: Tensor, t: Tensor, schedule: Schedule
) -> Tensor:
    """L_t of the bound, in bits a dimension: KL(q(x_{t−1} | x_t, x0) ‖ p_θ(x_{t−1} | x_t)), or −log p_θ(x0 | x_1) at 0.

    Args:
        x0: (B, C, H, W), pictures of 256 levels in [-1, 1].
        x: (B, C, H, W), x_t.
        predicted_x0: (B, C, H, W); no gradient goes into it, for L_simple trains the mean.
        share: (B, C, H, W), the network's v: between −1, the posterior variance, and 1, β (eq. 15).
        t: (B,).
        schedule: of x_t.

    Returns:
        (B,).
    """
    alpha_bar = torch.cat([schedule.alpha_bar.new_ones(1), schedule.alpha_bar])  # one place on: at t + 1
    beta = 1 - alpha_bar[1:] / alpha_bar[:-1]
    variance = posterior_variance(alpha_bar[1:], alpha_bar[:-1])
    variance[0] = variance[1]  # where it is 0, as there is no noise in x0
    by_x0 = beta * alpha_bar[:-1].sqrt() / (1 - alpha_bar[1:])
    by_x = (1 - beta).sqrt() * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])

    def at_t(values: Tensor) -> Tensor:
        return values.to(x.device)[t].float()[:, None, None, None]

    small = at_t(variance.log())
    log_variance = learned_log_variance(share, at_t(variance), at_t(beta))
    mean = at_t(by_x0) * predicted_x0.detach() + at_t(by_x) * x
    true_mean = at_t(by_x0) * x0 + at_t(by_x) * x
    kl = 0.5 * (log_variance - small - 1 + (small - log_variance).exp() + (true_mean - mean) ** 2 / log_variance.exp())
    nats = torch.where((t == 0)[:, None, None, None], -_log_likelihood(x0, mean, log_variance), kl)
    return nats.flatten(1).mean(dim=1) / math.log(2)


def _log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of a Gaussian's share of x0's level among 256, whose outermost reach to ±∞ (Ho et al. 2020, eq. 13)."""
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    below = torch.where(x0 > -0.999, normal.cdf(x0 - 1 / 255), 0.0)
    above = torch.where(x0 < 0.999, normal.cdf(x0 + 1 / 255), 1.0)
    return (above - below).clamp(min=1e-12).log()
