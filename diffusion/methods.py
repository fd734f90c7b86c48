"""One short factory per published method: a composition of guidances, never a loop of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from diffusion.denoiser import VarType
from diffusion.guidance import (
    GradientGuidance,
    Guidance,
    Loss,
    PixelLoss,
    grad_denoised,
    grad_pixels,
    shift_eps,
    shift_mean,
)
from diffusion.schedule import SkipType
from errors import InputError

Method = Callable[[Loss, Tensor], list[Guidance]]


def clip_guidance(loss: Loss, weight: Tensor) -> list[Guidance]:
    """N(μ + s·σ_t²·∇_{x_t} L(x̂0(x_t)), σ_t²): the CLIP-guidance formula as it is written."""
    return [GradientGuidance(loss, weight, grad_denoised, shift_mean)]


def score_guidance(loss: Loss, weight: Tensor) -> list[Guidance]:
    """The same gradient added to the score: ∇ log p(x_t) + s·∇_{x_t} L(x̂0(x_t)), the note on GLIDE."""
    return [GradientGuidance(loss, weight, grad_denoised, shift_eps)]


def clip_guidance_pixel(loss: PixelLoss, weight: Tensor) -> list[Guidance]:
    """The CLIP-guidance formula as its authors coded it: σ_t²·ᾱ_t^(−½) times the gradient at CLIP's own pixels."""
    return [GradientGuidance(loss, weight, grad_pixels, shift_mean)]


METHODS: dict[str, Method] = {
    "clip_guidance": clip_guidance,
    "clip_guidance_pixel": clip_guidance_pixel,
    "score_guidance": score_guidance,
}


@dataclass(frozen=True)
class SamplingConfig:
    """How pictures are made.

    Args:
        method: how the text guides.
        skip_steps: reverse steps to take.
        skip_type: how they are spread over the noise levels.
        ddim: take DDIM's steps in place of DDPM's.
        ddim_eta: DDIM's noise, from 0 (none) to 1 (as DDPM).
        var_type: DDPM's variance, which also scales the mean's shift; what the weights were made for by default.
        clip_denoised: clamp x̂0 to [-1, 1] at every step; what the weights were made for by default.
        batch_multiple: batches are filled up to a multiple of this. A network rounds differently in batches of other
            sizes (by 1e-6, measured on a CPU for sizes that 4 does not divide), and strong guidance makes another
            picture of it. 1 saves the memory and leaves pictures to depend on the micro-batch.
    """

    method: Literal["clip_guidance", "clip_guidance_pixel", "score_guidance"] = "clip_guidance"
    skip_steps: int = 50
    skip_type: SkipType = "uniform"
    ddim: bool = False
    ddim_eta: float = 0.0
    var_type: VarType | None = None
    clip_denoised: bool | None = None
    batch_multiple: int = 4

    def __post_init__(self) -> None:
        if self.batch_multiple < 1:
            raise InputError(f"sampling.batch_multiple: {self.batch_multiple} given; 1 or more would do")
