"""Other projects' U-Nets, written from the names of their parameters: random states, and what they compute."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


class Maker:
    """Makes a state key by key."""

    def __init__(self, seed: int = 0) -> None:
        self.state: State = {}
        self.generator = torch.Generator().manual_seed(seed)

    def layer(self, name: str, *shape: int) -> None:
        spread = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.3
        self.state[f"{name}.weight"] = torch.randn(shape, generator=self.generator) * spread
        self.state[f"{name}.bias"] = torch.randn(shape[0], generator=self.generator) * 0.3


def layer(state: State, name: str) -> tuple[Tensor, Tensor]:
    return state[f"{name}.weight"], state[f"{name}.bias"]


def norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    return F.group_norm(x, 32, *layer(state, name), eps)


@dataclass(frozen=True)
class Pesser:
    """``Model`` of pesser/pytorch_diffusion, with its constructor's words."""

    ch: int = 32
    ch_mult: tuple[int, ...] = (1, 2, 2)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (16,)
    resolution: int = 32

    def make(self) -> State:
        m, ch, levels = Maker(), self.ch, range(len(self.ch_mult))

        def block(name: str, c_in: int, c_out: int) -> None:
            m.layer(f"{name}.norm1", c_in)
            m.layer(f"{name}.conv1", c_out, c_in, 3, 3)
            m.layer(f"{name}.temb_proj", c_out, 4 * ch)
            m.layer(f"{name}.norm2", c_out)
            m.layer(f"{name}.conv2", c_out, c_out, 3, 3)
            if c_in != c_out:
                m.layer(f"{name}.nin_shortcut", c_out, c_in, 1, 1)

        def attention(name: str, c: int) -> None:
            m.layer(f"{name}.norm", c)
            for part in ("q", "k", "v", "proj_out"):
                m.layer(f"{name}.{part}", c, c, 1, 1)

        m.layer("temb.dense.0", 4 * ch, ch)
        m.layer("temb.dense.1", 4 * ch, 4 * ch)
        m.layer("conv_in", ch, 3, 3, 3)
        skips, c = [ch], ch
        for i in levels:
            for j in range(self.num_res_blocks):
                block(f"down.{i}.block.{j}", c, ch * self.ch_mult[i])
                c = ch * self.ch_mult[i]
                if self.resolution // 2**i in self.attn_resolutions:
                    attention(f"down.{i}.attn.{j}", c)
                skips.append(c)
            if i < len(levels) - 1:
                m.layer(f"down.{i}.downsample.conv", c, c, 3, 3)
                skips.append(c)
        block("mid.block_1", c, c)
        attention("mid.attn_1", c)
        block("mid.block_2", c, c)
        for i in reversed(levels):
            for j in range(self.num_res_blocks + 1):
                block(f"up.{i}.block.{j}", c + skips.pop(), ch * self.ch_mult[i])
                c = ch * self.ch_mult[i]
                if self.resolution // 2**i in self.attn_resolutions:
                    attention(f"up.{i}.attn.{j}", c)
            if i > 0:
                m.layer(f"up.{i}.upsample.conv", c, c, 3, 3)
        m.layer("norm_out", c)
        m.layer("conv_out", 3, c, 3, 3)
        return m.state

    def forward(self, s: State, x: Tensor, t: Tensor) -> Tensor:
        half = self.ch // 2
        angles = t.float()[:, None] * torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))[None]
        temb = F.linear(torch.cat([angles.sin(), angles.cos()], 1), *layer(s, "temb.dense.0"))
        temb = F.linear(F.silu(temb), *layer(s, "temb.dense.1"))

        def block(name: str, x: Tensor) -> Tensor:
            h = F.conv2d(F.silu(norm(s, f"{name}.norm1", x, 1e-6)), *layer(s, f"{name}.conv1"), padding=1)
            h = h + F.linear(F.silu(temb), *layer(s, f"{name}.temb_proj"))[:, :, None, None]
            h = F.conv2d(F.silu(norm(s, f"{name}.norm2", h, 1e-6)), *layer(s, f"{name}.conv2"), padding=1)
            shortcut = f"{name}.nin_shortcut"
            return (F.conv2d(x, *layer(s, shortcut)) if f"{shortcut}.weight" in s else x) + h

        def attention(name: str, x: Tensor) -> Tensor:
            h = norm(s, f"{name}.norm", x, 1e-6)
            q, k, v = (F.conv2d(h, *layer(s, f"{name}.{part}")).flatten(2) for part in "qkv")
            weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * x.shape[1] ** -0.5, dim=2)
            h = torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape)
            return x + F.conv2d(h, *layer(s, f"{name}.proj_out"))

        def blocks(stage: str, j: int, h: Tensor) -> Tensor:
            h = block(f"{stage}.block.{j}", h)
            return attention(f"{stage}.attn.{j}", h) if f"{stage}.attn.{j}.q.weight" in s else h

        h = F.conv2d(x, *layer(s, "conv_in"), padding=1)
        hs, levels = [h], range(len(self.ch_mult))
        for i in levels:
            for j in range(self.num_res_blocks):
                hs.append(blocks(f"down.{i}", j, hs[-1]))
            if i < len(levels) - 1:
                hs.append(F.conv2d(F.pad(hs[-1], (0, 1, 0, 1)), *layer(s, f"down.{i}.downsample.conv"), stride=2))
        h = block("mid.block_2", attention("mid.attn_1", block("mid.block_1", hs[-1])))
        for i in reversed(levels):
            for j in range(self.num_res_blocks + 1):
                h = blocks(f"up.{i}", j, torch.cat([h, hs.pop()], 1))
            if i > 0:
                h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
                h = F.conv2d(h, *layer(s, f"up.{i}.upsample.conv"), padding=1)
        return F.conv2d(F.silu(norm(s, "norm_out", h, 1e-6)), *layer(s, "conv_out"), padding=1)


@dataclass(frozen=True)
class Xyfjason:
    """``UNet`` of the CLIP-guidance document's own repository, with its constructor's words."""

    dim: int = 32
    dim_mults: tuple[int, ...] = (1, 1, 2)
    use_attn: tuple[bool, ...] = (False, True, False)
    num_res_blocks: int = 2
    n_heads: int = 1
    out_channels: int = 3

    def make(self) -> State:
        """The keys stand in the order of the model's parameters."""
        m, dim, last = Maker(), self.dim, len(self.dim_mults) - 1

        def block(name: str, c_in: int, c_out: int) -> None:
            m.layer(f"{name}.blk1.0", c_in)
            m.layer(f"{name}.blk1.2", c_out, c_in, 3, 3)
            m.layer(f"{name}.proj.1", c_out, 4 * dim)
            m.layer(f"{name}.blk2.0", c_out)
            m.layer(f"{name}.blk2.3", c_out, c_out, 3, 3)
            if c_in != c_out:
                m.layer(f"{name}.shortcut", c_out, c_in, 1, 1)

        def attention(name: str, c: int) -> None:
            m.layer(f"{name}.norm", c)
            for part in ("q", "k", "v", "proj"):
                m.layer(f"{name}.{part}", c, c, 1, 1)

        m.layer("time_embed.1", 4 * dim, dim)
        m.layer("time_embed.3", 4 * dim, 4 * dim)
        m.layer("first_conv", dim, 3, 3, 3)
        skips, c = [dim], dim
        for i, mult in enumerate(self.dim_mults):
            place = 0
            for _ in range(self.num_res_blocks):
                block(f"down_blocks.{i}.{place}", c, mult * dim)
                c, place = mult * dim, place + 1
                if self.use_attn[i]:
                    attention(f"down_blocks.{i}.{place}", c)
                    place += 1
                skips.append(c)
            if i < last:
                m.layer(f"down_blocks.{i}.{place}", c, c, 3, 3)
                skips.append(c)
        block("bottleneck_block.0", c, c)
        attention("bottleneck_block.1", c)
        block("bottleneck_block.2", c, c)
        for i in range(last + 1):
            place, width = 0, self.dim_mults[last - i] * dim
            for _ in range(self.num_res_blocks + 1):
                block(f"up_blocks.{i}.{place}", c + skips.pop(), width)
                c, place = width, place + 1
                if self.use_attn[last - i]:
                    attention(f"up_blocks.{i}.{place}", c)
                    place += 1
            if i < last:
                m.layer(f"up_blocks.{i}.{place}.1", c, c, 3, 3)
        m.layer("last_conv.0", c)
        m.layer("last_conv.2", self.out_channels, c, 3, 3)
        return m.state

    def forward(self, s: State, x: Tensor, t: Tensor) -> Tensor:
        half, last = self.dim // 2, len(self.dim_mults) - 1
        angles = t.float()[:, None] * torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))[None]
        emb = F.linear(torch.cat([angles.sin(), angles.cos()], 1), *layer(s, "time_embed.1"))
        emb = F.silu(F.linear(F.silu(emb), *layer(s, "time_embed.3")))

        def block(name: str, x: Tensor) -> Tensor:
            h = F.conv2d(F.silu(norm(s, f"{name}.blk1.0", x, 1e-5)), *layer(s, f"{name}.blk1.2"), padding=1)
            h = h + F.linear(emb, *layer(s, f"{name}.proj.1"))[:, :, None, None]
            h = F.conv2d(F.silu(norm(s, f"{name}.blk2.0", h, 1e-5)), *layer(s, f"{name}.blk2.3"), padding=1)
            shortcut = f"{name}.shortcut"
            return (F.conv2d(x, *layer(s, shortcut)) if f"{shortcut}.weight" in s else x) + h

        def attention(name: str, x: Tensor) -> Tensor:
            h = norm(s, f"{name}.norm", x, 1e-5)
            q, k, v = (F.conv2d(h, *layer(s, f"{name}.{part}")).flatten(2).chunk(self.n_heads, dim=1) for part in "qkv")
            heads = []
            for n in range(self.n_heads):
                scale = (x.shape[1] // self.n_heads) ** -0.5
                weights = torch.softmax(torch.einsum("bci,bcj->bij", q[n], k[n]) * scale, dim=2)
                heads.append(torch.einsum("bij,bcj->bci", weights, v[n]))
            return x + F.conv2d(torch.cat(heads, 1).reshape(x.shape), *layer(s, f"{name}.proj"))

        hs = [F.conv2d(x, *layer(s, "first_conv"), padding=1)]
        for i in range(last + 1):
            place = 0
            for _ in range(self.num_res_blocks):
                h, place = block(f"down_blocks.{i}.{place}", hs[-1]), place + 1
                if self.use_attn[i]:
                    h, place = attention(f"down_blocks.{i}.{place}", h), place + 1
                hs.append(h)
            if i < last:
                hs.append(F.conv2d(hs[-1], *layer(s, f"down_blocks.{i}.{place}"), stride=2, padding=1))
        h = block("bottleneck_block.0", hs[-1])
        h = block("bottleneck_block.2", attention("bottleneck_block.1", h))
        for i in range(last + 1):
            place = 0
            for _ in range(self.num_res_blocks + 1):
                h, place = block(f"up_blocks.{i}.{place}", torch.cat([h, hs.pop()], 1)), place + 1
                if self.use_attn[last - i]:
                    h, place = attention(f"up_blocks.{i}.{place}", h), place + 1
            if i < last:
                h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
                h = F.conv2d(h, *layer(s, f"up_blocks.{i}.{place}.1"), padding=1)
        return F.conv2d(F.silu(norm(s, "last_conv.0", h, 1e-5)), *layer(s, "last_conv.2"), padding=1)


@dataclass(frozen=True)
class OpenAI:
    """``UNetModel`` of openai/guided-diffusion, with its constructor's words."""

    model_channels: int = 64
    channel_mult: tuple[int, ...] = (1, 1, 2)
    num_res_blocks: int = 2
    attention_ds: tuple[int, ...] = (2, 4)
    num_head_channels: int = 64
    learn_sigma: bool = True
    resblock_updown: bool = True
    use_scale_shift_norm: bool = True

    def attended(self, level: int) -> bool:
        return 2**level in self.attention_ds

    def make(self) -> State:
        m, ch = Maker(), self.model_channels

        def block(name: str, c_in: int, c_out: int) -> None:
            m.layer(f"{name}.in_layers.0", c_in)
            m.layer(f"{name}.in_layers.2", c_out, c_in, 3, 3)
            m.layer(f"{name}.emb_layers.1", 2 * c_out if self.use_scale_shift_norm else c_out, 4 * ch)
            m.layer(f"{name}.out_layers.0", c_out)
            m.layer(f"{name}.out_layers.3", c_out, c_out, 3, 3)
            if c_in != c_out:
                m.layer(f"{name}.skip_connection", c_out, c_in, 1, 1)

        def attention(name: str, c: int) -> None:
            m.layer(f"{name}.norm", c)
            m.layer(f"{name}.qkv", 3 * c, c, 1)
            m.layer(f"{name}.proj_out", c, c, 1)

        m.layer("time_embed.0", 4 * ch, ch)
        m.layer("time_embed.2", 4 * ch, 4 * ch)
        m.layer("input_blocks.0.0", ch * self.channel_mult[0], 3, 3, 3)
        c, n, last = ch * self.channel_mult[0], 1, len(self.channel_mult) - 1
        skips = [c]
        for level, mult in enumerate(self.channel_mult):
            for _ in range(self.num_res_blocks):
                block(f"input_blocks.{n}.0", c, mult * ch)
                c = mult * ch
                if self.attended(level):
                    attention(f"input_blocks.{n}.1", c)
                skips.append(c)
                n += 1
            if level < last:
                if self.resblock_updown:
                    block(f"input_blocks.{n}.0", c, c)
                else:
                    m.layer(f"input_blocks.{n}.0.op", c, c, 3, 3)
                skips.append(c)
                n += 1
        block("middle_block.0", c, c)
        attention("middle_block.1", c)
        block("middle_block.2", c, c)
        n = 0
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for j in range(self.num_res_blocks + 1):
                block(f"output_blocks.{n}.0", c + skips.pop(), mult * ch)
                c, place = mult * ch, 1
                if self.attended(level):
                    attention(f"output_blocks.{n}.1", c)
                    place = 2
                if level and j == self.num_res_blocks:
                    if self.resblock_updown:
                        block(f"output_blocks.{n}.{place}", c, c)
                    else:
                        m.layer(f"output_blocks.{n}.{place}.conv", c, c, 3, 3)
                n += 1
        m.layer("out.0", c)
        m.layer("out.2", 6 if self.learn_sigma else 3, c, 3, 3)
        return m.state

    def forward(self, s: State, x: Tensor, t: Tensor) -> Tensor:
        half = self.model_channels // 2
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)[None]
        emb = F.linear(torch.cat([angles.cos(), angles.sin()], 1), *layer(s, "time_embed.0"))
        emb = F.silu(F.linear(F.silu(emb), *layer(s, "time_embed.2")))

        def block(name: str, x: Tensor, resize: str = "") -> Tensor:
            h = F.silu(norm(s, f"{name}.in_layers.0", x, 1e-5))
            if resize == "down":
                h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
            if resize == "up":
                h, x = (v.repeat_interleave(2, 2).repeat_interleave(2, 3) for v in (h, x))
            h = F.conv2d(h, *layer(s, f"{name}.in_layers.2"), padding=1)
            e = F.linear(emb, *layer(s, f"{name}.emb_layers.1"))[:, :, None, None]
            if self.use_scale_shift_norm:
                scale, shift = e[:, : h.shape[1]], e[:, h.shape[1] :]
                h = norm(s, f"{name}.out_layers.0", h, 1e-5) * (1 + scale) + shift
            else:
                h = norm(s, f"{name}.out_layers.0", h + e, 1e-5)
            h = F.conv2d(F.silu(h), *layer(s, f"{name}.out_layers.3"), padding=1)
            skip = f"{name}.skip_connection"
            return (F.conv2d(x, *layer(s, skip)) if f"{skip}.weight" in s else x) + h

        def attention(name: str, x: Tensor) -> Tensor:
            h = norm(s, f"{name}.norm", x, 1e-5).flatten(2)
            qkv = F.conv1d(h, *layer(s, f"{name}.qkv"))
            d, heads = self.num_head_channels, []
            for chunk in qkv.split(3 * d, dim=1):  # the heads lie one after the other
                q, k, v = chunk.split(d, dim=1)
                weights = torch.softmax(torch.einsum("bci,bcj->bij", q * d**-0.25, k * d**-0.25), dim=-1)
                heads.append(torch.einsum("bij,bcj->bci", weights, v))
            return x + F.conv1d(torch.cat(heads, 1), *layer(s, f"{name}.proj_out")).reshape(x.shape)

        h, n, last = F.conv2d(x, *layer(s, "input_blocks.0.0"), padding=1), 1, len(self.channel_mult) - 1
        hs = [h]
        for level in range(last + 1):
            for _ in range(self.num_res_blocks):
                h = block(f"input_blocks.{n}.0", h)
                h = attention(f"input_blocks.{n}.1", h) if self.attended(level) else h
                hs.append(h)
                n += 1
            if level < last:
                if self.resblock_updown:
                    h = block(f"input_blocks.{n}.0", h, "down")
                else:
                    h = F.conv2d(h, *layer(s, f"input_blocks.{n}.0.op"), stride=2, padding=1)
                hs.append(h)
                n += 1
        h = block("middle_block.2", attention("middle_block.1", block("middle_block.0", h)))
        n = 0
        for level in reversed(range(last + 1)):
            for j in range(self.num_res_blocks + 1):
                h = block(f"output_blocks.{n}.0", torch.cat([h, hs.pop()], 1))
                h = attention(f"output_blocks.{n}.1", h) if self.attended(level) else h
                if level and j == self.num_res_blocks:
                    join = f"output_blocks.{n}.{2 if self.attended(level) else 1}"
                    if self.resblock_updown:
                        h = block(join, h, "up")
                    else:
                        h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
                        h = F.conv2d(h, *layer(s, f"{join}.conv"), padding=1)
                n += 1
        return F.conv2d(F.silu(norm(s, "out.0", h, 1e-5)), *layer(s, "out.2"), padding=1)
