"""Guidance: where the gradient is taken × how it is injected × how strong.

Every published formula is a shift of a :class:`Prediction`, so the sampler never knows that it is guided. With
g ≈ ∇ log p(y | ·) and a strength s per image:

============  ====================  ===============  =====================================================
shift         x0 gains              eps gains        equals
============  ====================  ===============  =====================================================
shift_mean    s·σ_t²·g / √ᾱ_s       0                μ + s·σ_t²·g: CLIP guidance; Dhariwal & Nichol, Alg. 1
shift_eps     s·(1−ᾱ_t)/√ᾱ_t·g      −s·√(1−ᾱ_t)·g    score addition; Dhariwal & Nichol 2021, Alg. 2
shift_x0      s·g                   0                MPGD (He et al. 2023)
============  ====================  ===============  =====================================================

``shift_mean`` injects σ_t²·g whatever the update does, and σ_t² is the model's, so DDIM with η = 0 still guides;
without the fresh noise it guides about twice as hard as at η = 1. Over few steps it guides too little, because the
σ_t² of coarse steps do not add up to those of fine ones; ``shift_eps`` suffers from neither.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffusion.denoiser import Denoiser, Prediction, to_eps
from diffusion.schedule import Step

FLAT = 0.01  # standard deviation of a picture in [-1, 1] in which nothing can be seen


class Loss(Protocol):
    """What a picture is scored by; guidance raises it."""

    def __call__(self, image: Tensor, step: Step) -> Tensor:
        """image: (B, C, H, W) in [-1, 1]. Returns (B,), one number per image."""


class PixelLoss(Loss, Protocol):
    """A loss that knows its gradient at the pixels that its critic sees."""

    def pixel_gradient(self, image: Tensor) -> Tensor:
        """image: (B, C, H, W) in [-1, 1]. Returns the same shape."""


class Guidance(Protocol):
    """A change of a prediction at x_t. ``needs_graph`` says that it differentiates through the network."""

    needs_graph: bool

    def __call__(self, pred: Prediction, x: Tensor, step: Step) -> Prediction: ...


class GuidanceError(RuntimeError):
    """A guidance that does nothing, or whose gradient is not finite.

    Attributes:
        position: of the image in its batch.
        reason: what is wrong, naming the step.
    """

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(f"image {position} of the batch: {reason}")
        self.position, self.reason = position, reason


class GuidedDenoiser:
    """A denoiser, run once, and ``guidances`` folded over what it predicts; none of them is unguided sampling."""

    def __init__(self, denoise: Denoiser, guidances: Sequence[Guidance]) -> None:
        self.denoise, self.guidances = denoise, tuple(guidances)

    def __call__(self, x: Tensor, step: Step) -> Prediction:
        needs_graph = any(guidance.needs_graph for guidance in self.guidances)
        x = x.detach().requires_grad_(needs_graph)
        with torch.set_grad_enabled(needs_graph):
            pred = self.denoise(x, step)
            for guidance in self.guidances:
                pred = guidance(pred, x, step)
        return Prediction(*(field.detach() for field in pred))


class Clamp:
    """Clamp x̂0 to [-1, 1] and keep eps consistent with it, as guided-diffusion does.

    What it saturates has no gradient further down the list.
    """

    needs_graph = False

    def __call__(self, pred: Prediction, x: Tensor, step: Step) -> Prediction:
        x0 = pred.x0.clamp(-1, 1)
        return pred._replace(x0=x0, eps=to_eps(x0, x, step.alpha_bar_t))


class RefuseFlat:
    """Changes nothing, and refuses an x̂0 so flat that a critic can't see anything in it.

    Args:
        weight: (B,) the strength of the guidance that follows; an image with 0 may be as it likes.

    Raises:
        GuidanceError: when called on one.
    """

    needs_graph = False

    def __init__(self, weight: Tensor) -> None:
        self.guided = weight != 0

    def __call__(self, pred: Prediction, x: Tensor, step: Step) -> Prediction:
        flat = self.guided & (pred.x0.detach().flatten(1).std(dim=1) < FLAT)
        if flat.any():
            raise GuidanceError(int(flat.nonzero()[0]), f"the critic sees a near-constant picture at t={step.t}")
        return pred


# where the gradient is taken: (loss, pred, x, step) -> (B, C, H, W)

Gradient = Callable[[Loss, Prediction, Tensor, Step], Tensor]


def grad_noisy(loss: Loss, pred: Prediction, x: Tensor, step: Step) -> Tensor:
    """∇_{x_t} L(x_t, t), for a critic that was trained on noisy images (GLIDE). No network backward."""
    return _gradient(loss, x.detach().requires_grad_(), step)


def grad_clean(loss: Loss, pred: Prediction, x: Tensor, step: Step) -> Tensor:
    """∇_{x̂0} L(x̂0). No network backward."""
    return _gradient(loss, pred.x0.detach().requires_grad_(), step)


def grad_denoised(loss: Loss, pred: Prediction, x: Tensor, step: Step) -> Tensor:
    """∇_{x_t} L(x̂0(x_t)), through the network."""
    return torch.autograd.grad(loss(pred.x0, step).sum(), x, retain_graph=True)[0]


def grad_pixels(loss: PixelLoss, pred: Prediction, x: Tensor, step: Step) -> Tensor:
    """The gradient at the critic's own pixels of x̂0, in place of x̂0's, over √ᾱ_t. No network backward.

    1/√ᾱ_t is what ∂x̂0/∂x_t would be if the network's eps did not depend on x_t.
    """
    return loss.pixel_gradient(pred.x0) / step.alpha_bar_t**0.5


def _gradient(loss: Loss, at: Tensor, step: Step) -> Tensor:
    with torch.enable_grad():
        return torch.autograd.grad(loss(at, step).sum(), at)[0]


# how it is injected: (pred, s·g, step) -> Prediction

Shift = Callable[[Prediction, Tensor, Step], Prediction]


def shift_mean(pred: Prediction, direction: Tensor, step: Step) -> Prediction:
    """Move the mean of x_s by σ_t²·direction."""
    return pred._replace(x0=pred.x0 + pred.variance * direction / step.alpha_bar_s**0.5)


def shift_eps(pred: Prediction, direction: Tensor, step: Step) -> Prediction:
    """Add the direction to the score: eps − √(1−ᾱ_t)·direction, and x0 in keeping with it."""
    noise = 1 - step.alpha_bar_t
    return pred._replace(
        x0=pred.x0 + noise / step.alpha_bar_t**0.5 * direction,
        eps=pred.eps - noise**0.5 * direction,
    )


def shift_x0(pred: Prediction, direction: Tensor, step: Step) -> Prediction:
    """Move the predicted picture by the direction."""
    return pred._replace(x0=pred.x0 + direction)


@dataclass(frozen=True)
class GradientGuidance:
    """One gradient, injected one way.

    Args:
        loss: what is raised.
        weight: (B,) the strength s of each image; 0 leaves an image as it is.
        gradient: where the gradient is taken.
        shift: how it is injected.

    Raises:
        GuidanceError: when called, where an image with a weight has no gradient, or one that is not finite.
    """

    loss: Loss
    weight: Tensor
    gradient: Gradient
    shift: Shift

    @property
    def needs_graph(self) -> bool:
        return self.gradient is grad_denoised

    def __call__(self, pred: Prediction, x: Tensor, step: Step) -> Prediction:
        guided = self.weight != 0
        g = self.gradient(self.loss, pred, x, step)
        size = g.flatten(1).norm(dim=1)  # (B,)
        broken = guided & ~(torch.isfinite(size) & (size > 0))
        if broken.any():
            position = int(broken.nonzero()[0])
            what = "no gradient" if size[position] == 0 else "a gradient that is not finite"
            raise GuidanceError(position, f"the guidance has {what} at t={step.t}")
        direction = torch.where(guided, self.weight, 0)[:, None, None, None] * g.nan_to_num(0, 0, 0)
        return self.shift(pred, direction, step)
