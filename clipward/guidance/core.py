"""Guidance: where the gradient is taken × how it is injected × how strong.

Every published formula is a shift of a :class:`Prediction`, so the sampler never knows that it is guided. With
g ≈ ∇ log p(y | ·) and a weight w per image:

| shift | x0 gains | eps gains | equals |
|---|---|---|---|
| ``shift_mean`` | w·σ_t²·g / √ᾱ_s | 0 | μ + w·σ_t²·g: CLIP guidance; Dhariwal & Nichol 2021, Alg. 1 |
| ``shift_eps`` | w·(1−ᾱ_t)/√ᾱ_t·g | −w·√(1−ᾱ_t)·g | score addition; Dhariwal & Nichol 2021, Alg. 2 |
| ``shift_sample`` | w·g / √ᾱ_s | 0 | x_s + w·g: DPS, FreeDoM, Polyak steps |
| ``shift_x0`` | w·g | −w·√(ᾱ_t/(1−ᾱ_t))·g | MPGD (He et al. 2023) |

``shift_mean`` injects σ_t²·g whatever the update does, and σ_t² is the model's, so DDIM with η = 0 still guides;
without the fresh noise it guides about twice as hard as at η = 1. Over few steps it guides too little, because the
σ_t² of coarse steps do not add up to those of fine ones; ``shift_eps`` suffers from neither.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from clipward.diffusion.denoiser import Denoiser, Prediction, to_eps
from clipward.diffusion.schedule import Step

FLAT = 0.01  # standard deviation of a picture in [-1, 1] in which nothing can be seen
LOST = 2.0**24  # from here on, neighbouring float32 numbers lie as far apart as black and white


class Objective(Protocol):
    """What a picture is scored by; guidance raises it."""

    def __call__(self, image: Tensor, step: Step) -> Tensor:
        """image: (B, C, H, W) in [-1, 1]. Returns (B,), one number per image, or (B, K) for K texts of each."""


class PixelObjective(Objective, Protocol):
    """An objective that knows its gradient at the pixels that its own network sees."""

    def pixel_gradient(self, image: Tensor) -> Tensor:
        """image: (B, C, H, W) in [-1, 1]. Returns the same shape."""


class Guidance(Protocol):
    """A change of a prediction at x_t. ``needs_graph`` says whether it differentiates through the network there."""

    def needs_graph(self, step: Step) -> bool: ...

    def __call__(self, pred: Prediction, x: Tensor, step: Step) -> Prediction: ...


class GuidanceError(RuntimeError):
    """A guidance that does nothing, or a picture that diverges.

    Attributes:
        position: of the image in its batch.
        reason: what is wrong, naming the step.
    """

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(f"image {position} of the batch: {reason}")
        self.position, self.reason = position, reason


class GuidedDenoiser:
    """A denoiser, run once, and ``guidances`` folded over what it predicts; none of them is unguided sampling.

    What x̂0 would be without guidance is kept beside it; a :class:`Clamp` is no guidance, and clamps both.

    Args:
        denoise: what is guided.
        guidances: in the order in which they change a prediction.
        in_float32: a context in which all of it computes in float32, where it does not anyway. Images whose prediction
            is not finite, as a gradient in half precision may overflow, are computed there again, and no others.

    Attributes:
        retries: for each image, the steps that were computed again.
        moved: for each image, whether guidance has changed any prediction.

    Raises:
        GuidanceError: when called, where an image's prediction is not finite, or beyond any picture.
    """

    def __init__(
        self,
        denoise: Denoiser,
        guidances: Sequence[Guidance],
        in_float32: Callable[[], AbstractContextManager] | None = None,
    ) -> None:
        self.denoise, self.guidances, self.in_float32 = denoise, tuple(guidances), in_float32
        self.retries = torch.zeros(1, dtype=torch.long)
        self.moved = torch.zeros(1, dtype=torch.bool)

    def __call__(self, x: Tensor, step: Step) -> Prediction:
        pred = self._guided(x, step)
        broken = _broken(pred, step)
        self.retries = self.retries.to(broken.device) + broken
        if self.in_float32 is not None and broken.any():
            with self.in_float32():
                again = self._guided(x, step)
            pred = _choose(broken, again, pred)
            broken = _broken(pred, step)
        if broken.any():
            guided = any(not isinstance(guidance, Clamp) for guidance in self.guidances)
            reason = "the guidance has no gradient, or one that is not finite or far too large,"
            reason = reason if guided else "the network's prediction is not finite"
            raise GuidanceError(int(broken.nonzero()[0]), f"{reason} at t={step.t}")
        return pred

    def _guided(self, x: Tensor, step: Step) -> Prediction:
        needs_graph = any(guidance.needs_graph(step) for guidance in self.guidances)
        x = x.detach().requires_grad_(needs_graph)
        with torch.set_grad_enabled(needs_graph):
            unguided = pred = self.denoise(x, step)
            for guidance in self.guidances:
                alike = unguided is pred
                pred = guidance(pred, x, step)
                if isinstance(guidance, Clamp):
                    unguided = pred if alike else guidance(unguided, x, step)
        found = Prediction(pred.x0.detach(), pred.eps.detach(), pred.variance.detach())
        if unguided is pred:
            return found
        changed = (found.x0 != unguided.x0.detach()) | (found.eps != unguided.eps.detach())
        self.moved = self.moved.to(changed.device) | changed.flatten(1).any(dim=1)
        return found._replace(unguided_x0=unguided.x0.detach())


class SplitDenoiser:
    """Denoisers that each take a few images of a batch.

    A network rounds otherwise in passes of another size. Where all passes have the same size, an image is the same in
    every batch. The graph of one pass is also given back before the next one is made.

    Args:
        parts: what denoises the first ``size`` images of a batch, the next ones, and so on.
        size: images of each.
    """

    def __init__(self, parts: Sequence[GuidedDenoiser], size: int) -> None:
        self.parts, self.size = parts, size

    def __call__(self, x: Tensor, step: Step) -> Prediction:
        found: list[Prediction] = []
        for part, images in zip(self.parts, x.split(self.size), strict=True):
            try:
                found.append(part(images, step))
            except GuidanceError as error:
                raise GuidanceError(len(found) * self.size + error.position, error.reason) from error
        if len(found) == 1:
            return found[0]
        x0, eps, variance = (
            torch.cat(values) if values[0].ndim else values[0]
            for values in zip(*((each.x0, each.eps, each.variance) for each in found), strict=True)
        )
        if all(each.unguided_x0 is None for each in found):
            return Prediction(x0, eps, variance)
        unguided = [each.x0 if each.unguided_x0 is None else each.unguided_x0 for each in found]
        return Prediction(x0, eps, variance, torch.cat(unguided))

    @property
    def retries(self) -> Tensor:
        """(B,): for each image, the steps that were computed again."""
        return torch.cat([part.retries.expand(self.size) for part in self.parts])

    @property
    def moved(self) -> Tensor:
        """(B,): for each image, whether guidance has changed any prediction."""
        return torch.cat([part.moved.expand(self.size) for part in self.parts])

    def follow(self, places: Tensor) -> None:
        """Image i is from now on what image ``places[i]`` was."""
        retries, moved = (values.to(places.device)[places].split(self.size) for values in (self.retries, self.moved))
        for part, own, own_moved in zip(self.parts, retries, moved, strict=True):
            part.retries, part.moved = own, own_moved


def _choose(images: Tensor, one: Prediction, other: Prediction) -> Prediction:
    """One prediction for the chosen ``images``, (B,), and another for the rest."""
    chosen = images[:, None, None, None]
    x0, eps, variance = (
        torch.where(chosen, a, b) if a.ndim else a  # a variance without dimensions is that of all images
        for a, b in zip(one[:3], other[:3], strict=True)
    )
    if one.unguided_x0 is None or other.unguided_x0 is None:
        return Prediction(x0, eps, variance)
    return Prediction(x0, eps, variance, torch.where(chosen, one.unguided_x0, other.unguided_x0))


def is_lost(x: Tensor) -> Tensor:
    """Where numbers of the size of x_t, which is about 1, are NaN, infinite or so large that nothing of x_t is left."""
    return ~(x.abs() < LOST)


def _broken(pred: Prediction, step: Step) -> Tensor:
    """(B,): whether an image's prediction is lost. Of x_t, it has √ᾱ_t·x̂0 and √(1−ᾱ_t)·ε̂."""
    lost = is_lost(step.alpha_bar_t**0.5 * pred.x0) | is_lost((1 - step.alpha_bar_t) ** 0.5 * pred.eps)
    return (lost | ~torch.isfinite(pred.variance)).flatten(1).any(dim=1)


class Clamp:
    """Clamp x̂0 to [-1, 1], and keep eps consistent with it, as guided-diffusion does.

    With a ``share`` it is dynamic thresholding (Saharia et al. 2022, Imagen, §2.3): x̂0 is clamped to [-s, s] and
    divided by s. What is saturated has no gradient further down the list. What is lost becomes NaN, and not white or
    black.

    Args:
        images: (B,) whose x̂0 is clamped; all by default.
        change_noise: whether eps becomes consistent with the clamped x̂0.
        share: of an image's pixels, those that lie within [-s, s], where s is at least 1; None clamps to [-1, 1].
        most: the largest s.
    """

    def __init__(
        self,
        images: Tensor | None = None,
        change_noise: bool = True,
        share: float | None = None,
        most: float | None = None,
    ) -> None:
        self.images, self.change_noise, self.share, self.most = images, change_noise, share, most

    def needs_graph(self, step: Step) -> bool:
        return False

    def __call__(self, pred: Prediction, x: Tensor, step: Step) -> Prediction:
        x0 = torch.where(is_lost(step.alpha_bar_t**0.5 * pred.x0), torch.nan, self._clamp(pred.x0))
        eps = to_eps(x0, x, step.alpha_bar_t) if self.change_noise else pred.eps
        if self.images is not None:
            chosen = self.images[:, None, None, None]
            x0, eps = torch.where(chosen, x0, pred.x0), torch.where(chosen, eps, pred.eps)
        return pred._replace(x0=x0, eps=eps)

    def _clamp(self, x0: Tensor) -> Tensor:
        if self.share is None:
            return x0.clamp(-1, 1)
        sizes = x0.detach().abs().flatten(1)
        bounds = torch.stack([torch.quantile(each, self.share) for each in sizes]).clamp(min=1, max=self.most)
        s = bounds[:, None, None, None]
        return x0.clamp(-s, s) / s


class RefuseFlat:
    """Changes nothing, and refuses an x̂0 so flat that CLIP cannot see anything in it.

    Args:
        weight: (B,) the weight of the guidance that follows; an image of weight 0 is not looked at.

    Raises:
        GuidanceError: when called on one.
    """

    def __init__(self, weight: Tensor) -> None:
        self.guided = weight != 0

    def needs_graph(self, step: Step) -> bool:
        return False

    def __call__(self, pred: Prediction, x: Tensor, step: Step) -> Prediction:
        flat = self.guided & (pred.x0.detach().flatten(1).std(dim=1) < FLAT)
        if flat.any():
            raise GuidanceError(int(flat.nonzero()[0]), f"CLIP sees a near-constant picture at t={step.t}")
        return pred


# where the gradient is taken

AnyObjective = TypeVar("AnyObjective", bound=Objective)


@dataclass(frozen=True)
class Gradient(Generic[AnyObjective]):
    """``gradient(objective, pred, x, step)`` -> (B, C, H, W).

    Args:
        take: what computes it.
        needs_graph: whether it differentiates through the denoising network, which then keeps its graph.
        last: computes the same, and gives the network's graph back on the way; None where that is not known to be safe.
    """

    take: Callable[[AnyObjective, Prediction, Tensor, Step], Tensor]
    needs_graph: bool = False
    last: Callable[[AnyObjective, Prediction, Tensor, Step], Tensor] | None = None

    def __call__(self, objective: AnyObjective, pred: Prediction, x: Tensor, step: Step) -> Tensor:
        return self.take(objective, pred, x, step)


def through_network(score: Callable[[Objective, Prediction, Tensor, Step], Tensor]) -> Gradient[Objective]:
    """The gradient of a score at x_t, through the denoising network."""

    def take(objective: Objective, pred: Prediction, x: Tensor, step: Step, retain_graph: bool = True) -> Tensor:
        return _derivative(score(objective, pred, x, step), x, retain_graph)

    return Gradient(take, needs_graph=True, last=partial(take, retain_graph=False))


@Gradient
def grad_noisy(objective: Objective, pred: Prediction, x: Tensor, step: Step) -> Tensor:
    """∇_{x_t} L(x_t, t), by a model that was trained on noisy images (GLIDE). No network backward."""
    return _gradient(objective, x.detach().requires_grad_(), step)


@Gradient
def grad_clean(objective: Objective, pred: Prediction, x: Tensor, step: Step) -> Tensor:
    """∇_{x̂0} L(x̂0). No network backward."""
    return _gradient(objective, pred.x0.detach().requires_grad_(), step)


@through_network
def grad_denoised(objective: Objective, pred: Prediction, x: Tensor, step: Step) -> Tensor:
    """∇_{x_t} L(x̂0(x_t)), through the network."""
    return objective(pred.x0, step)


@through_network
def grad_blended(objective: Objective, pred: Prediction, x: Tensor, step: Step) -> Tensor:
    """∇_{x_t} L(√(1−ᾱ_t)·x̂0 + (1 − √(1−ᾱ_t))·x_t), through the network (Crowson's clip-guided diffusion)."""
    share = (1 - step.alpha_bar_t) ** 0.5
    return objective(share * pred.x0 + (1 - share) * x, step)


@Gradient
def grad_pixels(objective: PixelObjective, pred: Prediction, x: Tensor, step: Step) -> Tensor:
    """The gradient at the pixels that CLIP sees of x̂0, in place of x̂0's own, over √ᾱ_t. No network backward.

    1/√ᾱ_t is what ∂x̂0/∂x_t would be if the network's eps did not depend on x_t.
    """
    return objective.pixel_gradient(pred.x0) / step.alpha_bar_t**0.5


def _gradient(objective: Objective, at: Tensor, step: Step) -> Tensor:
    with torch.enable_grad():
        return _derivative(objective(at, step), at, retain_graph=False)


def _derivative(scores: Tensor, at: Tensor, retain_graph: bool = True) -> Tensor:
    """∂(Σ scores)/∂at; float16, whose smallest number is 6e-8, has it multiplied by 2¹⁰ on the way."""
    device = at.device.type
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    scale = 2.0**10 if half else 1.0
    return torch.autograd.grad(scale * scores.sum(), at, retain_graph=retain_graph)[0] / scale


# how it is injected: (pred, w·g, step) -> Prediction
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


def shift_sample(pred: Prediction, direction: Tensor, step: Step) -> Prediction:
    """Move x_s by the direction."""
    return pred._replace(x0=pred.x0 + direction / step.alpha_bar_s**0.5)


def shift_x0(pred: Prediction, direction: Tensor, step: Step) -> Prediction:
    """Move the predicted picture by the direction, and eps so that x_t stays what it is."""
    eps = pred.eps - (step.alpha_bar_t / (1 - step.alpha_bar_t)) ** 0.5 * direction
    return pred._replace(x0=pred.x0 + direction, eps=eps)


# how strong, beside the weight: (g, pred, step) -> a factor, (B, 1, 1, 1) or a number
Scale = Callable[[Tensor, Prediction, Step], Tensor | float]


def rms(image: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, 1, 1)."""
    return image.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()


@dataclass(frozen=True)
class GradientGuidance(Generic[AnyObjective]):
    """One gradient, injected one way.

    Args:
        objective: what is raised.
        weight: (B,) the weight w of each image; 0 leaves an image as it is.
        gradient: where the gradient is taken.
        shift: how it is injected.
        scale: what the weight is multiplied by at each step.
        limit: how far score addition may move x̂0, in units of √(1−ᾱ_t), the standard deviation of x0 given x_t where
            data are a unit Gaussian: the largest root mean square of √(1−ᾱ_t)/√ᾱ_t·w·g. A larger move is scaled down,
            image by image. It is a limit on the drift, so it means the same at any number of steps.
        required: whether a gradient of 0 is an error, as it is for what a text asks.
    """

    objective: AnyObjective
    weight: Tensor
    gradient: Gradient[AnyObjective]
    shift: Shift
    scale: Scale | None = None
    limit: float | None = None
    required: bool = True

    def needs_graph(self, step: Step) -> bool:
        return self.gradient.needs_graph

    def __call__(self, pred: Prediction, x: Tensor, step: Step) -> Prediction:
        g = self.gradient(self.objective, pred, x, step)
        guided = self.weight != 0
        g = refuse_zero(g) if self.required else g
        scale = 1.0 if self.scale is None else self.scale(g, pred, step)
        direction = self.weight[:, None, None, None] * scale * g
        if self.limit is not None:
            move = rms(direction) * ((1 - step.alpha_bar_t) / step.alpha_bar_t) ** 0.5
            share = self.limit / move.clamp(min=self.limit)
            direction = direction * torch.where(move.isinf(), torch.nan, share)  # else it would be 0
        direction = torch.where(guided[:, None, None, None], direction, 0)
        return self.shift(pred, direction, step)


@dataclass(frozen=True)
class GradientAscent:
    """Several steps of gradient ascent from x̂0, by which x̂0 moves; eps stays.

    Args:
        objective: what is raised.
        weight: (B,) what a gradient is multiplied by to be a step; 0 leaves an image as it is.
        count: of steps.
    """

    objective: Objective
    weight: Tensor
    count: int

    def needs_graph(self, step: Step) -> bool:
        return False

    def __call__(self, pred: Prediction, x: Tensor, step: Step) -> Prediction:
        rate, guided = self.weight[:, None, None, None], (self.weight != 0)[:, None, None, None]
        x0 = pred.x0.detach()
        for _ in range(self.count):
            g = refuse_zero(_gradient(self.objective, x0.clone().requires_grad_(), step))
            x0 = torch.where(guided, x0 + rate * g, x0)
        return pred._replace(x0=pred.x0 + (x0 - pred.x0.detach()))


@dataclass(frozen=True)
class SphericalGuidance:
    """Turn the noise of a step towards the gradient and keep its length, √n·σ_t (Yang et al. 2024, DSG, eq. 13).

    It belongs to DDPM's steps, whose noise it turns: others add another noise, or none.

    Args:
        objective: what is raised.
        rate: (B,) from 0, the noise as it was drawn, to 1, the direction of the gradient alone.
        gradient: where the gradient is taken.
        noise: (B, C, H, W), the draw of a step, by its number in the walk.
    """

    objective: Objective
    rate: Tensor
    gradient: Gradient[Objective]
    noise: Callable[[int], Tensor]

    def needs_graph(self, step: Step) -> bool:
        return self.gradient.needs_graph

    def __call__(self, pred: Prediction, x: Tensor, step: Step) -> Prediction:
        g = refuse_zero(self.gradient(self.objective, pred, x, step))
        drawn = pred.variance.sqrt() * self.noise(step.number)
        radius = pred.variance.sqrt()  # of both, as root mean squares
        mixed = drawn + self.rate[:, None, None, None] * (radius * g / rms(g) - drawn)
        turned = radius * mixed / rms(mixed).clamp(min=1e-20)
        move = torch.where((self.rate != 0)[:, None, None, None], turned - drawn, 0)
        return pred._replace(x0=pred.x0 + move / step.alpha_bar_s**0.5)


@dataclass(frozen=True)
class GuidanceInterval:
    """A guidance that acts at ``low < t ≤ high`` alone."""

    guidance: Guidance
    low: float
    high: float

    def needs_graph(self, step: Step) -> bool:
        return self.low < step.t <= self.high and self.guidance.needs_graph(step)

    def __call__(self, pred: Prediction, x: Tensor, step: Step) -> Prediction:
        return self.guidance(pred, x, step) if self.low < step.t <= self.high else pred


@dataclass(frozen=True)
class Sum:
    """Guidances that each see the prediction as it came, and whose changes are added."""

    guidances: Sequence[Guidance]

    def needs_graph(self, step: Step) -> bool:
        return any(guidance.needs_graph(step) for guidance in self.guidances)

    def __call__(self, pred: Prediction, x: Tensor, step: Step) -> Prediction:
        moved = [guidance(pred, x, step) for guidance in self.guidances]
        return pred._replace(
            x0=pred.x0 + sum(other.x0 - pred.x0 for other in moved),
            eps=pred.eps + sum(other.eps - pred.eps for other in moved),
        )


class WeightedTexts:
    """Σ_k w_k·L_k over the K texts of each image, so that its gradient is the weighted sum of theirs.

    The weights are not normalised: one text of weight 2 is what twice the guidance weight is.

    Args:
        objective: gives (B, K); one that knows no text gives (B,) and is left as it is.
        weights: (B, K), of which those of texts that an image doesn't have are 0.
    """

    def __init__(self, objective: Objective, weights: Tensor) -> None:
        self.objective, self.weights = objective, weights

    def __call__(self, image: Tensor, step: Step) -> Tensor:
        scores = self.objective(image, step)
        return scores if scores.ndim == 1 else (self.weights * scores).sum(dim=1)

    def pixel_gradient(self, image: Tensor) -> Tensor:
        objective: Any = self.objective
        return objective.pixel_gradient(image, self.weights)


def weigh_texts(guidance: Guidance, weights: Tensor) -> Guidance:
    """A guidance that raises the weighted sum of its objective over the texts of each image, (B, K)."""
    if isinstance(guidance, Sum):
        return Sum([weigh_texts(each, weights) for each in guidance.guidances])
    if isinstance(guidance, GradientGuidance | GradientAscent | SphericalGuidance):
        return replace(guidance, objective=WeightedTexts(guidance.objective, weights))
    return guidance


def free_graph(guidances: Sequence[Guidance]) -> list[Guidance]:
    """The same guidances, of which the last gradient through the network gives its graph back on the way."""
    found = list(guidances)
    for place, each in reversed(list(enumerate(guidances))):
        if isinstance(each, Sum):
            found[place] = Sum(free_graph(each.guidances))
        elif isinstance(each, GradientGuidance | SphericalGuidance) and each.gradient.last is not None:
            found[place] = replace(each, gradient=replace(each.gradient, take=each.gradient.last))
        if not isinstance(each, GradientAscent):  # which has a graph of its own
            break
    return found


def refuse_zero(g: Tensor) -> Tensor:
    """NaN for an image whose gradient is 0, so that what does nothing is found as what is broken is."""
    nothing = (g == 0).flatten(1).all(dim=1)
    return torch.where(nothing[:, None, None, None], torch.nan, g)
