"""The noise level as an input of a network that was made for clean pictures."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipward.networks.unet import time_embedding


def with_noise_level(image: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """(B, C, H, W) and ᾱ_t, one for all or (B,) -> (B, C + 1, H, W), what a :class:`NoiseConditionedConv` takes.

    The level travels as one more channel, so that it is an argument of networks whose code knows nothing of it.
    """
    level = torch.as_tensor(alpha_bar, dtype=image.dtype, device=image.device).expand(len(image))
    return torch.cat([image, level[:, None, None, None].expand(-1, 1, *image.shape[-2:])], dim=1)


class NoiseConditionedConv(nn.Module):
    """A convolution whose output is scaled and shifted by the noise level. A new one changes nothing.

    The level is ᾱ_t, which means the same under every schedule.

    Args:
        conv: the first convolution of a network.
        dim: of the level's embedding.
    """

    def __init__(self, conv: nn.Conv2d, dim: int = 64) -> None:
        super().__init__()
        self.conv, self.dim = conv, dim
        self.embed, self.film = nn.Linear(dim, dim), nn.Linear(dim, 2 * conv.out_channels)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C + 1, H, W), as :func:`with_noise_level` makes it. Returns what the convolution does."""
        h, alpha_bar = self.conv(x[:, :-1]), x[:, -1, 0, 0]
        angle = torch.atan2((1 - alpha_bar).sqrt(), alpha_bar.sqrt()) * (2000 / math.pi)  # 0 is clean, 1000 is noise
        emb = self.film(F.silu(self.embed(time_embedding(angle, self.dim).to(x.dtype))))
        scale, shift = emb[:, :, None, None].chunk(2, dim=1)
        return h * (1 + scale) + shift
