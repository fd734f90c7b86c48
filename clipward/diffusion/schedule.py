"""The noise schedule and the steps that walk it.

Only ``alpha_bar`` is stored ("alphas_cumprod" elsewhere); everything else is derived from it where it is used.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from clipward.errors import InputError, shorten

SkipType = Literal["uniform", "uniform2", "leading", "quad", "trailing", "karras", "logsnr"]
ScheduleName = Literal["linear", "scaled_linear", "cosine"]
Betas = tuple[float, float]
FALLING = "expected values that fall strictly, from below 1 to above 0"


Values = TypeVar("Values", float, Tensor)


def posterior_variance(alpha_bar_t: Values, alpha_bar_s: Values) -> Values:
    """The variance of q(x_s | x_t, x_0) (Ho et al. 2020, eq. 7); 0 where s is data, ᾱ_s = 1."""
    return (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)


def half_log_snr(alpha_bar: float) -> float:
    """λ = log(√ᾱ/√(1−ᾱ)), half the logarithm of the signal-to-noise ratio (Kingma et al. 2021); ∞ for data."""
    return math.inf if alpha_bar == 1 else 0.5 * (math.log(alpha_bar) - math.log1p(-alpha_bar))


@dataclass(frozen=True)
class Step:
    """One move x_t -> x_s. ``s < t`` denoises, with ``s = -1`` meaning data; ``s > t`` adds noise (time travel).

    Args:
        t: where it starts.
        s: where it goes.
        alpha_bar_t: ᾱ_t.
        alpha_bar_s: ᾱ_s.
        number: its place in a walk, from 1, which names its noise; 0 outside a walk.
        variance_floor: at the last step, the posterior variance of the step before, from which a learned range starts
            where the posterior has none of its own (guided-diffusion's ``posterior_variance[1]``).
    """

    t: int
    s: int
    alpha_bar_t: float
    alpha_bar_s: float
    number: int = 0
    variance_floor: float = 1e-20

    @property
    def beta(self) -> float:
        """1 − ᾱ_t/ᾱ_s: the variance of q(x_t | x_s), "fixed_large"."""
        return 1 - self.alpha_bar_t / self.alpha_bar_s

    @property
    def posterior_variance(self) -> float:
        """:func:`posterior_variance`, "fixed_small"."""
        return posterior_variance(self.alpha_bar_t, self.alpha_bar_s)


@dataclass(frozen=True)
class Scheduler:
    """How steps are taken by default, as the file that has the weights says.

    All of it is diffusers': a folder's ``scheduler_config.json``. The settings of a person come first.

    Args:
        sampler: ``ddpm``, ``ddim``, or the name of a class whose steps can't be taken here.
        skip_type: how the steps are spread.
        offset: added to each t of ``leading``.
        equal_strides: every step goes ⌊T/n⌋ down, wherever the next one begins, as DDIM's there do.
        to_data: the last step ends at data, where ᾱ is 1, and not at ᾱ_0.
        noise_of_clamped: where x̂0 is clamped, the noise is that of the clamped x̂0, and not what the network predicted.

    Raises:
        InputError: where a number is out of its range.
    """

    sampler: str = "ddpm"
    skip_type: SkipType = "uniform"
    offset: int = 0
    equal_strides: bool = False
    to_data: bool = True
    noise_of_clamped: bool = True

    def __post_init__(self) -> None:
        if self.offset < 0:
            raise InputError(f"steps_offset: got {self.offset}, expected 0 or more")


class Schedule:
    """ᾱ_t for t = 0 … T−1, in float64.

    Args:
        alpha_bar: (T,) strictly decreasing in (0, 1).

    Raises:
        InputError: where it isn't.
    """

    def __init__(self, alpha_bar: Tensor | Sequence[float]) -> None:
        self.alpha_bar = torch.as_tensor(alpha_bar, dtype=torch.float64)
        falling = torch.all(self.alpha_bar[1:] < self.alpha_bar[:-1])
        if not falling or self.alpha_bar[0] >= 1 or self.alpha_bar[-1] <= 0:
            raise InputError(f"alpha_bar: {FALLING}")

    @classmethod
    def from_name(cls, name: ScheduleName, num_timesteps: int = 1000, betas: Betas = (1e-4, 0.02)) -> "Schedule":
        """``linear`` in β (Ho et al. 2020), ``scaled_linear`` in √β, or ``cosine`` (Nichol & Dhariwal 2021, eq. 17).

        Args:
            name: the family.
            num_timesteps: T.
            betas: the first and the last β; ``cosine`` has its own.
        """
        first, last = betas
        if name == "linear":
            each = torch.linspace(first, last, num_timesteps, dtype=torch.float64)
        elif name == "scaled_linear":
            each = torch.linspace(first**0.5, last**0.5, num_timesteps, dtype=torch.float64) ** 2
        elif name == "cosine":
            u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
            f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            each = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        else:
            raise InputError(f"schedule: got {shorten(name)}, expected linear, scaled_linear or cosine")
        try:
            return cls.from_betas(each)
        except InputError as error:
            raise InputError(
                f"betas: got {shorten(list(betas))} with num_timesteps {num_timesteps}; alpha_bar: {FALLING}"
            ) from error

    @classmethod
    def from_betas(cls, betas: Tensor) -> "Schedule":
        return cls(torch.cumprod(1 - betas.double(), dim=0))

    def __len__(self) -> int:
        return len(self.alpha_bar)

    def step(self, t: int, s: int) -> Step:
        """The step x_t -> x_s; an index of −1 is data, where ᾱ = 1."""
        at, as_ = (1.0 if i == -1 else self.alpha_bar[i].item() for i in (t, s))
        return Step(t, s, at, as_)

    def steps(self, n: int, scheduler: Scheduler = Scheduler()) -> list[Step]:
        """Exactly ``n`` steps from noise to data, as ``scheduler`` says.

        ``uniform`` visits ⌊i·T/n⌋, ``leading`` i·⌊T/n⌋, ``uniform2`` spaces the steps from T−1 to 0 evenly, ``quad``
        squares an even spacing of [0, √(0.8·T)] and so spends most steps near the data, none above 0.8·T. ``trailing``
        counts down from T−1 by T/n (Lin et al. 2024). Two go from T−1 to 0: ``karras`` in even steps of e^(−λ/7)
        (Karras et al. 2022, eq. 5), and ``logsnr`` in even steps of λ (Lu et al. 2022). Both round to the nearest t, or
        where that is taken to the nearest that is free.
        """
        times = self._times(n, scheduler.skip_type)
        if scheduler.skip_type == "leading":
            times = [t + scheduler.offset for t in times]
            if times[-1] >= len(self):
                raise InputError(
                    f"skip_steps: got {n}, expected fewer, since the weights add {scheduler.offset} to each t"
                )
        times = times[::-1]
        ends = [max(t - len(self) // n, -1) for t in times] if scheduler.equal_strides else [*times[1:], -1]
        steps = [self.step(t, s) for t, s in zip(times, ends, strict=True)]
        if not scheduler.to_data and ends[-1] == -1:
            steps[-1] = replace(steps[-1], alpha_bar_s=self.alpha_bar[0].item())
        steps[-1] = replace(steps[-1], s=-1)  # where a walk ends, also at a level above data
        if len(self) > 1:
            before = steps[-2] if n > 1 else self.step(1, 0)
            steps[-1] = replace(steps[-1], variance_floor=before.posterior_variance)
        return steps

    def _times(self, n: int, skip_type: SkipType) -> list[int]:
        """Where ``n`` steps begin, from the lowest t to the highest."""
        num = len(self)
        if not 1 <= n <= num:
            raise InputError(f"skip_steps: got {shorten(n)}, expected 1 to {num}")
        if skip_type == "uniform":
            return [i * num // n for i in range(n)]
        if skip_type == "leading":
            return [i * (num // n) for i in range(n)]
        if skip_type == "uniform2":
            return [round(i * (num - 1) / max(n - 1, 1)) for i in range(n)] if n > 1 else [num - 1]
        if skip_type == "quad":
            top = math.sqrt(0.8 * num)
            if n > top**2:
                raise InputError(f"skip_steps: got {n}, expected at most {int(top**2)} for skip_type quad")
            return [max(i, int((top * i / max(n - 1, 1)) ** 2)) for i in range(n)] if n > 1 else [int(top**2)]
        if skip_type == "trailing":
            return [round(num - i * (num / n)) - 1 for i in reversed(range(n))]
        if skip_type in ("karras", "logsnr"):
            return self._times_by_noise(n, skip_type)
        raise InputError(f"skip_type: got {skip_type!r}, expected one of {', '.join(get_args(SkipType))}")

    def _times_by_noise(self, n: int, skip_type: SkipType) -> list[int]:
        """From 0 to T−1 at even distances of e^(−λ/7) or of λ, rounded to times that differ."""
        noise = 0.5 * (torch.log1p(-self.alpha_bar) - self.alpha_bar.log()).numpy()  # −λ, which rises with t
        first, last = noise[[0, -1]]
        if skip_type == "karras":
            levels = 7 * np.log(np.linspace(np.exp(last / 7), np.exp(first / 7), n))
        else:
            levels = np.linspace(last, first, n)
        times = np.interp(levels[::-1], noise, np.arange(len(self))).round().astype(int)
        place = np.arange(n)
        return (np.maximum.accumulate(times - place).clip(max=len(self) - n) + place).tolist()


def time_travel(steps: Sequence[Step], repeats: int) -> list[Step]:
    """Walk each step but the last ``repeats`` times, going back up in between (Lugmayr et al. 2022, RePaint)."""
    walked: list[Step] = []
    for step in steps:
        walked.append(step)
        if step.s >= 0:
            up = Step(step.s, step.t, step.alpha_bar_s, step.alpha_bar_t)
            walked.extend([up, step] * (repeats - 1))
    return walked
