"""Noise and blur, so that a network learns to read half-denoised pictures."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipward.diffusion.denoiser import add_noise
from clipward.diffusion.schedule import Schedule
from clipward.errors import InputError, shorten

MOST_NOISE = 10.0  # pictures lie in [-1, 1]


def check_noise(max_noise: float) -> None:
    """Raise :class:`InputError` where it is no strength of noise."""
    if not 0 <= max_noise <= MOST_NOISE:
        raise InputError(f"model.max_noise: got {shorten(max_noise)}, expected 0 to {MOST_NOISE}")


def degrade(image: Tensor, max_noise: float, blur: bool) -> Tensor:
    """(B, C, H, W) in [-1, 1], with noise and blur of a random strength for each picture."""
    if blur:
        small = [F.avg_pool2d(image, factor) for factor in (2, 4)]
        versions = [image, image, *(F.interpolate(s, image.shape[-2:], mode="bilinear") for s in small)]
        choice = torch.randint(len(versions), (len(image),), device=image.device)
        image = torch.stack(versions)[choice, torch.arange(len(image), device=image.device)]
    if max_noise > 0:
        strength = max_noise * torch.rand(len(image), 1, 1, 1, device=image.device)
        image = image + strength * torch.randn_like(image)
    return image


def diffuse(image: Tensor, schedule: Schedule, t: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """x_t of ``image``, (B, C, H, W), and its ᾱ_t, (B,), at ``t``, or at a random one for each picture."""
    times = torch.randint(len(schedule), (len(image),)) if t is None else torch.as_tensor(t)
    alpha_bar = schedule.alpha_bar[times].float().to(image.device)
    return add_noise(image, torch.randn_like(image), alpha_bar), alpha_bar
