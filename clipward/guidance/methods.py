"""One short factory per published method: a composition of guidances, never a loop of its own.

``guidance_weight`` has one unit in each family:

- *cosine*: it multiplies the gradient of a cosine. A CLIP's logit scale (100 for OpenAI's) asks for one text's worth.
- *evidence*: it multiplies the gradient of a log-probability. 1 asks for one text's worth.
- *step*: it multiplies the step that the method's authors take. 1 is theirs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from clipward.diffusion.denoiser import Prediction
from clipward.diffusion.schedule import Step
from clipward.guidance.core import (
    Descent,
    GradientGuidance,
    Guidance,
    Together,
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
    Critic,
    Cutouts,
    Distance,
    MonteCarlo,
    Range,
    SphericalDistance,
    TotalVariation,
    Views,
)

Guide = Callable[[Critic, Tensor], list[Guidance]]
Kind = Literal["clip", "noisy clip", "classifier"]
Unit = Literal["cosine", "evidence", "step"]


@dataclass(frozen=True)
class Method:
    """How a text guides.

    Args:
        guide: from a critic and (B,) weights to what changes a prediction.
        unit: of the weight.
        weight: what the authors use, or what a person may begin with.
        repeats: how often each step is walked, with the noise put back in between (recurrence, time travel).
        critic: what kind of critic it asks.
        contrast: whether the evidence for a text is what tells it from its opposites, where any are known.
        interval: the shares of T between which it guides.
    """

    guide: Guide
    unit: Unit
    weight: float
    repeats: int = 1
    critic: Kind = "clip"
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
def clip_guidance(critic: Critic, weight: Tensor) -> list[Guidance]:
    """N(μ + s·σ_t²·∇_{x_t} L(x̂0(x_t)), σ_t²): the CLIP-guidance formula as it is written."""
    return [GradientGuidance(critic.cosine, weight, grad_denoised, shift_mean)]


@method("cosine", 100)
def clip_guidance_pixel(critic: Critic, weight: Tensor) -> list[Guidance]:
    """The CLIP-guidance formula as its authors coded it: σ_t²·ᾱ_t^(−½) times the gradient at CLIP's own pixels."""
    return [GradientGuidance(critic.cosine, weight, grad_pixels, shift_mean)]


@method("cosine", 100)
def score_guidance(critic: Critic, weight: Tensor) -> list[Guidance]:
    """The same gradient added to the score: ∇ log p(x_t) + s·∇_{x_t} L(x̂0(x_t)), the note on GLIDE."""
    return [GradientGuidance(critic.cosine, weight, grad_denoised, shift_eps)]


@method("evidence", 3, critic="noisy clip")
def glide(critic: Critic, weight: Tensor) -> list[Guidance]:
    """μ + s·σ_t²·∇_{x_t}(τ·f(x_t, t)·g(y)) with a CLIP that was trained on noisy pictures (Nichol et al. 2022)."""
    return [GradientGuidance(critic.evidence, weight, grad_noisy, shift_mean)]


@method("evidence", 20, critic="noisy clip", contrast=True)
def evidence(critic: Critic, weight: Tensor) -> list[Guidance]:
    """μ + s·σ_t²·∇_{x_t} log p(y | x_t) with a noise-aware CLIP, over four views, up to a twentieth of the noise.

    Ours: GLIDE's, of what tells a text from its opposites, so that it fades where a picture obeys; with a gradient that
    mirrored and moved pictures agree on, and a limit on the ratio of guidance to noise, so that a large weight does not
    leave the pictures that the model knows. No pass goes backwards through the U-Net.
    """
    return [GradientGuidance(Views(critic.evidence), weight, grad_noisy, shift_mean, limit=0.05)]


@method("evidence", 10, critic="classifier")
def classifier_guidance(critic: Critic, weight: Tensor) -> list[Guidance]:
    """μ + s·σ_t²·∇_{x_t} log p(y | x_t) with a noise-aware classifier (Dhariwal & Nichol 2021, Alg. 1)."""
    return [GradientGuidance(critic.evidence, weight, grad_noisy, shift_mean)]


@method("step", 1)
def dps(critic: Critic, weight: Tensor) -> list[Guidance]:
    """x_s − ζ·∇_{x_t} ‖r‖²/‖r‖ of the residual r = E_image(x̂0) − E_text (Chung et al. 2023, Alg. 1, ζ' = 1)."""
    return [GradientGuidance(Distance(critic.cosine), 2 * weight, grad_denoised, shift_sample)]


@method("step", 1)
def freedom(critic: Critic, weight: Tensor) -> list[Guidance]:
    """x_s − ρ·∇_{x_t}‖E_image(x̂0) − E_text‖, ρ in proportion to the noise over the gradient (Yu et al. 2023)."""

    def rho(g: Tensor, pred: Prediction, step: Step) -> Tensor:
        c1 = step.alpha_bar_s**0.5 * step.beta / (1 - step.alpha_bar_t)
        return 0.02 * rms(pred.eps) * ((1 - step.alpha_bar_t) / step.alpha_bar_t) ** 0.5 * c1 / rms(g).clamp(min=1e-20)

    return [GradientGuidance(Distance(critic.cosine), weight, grad_denoised, shift_sample, rho)]


@method("step", 1, interval=(0.1, 1))
def mpgd(critic: Critic, weight: Tensor) -> list[Guidance]:
    """x̂0 − (ρ/√ᾱ_s)·∇_{x̂0}‖E_image(x̂0) − E_text‖ with ρ = 1, down to t = T/10 (He et al. 2023)."""

    def over_root(g: Tensor, pred: Prediction, step: Step) -> float:
        return step.alpha_bar_s**-0.5

    return [GradientGuidance(Distance(critic.cosine), weight, grad_clean, shift_x0, over_root)]


@method("step", 1, repeats=5)
def universal(critic: Critic, weight: Tensor) -> list[Guidance]:
    """Score addition with s = 2, then Adam on x̂0, each step five times (Bansal et al. 2023, Alg. 1)."""
    forward = GradientGuidance(critic.evidence, 2 * weight, grad_denoised, shift_eps)
    return [forward, Descent(critic.evidence, 0.01 * weight, count=3, adam=True, eps_follows=True)]


@method("evidence", 1)
def lgd_mc(critic: Critic, weight: Tensor) -> list[Guidance]:
    """Score addition of a loss smoothed over what x0 may be, by ten draws (Song et al. 2023)."""
    smooth = MonteCarlo(critic.evidence, critic.noise, count=10)
    return [GradientGuidance(smooth, weight, grad_denoised, shift_eps)]


@method("step", 1)
def tfg(critic: Critic, weight: Tensor) -> list[Guidance]:
    """x_s + ρ_t·∇_{x_t} f/√α_t + √ᾱ_s·Σ μ_t·∇_{x̂0} f, f smoothed by one draw (Ye et al. 2024, Alg. 1).

    With the settings for faces: ρ = 0.5, μ = 8 in four steps, σ = 1, all constant in t.
    """
    smooth = MonteCarlo(critic.evidence, critic.noise, count=1)

    def over_root(g: Tensor, pred: Prediction, step: Step) -> float:
        return (1 - step.beta) ** -0.5

    on_sample = GradientGuidance(smooth, 0.5 * weight, grad_denoised, shift_sample, over_root)
    return [Together([on_sample, Descent(smooth, 8 * weight, count=4)])]


@method("step", 0.001)  # at 0.01 the drawn faces diverge: a step grows as its gradient shrinks
def polyak(critic: Critic, weight: Tensor) -> list[Guidance]:
    """x_s − η·‖ε‖/‖g‖²·g, g the gradient of the distance over cuts of the picture (Shen et al. 2024)."""

    def step_length(g: Tensor, pred: Prediction, step: Step) -> Tensor:
        pixels = g[0].numel()
        return rms(pred.eps) * pixels**0.5 / (rms(g) ** 2 * pixels).clamp(min=1e-20)

    augmented = Distance(Cutouts(critic.cosine, critic.noise, count=4, smallest=0.8))
    return [GradientGuidance(augmented, weight, grad_denoised, shift_sample, step_length)]


@method("step", 1)
def cutouts(critic: Critic, weight: Tensor) -> list[Guidance]:
    """Crowson's: μ + σ_t²·g through the U-Net on a blend of x̂0 and x_t, with a spherical distance over 16 cuts (1000),
    total variation (150) and range (50)."""
    guided = (weight != 0).to(weight.dtype)
    spherical = SphericalDistance(Cutouts(critic.cosine, critic.noise, count=16))
    parts = [
        GradientGuidance(spherical, 1000 * weight, grad_blended, shift_mean),
        GradientGuidance(TotalVariation(), 150 * guided, grad_blended, shift_mean, required=False),
        GradientGuidance(Range(), 50 * guided, grad_denoised, shift_mean, required=False),
    ]
    return [Together(parts)]


MethodName = Literal[
    "clip_guidance",
    "clip_guidance_pixel",
    "score_guidance",
    "glide",
    "evidence",
    "classifier_guidance",
    "dps",
    "freedom",
    "mpgd",
    "universal",
    "lgd_mc",
    "tfg",
    "polyak",
    "cutouts",
]
assert set(get_args(MethodName)) == set(METHODS)
