"""From the output of a network to x0, eps and a variance; and noising, the way back."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from clipward.diffusion.schedule import Step
from clipward.errors import InputError

Parametrisation = Literal["eps", "x0", "v"]
VarType = Literal["fixed_small", "fixed_large", "learned_range"]


class Prediction(NamedTuple):
    """The data and the noise that are predicted in x_t, kept apart so that guidance may shift either."""

    x0: Tensor  # (B, C, H, W) in [-1, 1]
    eps: Tensor  # (B, C, H, W)
    variance: Tensor  # σ_t² of p_θ(x_s | x_t): a scalar, or (B, C, H, W) where the network learned it
    unguided_x0: Tensor | None = None  # (B, C, H, W), what x0 was before guidance moved it; None where none did


Denoiser = Callable[[Tensor, Step], Prediction]


def to_x0(output: Tensor, x: Tensor, alpha_bar: Tensor | float, parametrisation: Parametrisation) -> Tensor:
    """x̂0 from a network's output at x_t. ``v`` is √ᾱ·eps − √(1−ᾱ)·x0 (Salimans & Ho 2022)."""
    a, b = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    if parametrisation == "eps":
        return (x - b * output) / a
    if parametrisation == "x0":
        return output
    return a * x - b * output


def to_eps(x0: Tensor, x: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """The noise that makes x_t out of x0: (x_t − √ᾱ·x0) / √(1−ᾱ)."""
    return (x - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5


def add_noise(x0: Tensor, eps: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """x_t = √ᾱ·x0 + √(1−ᾱ)·eps; ``alpha_bar`` is a number, or (B,) with one for each image."""
    if isinstance(alpha_bar, Tensor) and alpha_bar.ndim == 1:
        alpha_bar = alpha_bar[:, None, None, None]
    return alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * eps


def learned_log_variance(share: Tensor, small: Tensor, large: Tensor) -> Tensor:
    """log σ² between the logarithms of two variances (Nichol & Dhariwal 2021, eq. 15).

    Args:
        share: what the network puts out, from −1 for ``small`` to 1 for ``large``.
        small: the posterior variance.
        large: β.
    """
    share = (share + 1) / 2
    return share * large.log() + (1 - share) * small.log()


def training_target(x0: Tensor, eps: Tensor, alpha_bar: Tensor, parametrisation: Parametrisation) -> Tensor:
    """What the network should put out at x_t = √ᾱ·x0 + √(1−ᾱ)·eps."""
    if parametrisation == "eps":
        return eps
    if parametrisation == "x0":
        return x0
    return alpha_bar**0.5 * eps - (1 - alpha_bar) ** 0.5 * x0


class ClassConditional:
    """A network of classes with classifier-free guidance: (1 + w)·ε(x_t, c) − w·ε(x_t) (Ho & Salimans 2022, eq. 6).

    w = 0 is the network of the class as it is; other projects' guidance scale is 1 + w. The output is mixed as it is,
    for ε, x0 and v are the same mixture. A learned variance is that of the class. Other guidance differentiates through
    both passes, so that its gradient is that of what is sampled.

    Args:
        network: maps x_t, t and (B,) labels, −1 for any class, to its output.
        channels: of x_t; the output may have a variance behind them.
        label: (B,), the class of each image; −1 for any, to which the weight means nothing.
        weight: w.
    """

    def __init__(self, network: Callable[..., Tensor], channels: int, label: Tensor, weight: float) -> None:
        self.network, self.channels, self.label, self.weight = network, channels, label, weight

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        output = self.network(x, t, self.label)
        if self.weight == 0:
            return output
        output, other = output.float(), self.network(x, t, torch.full_like(t, -1)).float()[:, : self.channels]
        mean, rest = output[:, : self.channels], output[:, self.channels :]
        guided = mean + self.weight * (mean - other)
        return torch.cat([torch.where(self.label[:, None, None, None] < 0, mean, guided), rest], dim=1)


class NetworkDenoiser:
    """A network ``(x_t, t) -> output`` read as a :data:`Denoiser`.

    Args:
        network: maps (B, C, H, W) and (B,) to (B, C, H, W), or to (B, 2C, H, W) with ``learned_range``.
        parametrisation: what the first C channels are.
        var_type: ``fixed_small`` is the posterior variance, ``fixed_large`` is β (Ho et al. 2020, §3.2), and
            ``learned_range`` interpolates their logarithms (Nichol & Dhariwal 2021, eq. 15).
    """

    def __init__(
        self, network: Callable[[Tensor, Tensor], Tensor], parametrisation: Parametrisation, var_type: VarType
    ) -> None:
        self.network, self.parametrisation, self.var_type = network, parametrisation, var_type

    def __call__(self, x: Tensor, step: Step) -> Prediction:
        t = torch.full((x.shape[0],), step.t, device=x.device)
        output = self.network(x, t).float()
        variance = None
        if output.shape[1] == 2 * x.shape[1]:
            output, variance = output.chunk(2, dim=1)
        x0 = to_x0(output, x, step.alpha_bar_t, self.parametrisation)
        eps = output if self.parametrisation == "eps" else to_eps(x0, x, step.alpha_bar_t)
        return Prediction(x0, eps, self.variance(variance, x, step))

    def variance(self, learned: Tensor | None, x: Tensor, step: Step) -> Tensor:
        if self.var_type == "fixed_small":
            return x.new_tensor(step.posterior_variance)
        if self.var_type == "fixed_large":
            return x.new_tensor(step.beta)
        if learned is None:
            raise InputError("var_type: got learned_range, but the network has no variance; use fixed_small")
        small = x.new_tensor(step.posterior_variance or step.variance_floor)
        large = x.new_tensor(step.beta or step.variance_floor)  # no noise is left in a step that stays at ᾱ_0
        return learned_log_variance(learned, small, large).exp()
