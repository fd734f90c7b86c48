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
from clipward.diffusion.solvers import SolverName
from clipward.guidance.core import (
    GradientAscent,
    GradientGuidance,
    Guidance,
    SphericalGuidance,
    Sum,
    free_graph,
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
    weigh_texts,
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
Clamping = Literal["first", "last", "never"]


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
        clamp: where x̂0 is clamped to [-1, 1], in models that clamp it: before the guidance, after it, or not at all.
        interval: the shares of T between which it guides; of an edit, shares of where its walk begins.
        solver: whose steps it takes by default, in place of DDPM's.
        steps: how many of that solver's steps.
        turns_noise: whether it turns the noise that DDPM's steps add, and so guides no others.
    """

    guide: Guide
    unit: Unit
    weight: float
    repeats: int = 1
    guided_by: GuidedBy = "clip"
    contrast: bool = False
    clamp: Clamping = "first"
    interval: tuple[float, float] = (0.0, 1.0)
    solver: SolverName | None = None
    steps: int = 0
    turns_noise: bool = False

    def guidances(self, objectives: Objectives, weight: Tensor) -> list[Guidance]:
        """What changes a prediction: :attr:`guide`, where an image has several texts by their weighted sum."""
        found = free_graph(self.guide(objectives, weight))
        if objectives.text_weights is None:
            return found
        return [weigh_texts(guidance, objectives.text_weights) for guidance in found]


METHODS: dict[str, Method] = {}
MOST = 1.0  # how far `contrastive` may move x̂0, in standard deviations of what x0 may be; see GradientGuidance.limit


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


@method("log-likelihood", 20, guided_by="noisy clip", contrast=True, solver="sde_dpmpp_2m", steps=20)
def contrastive(objectives: Objectives, weight: Tensor) -> list[Guidance]:
    """∇ log p(x_t) + w·∇_{x_t} log p(y | x_t) with a noise-aware CLIP, over views, limited to MOST of x̂0.

    Ours. It is GLIDE's gradient with four changes. The objective compares a text with its contrast captions, so its
    gradient fades once the picture shows what the text says. The gradient is averaged over mirrored and shifted views,
    of which each step takes two in turn.
    It is added to the score, and a limit on how far x̂0 moves keeps large weights from damaging pictures; both mean the
    same at any number of steps. There is no backward pass through the U-Net.
    """
    views = Views(objectives.log_likelihood, in_turn=True)
    return [GradientGuidance(views, weight, grad_noisy, shift_eps, limit=MOST)]


@method("log-likelihood", 160, contrast=True, interval=(0.3, 1), solver="sde_dpmpp_2m", steps=40)
def contrastive_denoised(objectives: Objectives, weight: Tensor) -> list[Guidance]:
    """∇ log p(x_t) + w·∇_{x_t} log p(y | x̂0(x_t)) with any CLIP, through the U-Net, over four views, limited as above.

    Ours: ``contrastive`` for a CLIP that has seen clean pictures only. The U-Net's Jacobian turns the gradient at x̂0
    into one at x_t, at the cost of a backward pass; below 0.3·T, where it would change next to nothing, it is spared.
    """
    return [GradientGuidance(Views(objectives.log_likelihood), weight, grad_denoised, shift_eps, limit=MOST)]


@method("log-likelihood", 10, guided_by="classifier")
def classifier_guidance(objectives: Objectives, weight: Tensor) -> list[Guidance]:
    """μ + w·σ_t²·∇_{x_t} log p(y | x_t) with a noise-aware classifier (Dhariwal & Nichol 2021, Alg. 1)."""
    return [GradientGuidance(objectives.log_likelihood, weight, grad_noisy, shift_mean)]


@method("step", 1)
def dps(objectives: Objectives, weight: Tensor) -> list[Guidance]:
    """x_s − ζ·∇_{x_t} ‖r‖²/‖r‖ of the residual r = E_image(x̂0) − E_text (Chung et al. 2023, Alg. 1, ζ' = 1)."""
    return [GradientGuidance(Distance(objectives.cosine), 2 * weight, grad_denoised, shift_sample)]


def freedom_step(g: Tensor, pred: Prediction, step: Step) -> Tensor:
    """rms(ε)·√(1−ᾱ_t)/√ᾱ_t·c1/rms(g): as much as ε moves the mean of x_s (Yu et al. 2023, and their code)."""
    c1 = step.alpha_bar_s**0.5 * step.beta / (1 - step.alpha_bar_t)
    return rms(pred.eps) * ((1 - step.alpha_bar_t) / step.alpha_bar_t) ** 0.5 * c1 / rms(g).clamp(min=1e-20)


@method("step", 1, clamp="never")
def freedom(objectives: Objectives, weight: Tensor) -> list[Guidance]:
    """x_s − 0.02·ρ·∇_{x_t}‖E_image(x̂0) − E_text‖, with ρ by :func:`freedom_step` (Yu et al. 2023)."""
    return [GradientGuidance(objectives.distance, 0.02 * weight, grad_denoised, shift_sample, freedom_step)]


@method("step", 1, interval=(0.1, 1), clamp="never")
def mpgd(objectives: Objectives, weight: Tensor) -> list[Guidance]:
    """x̂0 − (ρ/√ᾱ_s)·∇_{x̂0}‖E_image(x̂0) − E_text‖, with ρ by :func:`freedom_step`, to T/10 (He et al. 2023)."""

    def rho(g: Tensor, pred: Prediction, step: Step) -> Tensor:
        return freedom_step(g, pred, step) / step.alpha_bar_s**0.5

    return [GradientGuidance(objectives.distance, weight, grad_clean, shift_x0, rho)]


@method("step", 1, interval=(0.1, 1), turns_noise=True)
def dsg(objectives: Objectives, weight: Tensor) -> list[Guidance]:
    """The noise of a step, turned by 0.05 towards −∇_{x_t}‖E_image(x̂0) − E_text‖, to T/10 (Yang et al. 2024)."""
    rate = (0.05 * weight).clamp(max=1)
    return [SphericalGuidance(objectives.distance, rate, grad_denoised, objectives.noise)]


@method("step", 1, repeats=5, clamp="last")
def universal(objectives: Objectives, weight: Tensor) -> list[Guidance]:
    """Score addition with w = 5, each step five times, clamped after it (Bansal et al. 2023, Alg. 1, for CLIP).

    For CLIP its authors take no backward steps on x̂0.
    """
    return [GradientGuidance(objectives.log_likelihood, 5 * weight, grad_denoised, shift_eps)]


@method("log-likelihood", 1)
def lgd_mc(objectives: Objectives, weight: Tensor) -> list[Guidance]:
    """Score addition of an objective smoothed over what x0 may be, by ten draws (Song et al. 2023)."""
    smooth = MonteCarlo(objectives.log_likelihood, objectives.noise, count=10)
    return [GradientGuidance(smooth, weight, grad_denoised, shift_eps)]


@method("step", 1)
def tfg(objectives: Objectives, weight: Tensor) -> list[Guidance]:
    """``x_s + ρ_t·∇_{x_t} f/√α_t + √ᾱ_s·Σ μ_t·∇_{x̂0} f``, f smoothed by one draw (Ye et al. 2024, Alg. 1).

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


@method("step", 1, clamp="never")
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


AUTO = "auto"  # takes what the given models allow, see clipward.guidance.models.choose_method
MethodName = Literal[AUTO, *METHODS]  # type: ignore[valid-type]  # only known when the program runs
