"""How a network that was made for clean pictures is told how much noise is in x_t."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipward.networks.unet import time_embedding


class LevelledConv(nn.Module):
    """A convolution whose output is scaled and shifted by the noise level; new, it changes nothing.

    The level is given by ᾱ_t, so that it means the same under every schedule, and is set before the network is called.

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
        self.alpha_bar: Tensor | None = None  # (B,); clean pictures where there is none

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        alpha_bar = x.new_ones(len(x)) if self.alpha_bar is None else self.alpha_bar.to(x.device)
        angle = torch.atan2((1 - alpha_bar).sqrt(), alpha_bar.sqrt()) * (2000 / math.pi)  # 0 is clean, 1000 is noise
        emb = self.film(F.silu(self.embed(time_embedding(angle, self.dim).to(x.dtype))))
        scale, shift = emb[:, :, None, None].chunk(2, dim=1)
        return h * (1 + scale) + shift
