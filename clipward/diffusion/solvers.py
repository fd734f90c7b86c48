"""Updates with a memory, which need fewer steps. Every walk takes a fresh one.

They go from one noise level to the next in λ = log(√ᾱ/√(1−ᾱ)) and learn from the steps before how x̂0 changes with λ.
They remember x̂0 as it is without guidance. What guidance moves enters as it does in a first-order step, since to
extrapolate guided predictions diverges (Wizadwongsa & Suwajanakorn 2023, arXiv 2301.11558). The last step is
first-order.
"""

import math
from typing import Literal, NamedTuple

from torch import Tensor

from clipward.diffusion.denoiser import Prediction
from clipward.diffusion.sampling import Draw, MakeUpdate, towards
from clipward.diffusion.schedule import Step, half_log_snr

SolverName = Literal["dpmpp_2m", "sde_dpmpp_2m", "unipc"]


class Seen(NamedTuple):
    """What is remembered of a step."""

    step: Step
    x0: Tensor  # (B, C, H, W), unguided


class Memory:
    """The last two steps of a walk, each of which ends where the next begins. An upward step clears it."""

    def __init__(self) -> None:
        self._seen: list[Seen] = []

    def before(self, step: Step) -> list[Seen]:
        """The steps that lead to ``step``: none, one or two."""
        if self._seen and self._seen[-1].step.s != step.t:
            self._seen = []
        return self._seen

    def add(self, step: Step, x0: Tensor) -> None:
        self._seen = [*self._seen[-1:], Seen(step, x0)]

    def follow(self, places: Tensor) -> None:
        """Image i is from now on what image ``places[i]`` was."""
        self._seen = [Seen(step, x0[places]) for step, x0 in self._seen]


class DpmSolver:
    """DPM-Solver++(2M), or SDE-DPM-Solver++(2M), which adds noise (Lu et al. 2022, arXiv 2211.01095).

    At first order, the steps are DDIM's with η = 0, and with noise DDIM's with η = 1.

    Args:
        noisy: whether noise is added.
    """

    def __init__(self, noisy: bool = False) -> None:
        self.noisy = noisy
        self._memory = Memory()
        self.follow = self._memory.follow

    def __call__(self, x: Tensor, pred: Prediction, step: Step, draw: Draw) -> Tensor:
        x0, before = _unguided(pred), self._memory.before(step)
        self._memory.add(step, x0)
        variance = step.posterior_variance if self.noisy else 0.0
        mean = towards(pred, step, variance)
        if before and step.s != -1:
            h = _length(step)
            mean = mean + 0.5 * _gain(step, 2 * h if self.noisy else h) * _change(before[-1], x0, h)
        return mean if variance == 0 else mean + variance**0.5 * draw()


class UniPC:
    """UniPC of order 2 that predicts x̂0, with B(h) = e^h − 1 (Zhao et al. 2023, arXiv 2302.04867).

    The predictor is DPM-Solver++(2M). At x_t, the corrector takes the step that led there again, with what the network
    said of x_t, which is at hand. So it costs no pass of the network.
    """

    def __init__(self) -> None:
        self._memory = Memory()

    def __call__(self, x: Tensor, pred: Prediction, step: Step, draw: Draw) -> Tensor:
        x0, before = _unguided(pred), self._memory.before(step)
        self._memory.add(step, x0)
        mean = towards(pred, step, 0.0)
        if not before or step.s == -1:
            return mean
        h = _length(step)
        mean = mean + 0.5 * _gain(step, h) * _change(before[-1], x0, h)
        noise_kept = ((1 - step.alpha_bar_s) / (1 - step.alpha_bar_t)) ** 0.5
        return mean + noise_kept * self._correction(before, x0)

    @staticmethod
    def _correction(before: list[Seen], x0: Tensor) -> Tensor:
        """(B, C, H, W): by how much the steps ``before`` missed x_t, where the network predicts ``x0``."""
        last = before[-1]
        h = _length(last.step)
        gain, actual = _gain(last.step, h), x0 - last.x0
        if len(before) == 1:
            return 0.5 * gain * actual
        # the weights of both changes solve Σ ρ_i·r_i^(k−1) = b_k for k = 1, 2, where r is −ratio and 1
        ratio = _length(before[0].step) / h
        root = math.expm1(-h)
        b1 = (-root / h - 1) / root
        b2 = 2 * ((-root / h - 1) / -h - 0.5) / root
        rho = (b1 - b2) / (1 + ratio)
        expected = _change(before[0], last.x0, h)
        return gain * ((rho - 0.5) * expected + (b1 - rho) * actual)


SOLVERS: dict[SolverName, MakeUpdate] = {
    "dpmpp_2m": DpmSolver,
    "sde_dpmpp_2m": lambda: DpmSolver(noisy=True),
    "unipc": UniPC,
}


def _unguided(pred: Prediction) -> Tensor:
    return pred.x0 if pred.unguided_x0 is None else pred.unguided_x0


def _length(step: Step) -> float:
    """h = λ_s − λ_t."""
    return half_log_snr(step.alpha_bar_s) - half_log_snr(step.alpha_bar_t)


def _gain(step: Step, h: float) -> float:
    """√ᾱ_s·(1 − e^−h): how much of a change of x̂0 arrives in x_s."""
    return step.alpha_bar_s**0.5 * -math.expm1(-h)


def _change(earlier: Seen, x0: Tensor, h: float) -> Tensor:
    """(B, C, H, W): how far x̂0 goes over a step of length ``h``, by what it went since the ``earlier`` step."""
    return (x0 - earlier.x0) * (h / _length(earlier.step))
