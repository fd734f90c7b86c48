"""Other projects' U-Nets: what their keys are called, and what size of network they say.

A naming says what a key of our :class:`UNet` is called by them, as pairs (ours, theirs) of parts of a key between dots,
where the first pair that matches is taken. It serves both ways: what we read is taken by their names, and what we write
is put under them.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion.unet import UNet, UNetConfig
from errors import InputError

State = Mapping[str, Tensor]
Naming = list[tuple[str, str]]


def named(name: str, naming: Naming) -> str:
    """Their name of our ``name``."""
    dotted, theirs = f"{name}.", ""
    while dotted:
        for old, new in naming:
            if dotted.startswith(f"{old}."):
                theirs, dotted = f"{theirs}{new}.", dotted[len(old) + 1 :]
                break
        else:
            part, dotted = dotted.split(".", 1)
            theirs += f"{part}."
    return theirs[:-1]


def renamed(state: State, config: UNetConfig, naming: Naming, sines_first: bool = True) -> dict[str, Tensor]:
    """The state of ``UNet(config)`` out of another project's.

    Args:
        state: by their names; 1×1 convolutions stand for linear layers, and a joint ``qkv`` for three of them.
        config: of our network.
        naming: from our names to theirs.
        sines_first: whether t is embedded by sines, then cosines, as ours is.

    Raises:
        InputError: on the first key, by their name, that is missing, extra or of another shape.
    """
    with torch.device("meta"):
        wanted = UNet(config).state_dict()
    ours = {}
    for name, parameter in wanted.items():
        theirs = named(name, naming)
        if theirs not in state:
            raise InputError(
                f"weights: the key {theirs} is missing; one of the shape {tuple(parameter.shape)} would do"
            )
        value = state[theirs]
        if ".qkv." in theirs:
            value = _third(value, ("query", "key", "value").index(name.split(".")[-2]), config.head_channels)
        if name == "time_in.weight" and not sines_first:
            value = value.roll(value.shape[1] // 2, dims=1)
        if parameter.ndim == 2 and value.ndim > 2 and value.shape[2:].numel() == 1:
            value = value.flatten(1)
        if value.shape != parameter.shape:
            shapes = f"{tuple(value.shape)}; {tuple(parameter.shape)}"
            raise InputError(f"weights: the key {theirs} has the shape {shapes} would do")
        ours[name] = value.float().contiguous()
    extra = sorted(set(state) - {named(name, naming) for name in wanted})
    if extra:
        shape = tuple(state[extra[0]].shape)
        raise InputError(f"weights: the key {extra[0]} {shape} is none of this network's; leaving it out would do")
    return ours


def _third(qkv: Tensor, index: int, head_channels: int | None) -> Tensor:
    """Query, key or value of all heads, out of (heads · 3 · head_channels, …)."""
    head_channels = head_channels or len(qkv) // 3
    return qkv.unflatten(0, (-1, 3, head_channels))[:, index].flatten(0, 1)


def measured(state: State, naming: Naming, **family: Any) -> UNetConfig:
    """The size of a network by its state's shapes; what they don't show is the ``family``'s.

    Raises:
        InputError: where a key that shows the size is missing.
    """

    def shape(name: str) -> torch.Size:
        theirs = named(name, naming)
        if theirs not in state:
            raise InputError(f"weights: the key {theirs} is missing")
        return state[theirs].shape

    def has(name: str) -> bool:
        return named(name, naming) in state

    def count(pattern: str) -> int:
        return next(n for n in itertools.count() if not has(pattern.format(n)))

    levels = range(count("down.{}.blocks.0.conv2.weight"))
    channels = tuple(shape(f"down.{level}.blocks.0.conv2.weight")[0] for level in levels)
    image_channels, out_channels = shape("conv_in.weight")[1], shape("conv_out.weight")[0]
    return UNetConfig(
        image_channels=image_channels,
        out_channels=None if out_channels == image_channels else out_channels,
        channels=channels,
        num_res_blocks=count("down.0.blocks.{}.conv2.weight"),
        attention_levels=tuple(i for i in levels if has(f"down.{i}.attentions.0.norm.weight")),
        scale_shift_norm=shape("down.0.blocks.0.time.weight")[0] == 2 * channels[0],
        resblock_updown=has("down.0.resample.norm1.weight"),
        **family,
    )


# diffusers' UNet2DModel


def diffusers_naming(levels: int) -> Naming:
    return [
        *((f"down.{i}.resample", f"down_blocks.{i}.downsamplers.0") for i in range(levels)),
        *((f"up.{i}.resample", f"up_blocks.{i}.upsamplers.0") for i in range(levels)),
        ("time_in", "time_embedding.linear_1"),
        ("time_out", "time_embedding.linear_2"),
        ("middle.0", "mid_block.resnets.0"),
        ("middle.1", "mid_block.attentions.0"),
        ("middle.2", "mid_block.resnets.1"),
        ("norm_out", "conv_norm_out"),
        ("down", "down_blocks"),
        ("up", "up_blocks"),
        ("blocks", "resnets"),
        ("time", "time_emb_proj"),
        ("shortcut", "conv_shortcut"),
        ("norm", "group_norm"),
        ("query", "to_q"),
        ("key", "to_k"),
        ("value", "to_v"),
        ("out", "to_out.0"),
    ]


def up_to_date(state: State) -> dict[str, Tensor]:
    """A state of ``UNet2DModel`` with the names that attention layers have had since diffusers 0.13."""
    since = [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")]
    return {named(name, since): value for name, value in state.items()}


# Ho et al.'s networks in pesser/pytorch_diffusion and ermongroup/ddim

HO = {"norm_eps": 1e-6, "head_channels": None, "downsample_padding": 0, "freq_shift": 1}


def pesser_naming(levels: int) -> Naming:
    """Theirs counts the levels from the finest on the way up too."""
    ups = [(f"up.{i}", f"up.{levels - 1 - i}") for i in range(levels)]
    return [
        *((f"down.{i}.resample", f"down.{i}.downsample") for i in range(levels)),
        *((f"{ours}.resample", f"{theirs}.upsample") for ours, theirs in ups),
        *ups,
        ("time_in", "temb.dense.0"),
        ("time_out", "temb.dense.1"),
        ("middle.0", "mid.block_1"),
        ("middle.1", "mid.attn_1"),
        ("middle.2", "mid.block_2"),
        ("blocks", "block"),
        ("attentions", "attn"),
        ("time", "temb_proj"),
        ("shortcut", "nin_shortcut"),
        ("query", "q"),
        ("key", "k"),
        ("value", "v"),
        ("out", "proj_out"),
    ]


# Dhariwal & Nichol's networks in openai/guided-diffusion, and RePaint's

OPENAI = {"norm_eps": 1e-5, "head_channels": 64, "downsample_padding": 1, "freq_shift": 0}


def openai_naming(levels: int, num_res_blocks: int, attended: Sequence[int]) -> Naming:
    """Theirs numbers the blocks of all levels in one list; ``attended`` are the levels with attention."""
    stems, pitch = [], num_res_blocks + 1
    for i in range(levels):
        for j in range(num_res_blocks):
            block = f"input_blocks.{1 + i * pitch + j}"
            stems += [(f"down.{i}.blocks.{j}", f"{block}.0"), (f"down.{i}.attentions.{j}", f"{block}.1")]
        resample = f"input_blocks.{1 + i * pitch + num_res_blocks}.0"
        stems += [(f"down.{i}.resample.conv", f"{resample}.op"), (f"down.{i}.resample", resample)]
        for j in range(pitch):
            block = f"output_blocks.{i * pitch + j}"
            stems += [(f"up.{i}.blocks.{j}", f"{block}.0"), (f"up.{i}.attentions.{j}", f"{block}.1")]
        place = 2 if levels - 1 - i in attended else 1
        stems.append((f"up.{i}.resample", f"output_blocks.{i * pitch + num_res_blocks}.{place}"))
    return [
        *stems,
        ("conv_in", "input_blocks.0.0"),
        ("middle", "middle_block"),
        ("norm_out", "out.0"),
        ("conv_out", "out.2"),
        ("time_in", "time_embed.0"),
        ("time_out", "time_embed.2"),
        ("norm1", "in_layers.0"),
        ("conv1", "in_layers.2"),
        ("time", "emb_layers.1"),
        ("norm2", "out_layers.0"),
        ("conv2", "out_layers.3"),
        ("shortcut", "skip_connection"),
        ("query", "qkv"),
        ("key", "qkv"),
        ("value", "qkv"),
        ("out", "proj_out"),
    ]


# any of those that need no config


def from_state(state: State, head_channels: int | None = None) -> tuple[UNetConfig, dict[str, Tensor], int]:
    """Our network's config and state, and the size of its pictures, out of a state by pesser's or OpenAI's code.

    Both sizes of pictures are what the published networks have: attention begins at 16×16 in Ho et al.'s, and the
    coarsest level is 8×8 in Dhariwal & Nichol's.

    Args:
        state: by their names.
        head_channels: of an attention head, which no shape shows; by default 64 in OpenAI's, as they publish.

    Raises:
        InputError: where the state is neither's, or a key does not fit.
    """
    given = {} if head_channels is None else {"head_channels": head_channels}
    if "temb.dense.0.weight" in state:
        naming = pesser_naming(_count(state, "down.{}.block.0.conv1.weight"))
        config = measured(state, naming, **HO | given)
        image_size = 16 * 2 ** min(config.attention_levels, default=len(config.channels) - 1)
        return config, renamed(state, config, naming), image_size
    if "time_embed.0.weight" in state:
        blocks = _count(state, "output_blocks.{}.0.in_layers.0.weight")
        joins = ("1.conv", "2.conv", "1.in_layers.0", "2.in_layers.0")
        up = [n for n in range(blocks) if any(f"output_blocks.{n}.{join}.weight" in state for join in joins)]
        num_res_blocks = min(up, default=blocks - 1)
        levels = blocks // (num_res_blocks + 1)
        attended = [i for i in range(levels) if f"input_blocks.{1 + i * (num_res_blocks + 1)}.1.qkv.weight" in state]
        naming = openai_naming(levels, num_res_blocks, attended)
        config = measured(state, naming, **OPENAI | given)
        return config, renamed(state, config, naming, sines_first=False), 8 * 2 ** (levels - 1)
    raise InputError(
        f"weights: the keys {', '.join(list(state)[:3])} … are of no network that is known here; a diffusers folder, "
        "or a file in the layout of pesser/pytorch_diffusion or openai/guided-diffusion, would do"
    )


def _count(state: State, pattern: str) -> int:
    return next(n for n in itertools.count() if pattern.format(n) not in state)
