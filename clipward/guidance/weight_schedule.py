"""A guidance weight that changes with the noise level."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from clipward.diffusion.denoiser import Prediction
from clipward.diffusion.schedule import Step
from clipward.errors import InputError, shorten
from clipward.guidance.core import Guidance

MOST_FACTOR = 1e6


@dataclass(frozen=True)
class WeightSchedule:
    """The factor of the guidance weight at each noise level.

    Between two points it is linear; before the first and after the last it stays what it is there.

    Args:
        points: pairs of t/T, which rises from 0 (the picture) to 1 (noise), and the factor there, 0 to 1e6.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def parse(cls, text: str) -> "WeightSchedule":
        """Read ``t/T:factor`` pairs, such as ``0.0:0.5 0.4:1 0.8:0``.

        Raises:
            InputError: for anything else.
        """
        wanted = "expected pairs of t/T, rising from 0 to 1, and a factor from 0 to 1e6, such as '0.0:0.5 0.4:1 0.8:0'"
        refusal = f"sampling.weight_schedule: got {shorten(text)}, {wanted}"
        try:
            points = tuple(
                (float(share), float(factor)) for share, factor in (pair.split(":") for pair in text.split())
            )
        except (AttributeError, ValueError) as error:
            raise InputError(refusal) from error
        shares, factors = [share for share, _ in points], [factor for _, factor in points]
        rising = all(low < high for low, high in pairwise(shares))
        if not points or not rising or not 0 <= shares[0] <= shares[-1] <= 1:
            raise InputError(refusal)
        if not all(0 <= factor <= MOST_FACTOR for factor in factors) or max(factors) == 0:
            raise InputError(refusal)
        return cls(points)

    def factor(self, share: float) -> float:
        """What the weight is multiplied by at t/T = ``share``."""
        shares, factors = zip(*self.points, strict=True)
        return float(np.interp(share, shares, factors))


class ScheduledGuidance:
    """The guidances of a method, with a weight that follows a schedule. Where its factor is 0, nothing guides.

    Args:
        guide: from (B,) weights to what changes a prediction.
        weight: (B,) the weight of each image.
        schedule: the factor of it.
        num_timesteps: T.
    """

    def __init__(
        self, guide: Callable[[Tensor], list[Guidance]], weight: Tensor, schedule: WeightSchedule, num_timesteps: int
    ) -> None:
        self.guide, self.weight, self.schedule, self.num_timesteps = guide, weight, schedule, num_timesteps

    def _at(self, step: Step) -> list[Guidance]:
        factor = self.schedule.factor(step.t / self.num_timesteps)
        return self.guide(factor * self.weight) if factor else []

    def needs_graph(self, step: Step) -> bool:
        return any(guidance.needs_graph(step) for guidance in self._at(step))

    def __call__(self, pred: Prediction, x: Tensor, step: Step) -> Prediction:
        for guidance in self._at(step):
            pred = guidance(pred, x, step)
        return pred
