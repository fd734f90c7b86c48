"""Noise and blur that make a critic read half-denoised pictures."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
