"""The reverse process: one loop, and the updates that it may take."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from clipward.diffusion.denoiser import Denoiser, Prediction
from clipward.diffusion.schedule import Step
from clipward.errors import InputError

Draw = Callable[[], Tensor]
Update = Callable[[Tensor, Prediction, Step, Draw], Tensor]  # may remember the steps of one walk
MakeUpdate = Callable[[], Update]


class State(NamedTuple):
    x: Tensor  # (B, C, H, W) after the step
    x0: Tensor  # (B, C, H, W), what the step predicted
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


def sample(denoise: Denoiser, steps: Sequence[Step], update: Update, noise: Noise) -> Iterator[State]:
    """Walk ``steps`` from pure noise, yielding after each. The last ``x`` is the picture, in about [-1, 1].

    Args:
        denoise: what predicts x0 and eps in x_t.
        steps: from noise to data.
        update: what takes a step; one that remembers serves this walk alone.
        noise: what is drawn.
    """
    x = noise(0)
    for k, step in enumerate(steps, start=1):
        step = replace(step, number=k)
        if step.s > step.t:
            keep = step.alpha_bar_s / step.alpha_bar_t
            x = keep**0.5 * x + (1 - keep) ** 0.5 * noise(k)
            yield State(x, x, step)
            continue
        prediction = denoise(x, step)
        x = update(x, prediction, step, partial(noise, k))
        yield State(x, prediction.x0, step)


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
