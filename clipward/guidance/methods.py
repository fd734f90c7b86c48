"""One short factory per published method: a composition of guidances, never a loop of its own.

``guidance_weight`` has one unit in each family:

- *cosine*: it multiplies the gradient of a cosine. A CLIP's logit scale (100 for OpenAI's) asks for one text's worth.
- *log-likelihood*: it multiplies the gradient of a log-probability. 1 asks for one text's worth.
- *step*: it multiplies the step that the method's authors take. 1 is theirs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from clipward.diffusion.denoiser import Prediction
from clipward.diffusion.schedule import Step
from clipward.guidance.core import (
    GradientAscent,
    GradientGuidance,
    Guidance,
    Sum,
    grad_blended,
    grad_clean,
    grad_denoised,
    grad_noisy,
    grad_pixels,
    rms,
    shift_eps,
    shift_mean,
    shift_sample,
    shift_x0,
)
from clipward.guidance.objectives import (
    Cutouts,
    Distance,
    MonteCarlo,
    Objectives,
    Range,
    SphericalDistance,
    TotalVariation,
    Views,
)

Guide = Callable[[Objectives, Tensor], list[Guidance]]
GuidedBy = Literal["clip", "noisy clip", "classifier"]
Unit = Literal["cosine", "log-likelihood", "step"]


@dataclass(frozen=True)
class Method:
    """How a text guides.

    Args:
        guide: from objectives and (B,) weights to what changes a prediction.
        unit: of the weight.
        weight: what the authors use, or what a person may begin with.
        repeats: how often each step is walked, with the noise put back in between (recurrence, time travel).
        guided_by: the kind of model whose gradient it takes.
        contrast: whether the log-likelihood of a text is taken against its contrast captions, where it has any.
        interval: the shares of T between which it guides.
    """

    guide: Guide
    unit: Unit
    weight: float
    repeats: int = 1
    guided_by: GuidedBy = "clip"
    contrast: bool = False
    interval: tuple[float, float] = (0.0, 1.0)


METHODS: dict[str, Method] = {}


def method(unit: Unit, weight: float, **settings: Any) -> Callable[[Guide], Guide]:
    """Name a factory as a method; the arguments are those of :class:`Method`."""

    def add(guide: Guide) -> Guide:
        METHODS[guide.__name__] = Method(guide, unit, weight, **settings)
        return guide

    return add


@method("cosine", 100)
def clip_guidance(objectives: Objectives, weight: Tensor) -> list[Guidance]:
    """N(μ + w·σ_t²·∇_{x_t} L(x̂0(x_t)), σ_t²): the CLIP-guidance formula as it is written."""
    return [GradientGuidance(objectives.cosine, weight, grad_denoised, shift_mean)]


@method("cosine", 100)
def clip_guidance_pixel(objectives: Objectives, weight: Tensor) -> list[Guidance]:
    """The CLIP-guidance formula as its authors coded it: σ_t²·ᾱ_t^(−½) times the gradient at CLIP's own pixels."""
    return [GradientGuidance(objectives.cosine, weight, grad_pixels, shift_mean)]


@method("cosine", 100)
def score_guidance(objectives: Objectives, weight: Tensor) -> list[Guidance]:
    """The same gradient added to the score: ∇ log p(x_t) + w·∇_{x_t} L(x̂0(x_t)), the note on GLIDE."""
    return [GradientGuidance(objectives.cosine, weight, grad_denoised, shift_eps)]


@method("log-likelihood", 3, guided_by="noisy clip")
def glide(objectives: Objectives, weight: Tensor) -> list[Guidance]:
    """μ + w·σ_t²·∇_{x_t}(τ·f(x_t, t)·g(y)) with a CLIP that was trained on noisy pictures (Nichol et al. 2022)."""
    return [GradientGuidance(objectives.log_likelihood, weight, grad_noisy, shift_mean)]


@method("log-likelihood", 20, guided_by="noisy clip", contrast=True)
def contrastive(objectives: Objectives, weight: Tensor) -> list[Guidance]:
    """μ + w·σ_t²·∇_{x_t} log p(y | x_t) with a noise-aware CLIP, over four views, limited to a twentieth of the noise.

    Ours. It is GLIDE's step with three changes. The objective compares a text with its contrast captions, so its
    gradient fades once the picture shows what the text says. The gradient is averaged over mirrored and shifted views.
    A limit on the ratio of guidance to noise keeps large weights from damaging pictures. There is no backward pass
    through the U-Net.
    """
    return [GradientGuidance(Views(objectives.log_likelihood), weight, grad_noisy, shift_mean, limit=0.05)]


@method("log-likelihood", 10, guided_by="classifier")
def classifier_guidance(objectives: Objectives, weight: Tensor) -> list[Guidance]:
    """μ + w·σ_t²·∇_{x_t} log p(y | x_t) with a noise-aware classifier (Dhariwal & Nichol 2021, Alg. 1)."""
    return [GradientGuidance(objectives.log_likelihood, weight, grad_noisy, shift_mean)]


@method("step", 1)
def dps(objectives: Objectives, weight: Tensor) -> list[Guidance]:
    """x_s − ζ·∇_{x_t} ‖r‖²/‖r‖ of the residual r = E_image(x̂0) − E_text (Chung et al. 2023, Alg. 1, ζ' = 1)."""
    return [GradientGuidance(Distance(objectives.cosine), 2 * weight, grad_denoised, shift_sample)]


@method("step", 1)
def freedom(objectives: Objectives, weight: Tensor) -> list[Guidance]:
    """x_s − ρ·∇_{x_t}‖E_image(x̂0) − E_text‖, ρ in proportion to the noise over the gradient (Yu et al. 2023)."""

    def rho(g: Tensor, pred: Prediction, step: Step) -> Tensor:
        c1 = step.alpha_bar_s**0.5 * step.beta / (1 - step.alpha_bar_t)
        return 0.02 * rms(pred.eps) * ((1 - step.alpha_bar_t) / step.alpha_bar_t) ** 0.5 * c1 / rms(g).clamp(min=1e-20)

    return [GradientGuidance(Distance(objectives.cosine), weight, grad_denoised, shift_sample, rho)]


@method("step", 1, interval=(0.1, 1))
def mpgd(objectives: Objectives, weight: Tensor) -> list[Guidance]:
    """x̂0 − (ρ/√ᾱ_s)·∇_{x̂0}‖E_image(x̂0) − E_text‖ with ρ = 1, down to t = T/10 (He et al. 2023)."""

    def over_root(g: Tensor, pred: Prediction, step: Step) -> float:
        return step.alpha_bar_s**-0.5

    return [GradientGuidance(Distance(objectives.cosine), weight, grad_clean, shift_x0, over_root)]


@method("step", 1, repeats=5)
def universal(objectives: Objectives, weight: Tensor) -> list[Guidance]:
    """Score addition with w = 2, then Adam on x̂0, each step five times (Bansal et al. 2023, Alg. 1)."""
    forward = GradientGuidance(objectives.log_likelihood, 2 * weight, grad_denoised, shift_eps)
    return [forward, GradientAscent(objectives.log_likelihood, 0.01 * weight, count=3, adam=True, eps_follows=True)]


@method("log-likelihood", 1)
def lgd_mc(objectives: Objectives, weight: Tensor) -> list[Guidance]:
    """Score addition of an objective smoothed over what x0 may be, by ten draws (Song et al. 2023)."""
    smooth = MonteCarlo(objectives.log_likelihood, objectives.noise, count=10)
    return [GradientGuidance(smooth, weight, grad_denoised, shift_eps)]


@method("step", 1)
def tfg(objectives: Objectives, weight: Tensor) -> list[Guidance]:
    """x_s + ρ_t·∇_{x_t} f/√α_t + √ᾱ_s·Σ μ_t·∇_{x̂0} f, f smoothed by one draw (Ye et al. 2024, Alg. 1).

    With the settings for faces: ρ = 0.5, μ = 8 in four steps, σ = 1, all constant in t.
    """
    smooth = MonteCarlo(objectives.log_likelihood, objectives.noise, count=1)

    def over_root(g: Tensor, pred: Prediction, step: Step) -> float:
        return (1 - step.beta) ** -0.5

    on_sample = GradientGuidance(smooth, 0.5 * weight, grad_denoised, shift_sample, over_root)
    return [Sum([on_sample, GradientAscent(smooth, 8 * weight, count=4)])]


@method("step", 0.001)  # at 0.01 the drawn faces diverge: a step grows as its gradient shrinks
def polyak(objectives: Objectives, weight: Tensor) -> list[Guidance]:
    """x_s − η·‖ε‖/‖g‖²·g, g the gradient of the distance over cuts of the picture (Shen et al. 2024)."""

    def step_length(g: Tensor, pred: Prediction, step: Step) -> Tensor:
        pixels = g[0].numel()
        return rms(pred.eps) * pixels**0.5 / (rms(g) ** 2 * pixels).clamp(min=1e-20)

    augmented = Distance(Cutouts(objectives.cosine, objectives.noise, count=4, smallest=0.8))
    return [GradientGuidance(augmented, weight, grad_denoised, shift_sample, step_length)]


@method("step", 1)
def cutouts(objectives: Objectives, weight: Tensor) -> list[Guidance]:
    """Crowson's: μ + σ_t²·g through the U-Net on a blend of x̂0 and x_t, with a spherical distance over 16 cuts (1000),
    total variation (150) and range (50)."""
    guided = (weight != 0).to(weight.dtype)
    spherical = SphericalDistance(Cutouts(objectives.cosine, objectives.noise, count=16))
    parts = [
        GradientGuidance(spherical, 1000 * weight, grad_blended, shift_mean),
        GradientGuidance(TotalVariation(), 150 * guided, grad_blended, shift_mean, required=False),
        GradientGuidance(Range(), 50 * guided, grad_denoised, shift_mean, required=False),
    ]
    return [Sum(parts)]


MethodName = Literal[*METHODS]  # type: ignore[valid-type]  # only known when the program runs
