"""The U-Net of Ho et al. 2020, in the arrangement that diffusers calls ``UNet2DModel``."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import InputError


@dataclass(frozen=True)
class UNetConfig:
    """The size of a :class:`UNet`. The defaults are the 114 M-parameter network of CelebA-HQ 256.

    Args:
        image_channels: channels of x_t.
        out_channels: channels of the output; twice ``image_channels`` where the variance is learned, and
            ``image_channels`` where it is left out.
        patch: side of the pixel blocks that are folded into channels before the first convolution.
        channels: channels of each level, from the finest to the coarsest; each level halves the size.
        num_res_blocks: residual blocks a level on the way down; one more on the way up.
        attention_levels: the levels (0 is the finest) whose residual blocks are followed by self-attention.
        dropout: inside the residual blocks.
        norm_groups: groups of every GroupNorm; divides every number of channels.
        norm_eps: of every GroupNorm.
    """

    image_channels: int = 3
    out_channels: int | None = None
    patch: int = 1
    channels: tuple[int, ...] = (128, 128, 256, 256, 512, 512)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (4,)
    dropout: float = 0.0
    norm_groups: int = 32
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if any(c % self.norm_groups for c in self.channels):
            raise InputError(
                f"unet.channels: {list(self.channels)} given; multiples of norm_groups ({self.norm_groups}) would do"
            )

    @property
    def stride(self) -> int:
        """Height and width of a picture are multiples of this."""
        return self.patch * 2 ** (len(self.channels) - 1)


class UNet(nn.Module):
    """Maps x_t and t to the network's output."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels, groups, eps = config.channels, config.norm_groups, config.norm_eps
        image_channels, patch, num_res_blocks = config.image_channels, config.patch, config.num_res_blocks
        out_channels = image_channels if config.out_channels is None else config.out_channels
        self.patch, self.time_channels = patch, channels[0]
        time_dim = 4 * channels[0]
        self.time_in, self.time_out = nn.Linear(channels[0], time_dim), nn.Linear(time_dim, time_dim)

        def res(c_in: int, c_out: int) -> ResBlock:
            return ResBlock(c_in, c_out, time_dim, config.dropout, groups, eps)

        def attention(level: int, c: int) -> nn.Module:
            return Attention(c, groups, eps) if level in config.attention_levels else nn.Identity()

        self.conv_in = nn.Conv2d(image_channels * patch**2, channels[0], 3, padding=1)
        c = channels[0]
        skips = [c]
        self.down = nn.ModuleList()
        for level, width in enumerate(channels):
            stage = nn.ModuleDict({"blocks": nn.ModuleList(), "attentions": nn.ModuleList()})
            for _ in range(num_res_blocks):
                stage["blocks"].append(res(c, width))
                stage["attentions"].append(attention(level, width))
                c = width
                skips.append(c)
            if level < len(channels) - 1:
                stage["resample"] = Downsample(c)
                skips.append(c)
            self.down.append(stage)

        self.middle = nn.ModuleList([res(c, c), Attention(c, groups, eps), res(c, c)])

        self.up = nn.ModuleList()  # from the coarsest level to the finest
        for level, width in reversed(list(enumerate(channels))):
            stage = nn.ModuleDict({"blocks": nn.ModuleList(), "attentions": nn.ModuleList()})
            for _ in range(num_res_blocks + 1):
                stage["blocks"].append(res(c + skips.pop(), width))
                stage["attentions"].append(attention(level, width))
                c = width
            if level > 0:
                stage["resample"] = Upsample(c)
            self.up.append(stage)

        self.norm_out = nn.GroupNorm(groups, c, eps)
        self.conv_out = nn.Conv2d(c, out_channels * patch**2, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: (B, C, H, W), H and W multiples of the stride; t: (B,) timesteps. Returns (B, out_channels, H, W)."""
        emb = self.time_out(F.silu(self.time_in(time_embedding(t, self.time_channels).to(x.dtype))))
        emb = F.silu(emb)
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))
        skips = [h]
        for stage in self.down:
            for block, attention in zip(stage["blocks"], stage["attentions"], strict=True):
                h = attention(block(h, emb))
                skips.append(h)
            if "resample" in stage:
                h = stage["resample"](h)
                skips.append(h)
        first, attention, second = self.middle
        h = second(attention(first(h, emb)), emb)
        for stage in self.up:
            for block, attention in zip(stage["blocks"], stage["attentions"], strict=True):
                h = attention(block(torch.cat([h, skips.pop()], dim=1), emb))
            if "resample" in stage:
                h = stage["resample"](h)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.patch)


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """(B,) -> (B, dim): sines, then cosines, of t at frequencies from 1 to 1/10000 (Ho et al. 2020's code)."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float()[:, None] * freqs  # (B, dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ResBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, time_dim: int, dropout: float, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in, eps), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_dim, c_out)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out, eps), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(emb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Self-attention over pixels with one head."""

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.query, self.key = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.value, self.out = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).mT  # (B, H·W, C)
        h = F.scaled_dot_product_attention(self.query(h), self.key(h), self.value(h))
        return x + self.out(h).mT.reshape(x.shape)


class Downsample(nn.Module):
    """A convolution of stride 2, padded on the right and below as in Ho et al.'s TensorFlow code."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
