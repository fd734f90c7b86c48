"""Particles: candidates of one request that are weighed on the way and resampled.

Feynman-Kac steering (Singhal et al. 2025, arXiv 2501.06848) with its potential of differences, and systematic
resampling. As candidates grow in number, those of an unguided walk follow p(x0)·exp(L(x0)), where L is the log
potential of a picture. A guided walk takes the place of p with the distribution that its guidance gives.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clipward.diffusion.denoiser import Prediction
from clipward.diffusion.sampling import Draw, Update, seed_of
from clipward.diffusion.schedule import Step

RESAMPLINGS = 5  # in a walk, at even distances; the last is at its end

LogPotential = Callable[[Tensor, Prediction, Step], Tensor]  # of x_s and what the step there predicted: (B,)


class Resampling:
    """An update after which, at a few steps, each request's candidates are resampled by their weights.

    The weight of a candidate is the exponential of how much its log potential rose since the last time. The draws are
    named by (request, step), so that no other request changes them.

    Args:
        update: what takes a step.
        log_potential: what candidates are weighed by.
        groups: for each request, where its candidates lie in the batch.
        names: for each request, what names its draws, such as its seed.
        steps: the walk.
        followers: called with (B,) places where candidates have changed theirs, for what must follow them: candidate i
            is from then on what candidate ``places[i]`` was.
    """

    def __init__(
        self,
        update: Update,
        log_potential: LogPotential,
        groups: Sequence[slice],
        names: Sequence[int | str],
        steps: Sequence[Step],
        followers: Sequence[Callable[[Tensor], None]] = (),
    ) -> None:
        self.update, self.log_potential, self.followers = update, log_potential, followers
        self.groups, self.names = groups, names
        downward = [number for number, step in enumerate(steps, start=1) if step.s < step.t]
        self._due = {downward[len(downward) * i // RESAMPLINGS - 1] for i in range(1, RESAMPLINGS + 1)}
        self._before: Tensor | None = None  # (B,), the log potential at the last resampling

    def __call__(self, x: Tensor, pred: Prediction, step: Step, draw: Draw) -> Tensor:
        x = self.update(x, pred, step, draw)
        if step.number not in self._due:
            return x
        now = self.log_potential(x, pred, step).double().cpu()
        rise = now if self._before is None else now - self._before
        places = torch.arange(len(now))
        for group, name in zip(self.groups, self.names, strict=True):
            places[group] = group.start + resample(rise[group].softmax(dim=0), uniform(name, step.number))
        self._before = now[places]
        if torch.equal(places, torch.arange(len(now))):
            return x
        for follow in self.followers:
            follow(places.to(x.device))
        return x[places.to(x.device)]


def resample(weights: Tensor, u: float) -> Tensor:
    """Systematic resampling: the candidates that (u + i)/K fall on, i = 0 … K−1; equal weights keep each once.

    Args:
        weights: (K,) that sum to 1.
        u: uniform on [0, 1).

    Returns:
        (K,) indices, rising; candidate k is in it ⌊K·w_k⌋ or ⌈K·w_k⌉ times.
    """
    count = len(weights)
    places = (u + torch.arange(count, dtype=torch.float64)) / count
    return torch.searchsorted(weights.double().cumsum(dim=0), places, right=True).clamp(max=count - 1)


def uniform(name: int | str, step: int) -> float:
    """The uniform number of a request at a step: the same on every device."""
    generator = torch.Generator().manual_seed(seed_of(name, "resample", step))
    return torch.rand((), dtype=torch.float64, generator=generator).item()
