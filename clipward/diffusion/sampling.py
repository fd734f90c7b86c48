"""The reverse process: one loop, and the updates that it may take."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from clipward.diffusion.denoiser import Denoiser, Prediction, add_noise
from clipward.diffusion.schedule import Step
from clipward.errors import InputError

Draw = Callable[[], Tensor]
Update = Callable[[Tensor, Prediction, Step, Draw], Tensor]  # may remember the steps of one walk
MakeUpdate = Callable[[], Update]
Constraint = Callable[[Tensor, Step], Tensor]  # x_s after a step, and what is put in its place


class State(NamedTuple):
    x: Tensor  # (B, C, H, W) after the step
    x0: Tensor  # (B, C, H, W), what the step predicted; of a step that puts noise back, what the one before did
    step: Step


def seed_of(*place: int | str) -> int:
    """A generator's seed that depends on a place, such as (seed, step), alone."""
    digest = hashlib.blake2b("/".join(map(str, place)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


class Noise:
    """Standard normal noise that depends on (seed, k) alone: not on the batch, the device count or a restart.

    Args:
        seeds: one per image.
        shape: (C, H, W) of an image.
        device: where it is drawn; another kind of device draws other numbers.
    """

    def __init__(self, seeds: Sequence[int | str], shape: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seeds, self.shape, self.device = tuple(seeds), tuple(shape), torch.device(device)
        self._generator = torch.Generator(self.device)

    def __call__(self, k: int | str) -> Tensor:
        """(B, C, H, W): draw ``k``, where 0 is x_T and step i of the walk uses i + 1; an objective names its own."""
        return torch.stack([self._one(seed, k) for seed in self.seeds])

    def _one(self, seed: int | str, k: int | str) -> Tensor:
        self._generator.manual_seed(seed_of(seed, k))
        return torch.randn(self.shape, generator=self._generator, device=self.device, dtype=torch.float32)


def sample(
    denoise: Denoiser,
    steps: Sequence[Step],
    update: Update,
    noise: Noise,
    start: Tensor | None = None,
    constrain: Constraint | None = None,
) -> Iterator[State]:
    """Walk ``steps``, yielding after each. The last ``x`` is the picture, in about [-1, 1].

    Args:
        denoise: what predicts x0 and eps in x_t.
        steps: from noise to data.
        update: what takes a step; one that remembers serves this walk alone.
        noise: what is drawn.
        start: (B, C, H, W), x_t of the first step; pure noise by default.
        constrain: what x_s must keep to after each step that denoises.
    """
    x = x0 = noise(0) if start is None else start
    for k, step in enumerate(steps, start=1):
        step = replace(step, number=k)
        if step.s > step.t:
            keep = step.alpha_bar_s / step.alpha_bar_t
            x = keep**0.5 * x + (1 - keep) ** 0.5 * noise(k)
            yield State(x, x0, step)
            continue
        prediction = denoise(x, step)
        x, x0 = update(x, prediction, step, partial(noise, k)), prediction.x0
        x = x if constrain is None else constrain(x, step)
        yield State(x, x0, step)


def ancestral(x: Tensor, pred: Prediction, step: Step, draw: Draw) -> Tensor:
    """DDPM (Ho et al. 2020, Alg. 2), with the model's own variance; the last step adds no noise."""
    mean = towards(pred, step, step.posterior_variance)
    return mean if step.s == -1 else mean + pred.variance.sqrt() * draw()


def ddim(eta: float) -> Update:
    """DDIM (Song et al. 2021, eq. 12 and 16): ``eta`` 0 is deterministic, 1 is DDPM with the small variance."""
    if not 0 <= eta <= 1:
        raise InputError(f"ddim_eta: got {eta}, expected 0 to 1")

    def update(x: Tensor, pred: Prediction, step: Step, draw: Draw) -> Tensor:
        variance = eta**2 * step.posterior_variance
        mean = towards(pred, step, variance)
        return mean if variance == 0 else mean + variance**0.5 * draw()

    return update


def towards(pred: Prediction, step: Step, variance: float) -> Tensor:
    """√ᾱ_s·x0 + √(1−ᾱ_s−σ²)·eps: the mean of x_s where noise of ``variance`` σ² is to be added."""
    direction = max(0.0, 1 - step.alpha_bar_s - variance) ** 0.5
    return step.alpha_bar_s**0.5 * pred.x0 + direction * pred.eps


class KeepKnown:
    """A part of the picture is known: x_s has it at the noise level s (Lugmayr et al. 2022, RePaint eq. 8).

    Each step has noise of its own. At the last step there is none, so that the part comes back as it was.

    Args:
        image: (B, C, H, W) in [-1, 1].
        until: (B, 1, H, W), for each pixel the share of T down to which it is known: 0 for all of the walk, 1 for none.
        num_timesteps: T.
        noise: for the name of a draw, (B, C, H, W).
    """

    def __init__(self, image: Tensor, until: Tensor, num_timesteps: int, noise: Callable[[int | str], Tensor]) -> None:
        self.image, self.until, self.num_timesteps, self.noise = image, until, num_timesteps, noise

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        known = self.image
        if step.s >= 0:
            known = add_noise(known, self.noise(f"known/{step.number}"), step.alpha_bar_s)
        return torch.where(self.until <= (step.s + 1) / self.num_timesteps, known, x)


class Inversion:
    """DDIM's step without noise, backwards: from x_s to the x_t that it leads from (Song et al. 2021, §4.3).

    The step is x_s = √ᾱ_s·x̂0(x_t) + √(1−ᾱ_s)·ε̂(x_t), and so x_t = √(ᾱ_t/ᾱ_s)·(x_s − √(1−ᾱ_s)·ε̂) + √(1−ᾱ_t)·ε̂, with
    the ε̂ of an x_t that is not known yet. The first time a step is taken, ε̂ is that of x_s. Each further time it is
    that of the x_t found before, which comes closer (a fixed-point iteration; Pan et al. 2023, arXiv 2309.04907). Its
    walk has the steps of a walk to the picture in the other order, each of them several times.
    """

    def __init__(self) -> None:
        self._t: int | None = None
        self._x_s = torch.empty(0)

    def __call__(self, x: Tensor, pred: Prediction, step: Step, draw: Draw) -> Tensor:
        if step.t != self._t:
            self._t, self._x_s = step.t, x
        without_noise = self._x_s - (1 - step.alpha_bar_s) ** 0.5 * pred.eps
        return (step.alpha_bar_t / step.alpha_bar_s) ** 0.5 * without_noise + (1 - step.alpha_bar_t) ** 0.5 * pred.eps
