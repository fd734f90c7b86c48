"""What a picture is scored by. A loss is raised by guidance: higher is better."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.clip import Clip, preprocess
from diffusion.schedule import Step


class ClipSimilarity:
    """E_image(image) · E_text(text): the cosine between each picture and its own text.

    Args:
        clip: the critic.
        texts: one per image of the batch.
    """

    def __init__(self, clip: Clip, texts: Sequence[str]) -> None:
        self.clip, self.text_features = clip, clip.encode_text(texts)  # (B, D)

    def __call__(self, image: Tensor, step: Step | None = None) -> Tensor:
        return (self.clip.encode_image(image) * self.text_features).sum(dim=-1)

    def pixel_gradient(self, image: Tensor) -> Tensor:
        """∇ of the cosine at CLIP's own input (its size, its mean and std), resized to the picture: (B, C, H, W)."""
        with torch.enable_grad():
            pixels = preprocess(image.detach().float(), self.clip.preprocess).requires_grad_()
            similarity = (self.clip.encode_pixels(pixels) * self.text_features).sum()
            gradient = torch.autograd.grad(similarity, pixels)[0]
        return F.interpolate(gradient, image.shape[-2:], mode="bilinear", antialias=True, align_corners=False)


class Ensemble:
    """The mean of several similarities.

    Args:
        losses: what is averaged.
        weights: of each, relative to the others.
    """

    def __init__(self, losses: Sequence[ClipSimilarity], weights: Sequence[float]) -> None:
        self.losses, self.shares = losses, [weight / sum(weights) for weight in weights]

    def __call__(self, image: Tensor, step: Step | None = None) -> Tensor:
        return sum(share * loss(image, step) for share, loss in zip(self.shares, self.losses, strict=True))

    def pixel_gradient(self, image: Tensor) -> Tensor:
        return sum(share * loss.pixel_gradient(image) for share, loss in zip(self.shares, self.losses, strict=True))
