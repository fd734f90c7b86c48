"""Other projects' U-Nets: what their keys are called, and what size of network they say.

A naming says what a key of our :class:`UNet` is called by them, as pairs (ours, theirs) of parts of a key between dots,
where the first pair that matches is taken. It serves both ways: what we read is taken by their names, and what we write
is put under them.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clipward.errors import InputError
from clipward.networks.unet import UNet, UNetConfig

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
