"""The U-Nets of Ho et al. 2020 and of Dhariwal & Nichol 2021, arranged as diffusers arranges ``UNet2DModel``."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipward.errors import InputError, shorten
from clipward.networks.lean import Conv2d, arrange, norm_silu

MOST = {  # of what a file may claim, far above any network that was ever made
    **{"image_channels": 2**10, "out_channels": 2**11, "patch": 2**8, "num_res_blocks": 2**7},
    **{"norm_groups": 2**16, "head_channels": 2**16, "channels": 2**16, "levels": 16, "num_classes": 2**20},
}


@dataclass(frozen=True)
class UNetConfig:
    """The size and the family of a :class:`UNet`. The defaults are Ho et al.'s 114 M parameters for CelebA-HQ 256.

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
        head_channels: channels of an attention head; one head without.
        scale_shift_norm: t scales and shifts the second normalised activation of a residual block (Nichol & Dhariwal
            2021), instead of being added before it.
        resblock_updown: levels are joined by residual blocks that resize, instead of convolutions.
        downsample_padding: of the convolution between levels: 0 pads on the right and below alone, as Ho et al.'s
            TensorFlow code; 1 on all sides.
        freq_shift: the lowest frequency that t is embedded by is 10000^(−(n − 1)/(n − freq_shift)) of n: 1 in Ho et
            al.'s code, 0 in OpenAI's.
        num_classes: how many classes a picture may be of, whose embeddings are added to that of t; none by default.
        null_class: whether one more embedding, the last, stands for pictures of any class. Label dropout trains it, and
            classifier-free guidance needs it. Other projects' weights are read without one.

    Raises:
        InputError: where a number is out of its range, or channels do not divide into groups or heads.
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
    head_channels: int | None = None
    scale_shift_norm: bool = False
    resblock_updown: bool = False
    downsample_padding: Literal[0, 1] = 0
    freq_shift: Literal[0, 1] = 1
    num_classes: int | None = None
    null_class: bool = True

    def __post_init__(self) -> None:
        counts = ("image_channels", "out_channels", "patch", "num_res_blocks", "norm_groups", "head_channels")
        for name in (*counts, "num_classes"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MOST[name]:
                raise InputError(f"unet.{name}: got {shorten(value)}, expected 1 to {MOST[name]}")
        if len(self.channels) > MOST["levels"] or max(self.channels, default=0) > MOST["channels"]:
            raise InputError(
                f"unet.channels: got {shorten(list(self.channels))}, expected at most {MOST['levels']} numbers up to "
                f"{MOST['channels']}"
            )
        if any(level < 0 for level in self.attention_levels):
            given = shorten(list(self.attention_levels))
            raise InputError(f"unet.attention_levels: got {given}, expected levels from 0, the finest, on")
        if not self.channels or min(self.channels) < 1 or self.channels[0] < 4 or self.channels[0] % 2:
            given = shorten(list(self.channels))
            raise InputError(f"unet.channels: got {given}, expected numbers above 0, the first even and 4 or more")
        if not 0 <= self.dropout < 1:
            raise InputError(f"unet.dropout: got {shorten(self.dropout)}, expected 0 or more, below 1")
        if not 0 < self.norm_eps < 1:
            raise InputError(f"unet.norm_eps: got {shorten(self.norm_eps)}, expected a number above 0, below 1")
        if any(c % self.norm_groups for c in self.channels):
            raise InputError(
                f"unet.channels: got {shorten(list(self.channels))}, expected multiples of norm_groups "
                f"({shorten(self.norm_groups)})"
            )
        attended = {c for level, c in enumerate(self.channels) if level in self.attention_levels} | {self.channels[-1]}
        if self.head_channels is not None and any(c % self.head_channels for c in attended):
            raise InputError(
                f"unet.head_channels: got {shorten(self.head_channels)}, expected a divisor of "
                f"{shorten(sorted(attended))}, the channels with attention"
            )

    @property
    def class_embeddings(self) -> int:
        """How many there are."""
        return 0 if self.num_classes is None else self.num_classes + self.null_class

    @property
    def learns_variance(self) -> bool:
        return self.out_channels == 2 * self.image_channels

    @property
    def stride(self) -> int:
        """Height and width of a picture are multiples of this."""
        return self.patch * 2 ** (len(self.channels) - 1)


class UNet(nn.Module):
    """Maps x_t and t to the network's output."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels, image_channels, num_res_blocks = config.channels, config.image_channels, config.num_res_blocks
        out_channels = image_channels if config.out_channels is None else config.out_channels
        self.patch, self.time_channels, self.freq_shift = config.patch, channels[0], config.freq_shift
        self.checkpointing = False  # recompute each block's activations on the way back, in place of keeping them
        time_dim = 4 * channels[0]
        self.time_in, self.time_out = nn.Linear(channels[0], time_dim), nn.Linear(time_dim, time_dim)
        self.num_classes, self.null_class = config.num_classes, config.null_class
        if config.num_classes is not None:
            self.class_embedding = nn.Embedding(config.class_embeddings, time_dim)

        def res(c_in: int, c_out: int, resize: nn.Module | None = None) -> ResBlock:
            return ResBlock(c_in, c_out, time_dim, config, resize)

        def attention(level: int, c: int) -> nn.Module:
            return Attention(c, config) if level in config.attention_levels else nn.Identity()

        def down(c: int) -> nn.Module:
            return res(c, c, nn.AvgPool2d(2)) if config.resblock_updown else Downsample(c, config.downsample_padding)

        def up(c: int) -> nn.Module:
            return res(c, c, nn.UpsamplingNearest2d(scale_factor=2)) if config.resblock_updown else Upsample(c)

        self.conv_in = Conv2d(image_channels * self.patch**2, channels[0], 3, padding=1)
        c = channels[0]
        skips = [c]
        self.down = nn.ModuleList()
        for level, width in enumerate(channels):
            stage = Stage()
            for _ in range(num_res_blocks):
                stage.append(res(c, width), attention(level, width))
                c = width
                skips.append(c)
            if level < len(channels) - 1:
                stage.resample = down(c)
                skips.append(c)
            self.down.append(stage)

        self.middle = nn.ModuleList([res(c, c), Attention(c, config), res(c, c)])

        self.up = nn.ModuleList()  # from the coarsest level to the finest
        for level, width in reversed(list(enumerate(channels))):
            stage = Stage()
            for _ in range(num_res_blocks + 1):
                stage.append(res(c + skips.pop(), width), attention(level, width))
                c = width
            if level > 0:
                stage.resample = up(c)
            self.up.append(stage)

        self.norm_out = nn.GroupNorm(config.norm_groups, c, config.norm_eps)
        self.conv_out = Conv2d(c, out_channels * self.patch**2, 3, padding=1)
        fill_with_zeros(self.conv_out)

    def blocks(self) -> list[nn.Module]:
        """What to shard a large network by."""
        return [module for module in self.modules() if isinstance(module, ResBlock | Attention)]

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The network's output, (B, out_channels, H, W).

        Args:
            x: (B, C, H, W), H and W multiples of the stride.
            t: (B,) timesteps.
            label: (B,) classes from 0, or −1 for pictures of any class, which None stands for too.

        Raises:
            InputError: for a picture of any class, where the network knows none such.
        """
        x = x.to(self.conv_in.weight.dtype)
        emb = time_embedding(t, self.time_channels, self.freq_shift).to(x.dtype)
        emb = self.time_out(F.silu(self.time_in(emb)))
        if self.num_classes is not None:
            emb = emb + self.class_embedding(self._to_rows(label, t))
        emb = F.silu(emb)
        h = self.conv_in(arrange(F.pixel_unshuffle(x, self.patch)))
        skips = [h]
        for stage in cast("Iterable[Stage]", self.down):
            for block, attention in zip(stage.blocks, stage.attentions, strict=True):
                h = attention(self._run(block, h, emb))
                skips.append(h)
            if stage.resample is not None:
                h = stage.resample(h, emb)
                skips.append(h)
        first, attention, second = self.middle
        h = self._run(second, attention(self._run(first, h, emb)), emb)
        for stage in cast("Iterable[Stage]", self.up):
            for block, attention in zip(stage.blocks, stage.attentions, strict=True):
                h = attention(self._run(block, torch.cat([h, skips.pop()], dim=1), emb))
            if stage.resample is not None:
                h = stage.resample(h, emb)
        h = self.conv_out(norm_silu(self.norm_out, h))
        return F.pixel_shuffle(h.contiguous(), self.patch)

    def _to_rows(self, label: Tensor | None, t: Tensor) -> Tensor:
        label = torch.full_like(t, -1) if label is None else label
        if not self.null_class and (label < 0).any():
            raise InputError(f"class_label: got none, expected one of the {self.num_classes} classes of this network")
        return torch.where(label < 0, self.num_classes or 0, label)

    def _run(self, block: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, h, emb, use_reentrant=False)
        return block(h, emb)


def time_embedding(t: Tensor, dim: int, freq_shift: int = 1) -> Tensor:
    """(B,) -> (B, dim): sines, then cosines, of t at frequencies from 1 down to 1/10000 or so."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * exponent)  # (B, dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def fill_with_zeros(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class Stage(nn.Module):
    """The residual blocks of one level, each with its attention, and the way to the next level."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.attentions = nn.ModuleList(), nn.ModuleList()
        self.resample: nn.Module | None = None

    def append(self, block: nn.Module, attention: nn.Module) -> None:
        self.blocks.append(block)
        self.attentions.append(attention)


class ResBlock(nn.Module):
    """Two convolutions beside a shortcut; ``resize`` halves or doubles both ways, after the first activation."""

    def __init__(
        self, c_in: int, c_out: int, time_dim: int, config: UNetConfig, resize: nn.Module | None = None
    ) -> None:
        super().__init__()
        groups, eps = config.norm_groups, config.norm_eps
        self.resize, self.scale_shift_norm = resize or nn.Identity(), config.scale_shift_norm
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in, eps), Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * c_out if config.scale_shift_norm else c_out)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out, eps), Conv2d(c_out, c_out, 3, padding=1)
        self.dropout = nn.Dropout(config.dropout)
        self.shortcut = nn.Identity() if c_in == c_out else Conv2d(c_in, c_out, 1)
        fill_with_zeros(self.conv2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self.resize(norm_silu(self.norm1, x)))
        time = self.time(emb)[:, :, None, None]
        if self.scale_shift_norm:
            scale, shift = time.chunk(2, dim=1)
            h = F.silu(self.norm2(h) * (1 + scale) + shift)
        else:
            h = norm_silu(self.norm2, h.add_(time))
        h = self.conv2(self.dropout(h))
        return h.add_(self.shortcut(self.resize(x)))


class Attention(nn.Module):
    """Self-attention over pixels."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.heads = channels // (config.head_channels or channels)
        self.norm = nn.GroupNorm(config.norm_groups, channels, config.norm_eps)
        self.query, self.key = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.value, self.out = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).mT  # (B, H·W, C)
        query, key, value = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, H·W, C/heads)
            for layer in (self.query, self.key, self.value)
        )
        h = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return x + self.out(h).mT.reshape(x.shape)


class Downsample(nn.Module):
    """A convolution of stride 2."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
