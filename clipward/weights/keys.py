"""How other projects name the parameters of a U-Net, and what the names and shapes say about its size.

A naming is a list of pairs (ours, theirs) of parts of a key, whole between its dots. A key of our :class:`UNet` is
renamed from left to right, each time by the first pair that matches. The same naming reads another project's state and
writes ours under their names.
"""

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clipward.errors import InputError, shorten
from clipward.networks.unet import UNet, UNetConfig

State = Mapping[str, Tensor]
Naming = list[tuple[str, str]]
UNSAID = frozenset({"image_size", "schedule", "parametrisation"})  # by names and shapes


def rename_key(name: str, naming: Naming) -> str:
    """The name that another project gives to our ``name``."""
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


def remap_state(state: State, config: UNetConfig, naming: Naming, sines_first: bool = True) -> dict[str, Tensor]:
    """The state of ``UNet(config)``, in float32, from another project's state.

    Args:
        state: tensors by their names. A 1×1 convolution may stand for a linear layer, and one ``qkv`` for the
            query, the key and the value.
        config: of our network.
        naming: from our names to theirs.
        sines_first: whether their embedding of t has the sines before the cosines, as ours has.

    Raises:
        InputError: on the first key, by their name, that is missing, extra or of another shape.
    """
    with torch.device("meta"):
        wanted = UNet(config).state_dict()
    ours = {}
    for name, parameter in wanted.items():
        theirs, shape = rename_key(name, naming), tuple(parameter.shape)
        joint = ".qkv." in theirs
        if joint:
            shape = (3 * shape[0], *shape[1:])
        if theirs not in state:
            raise InputError(f"weights: got no key {theirs!r}, expected one of shape {shape}")
        value = state[theirs]
        pointwise = value.shape[2:] if parameter.ndim == 2 and value.shape[2:].numel() == 1 else ()
        if value.shape != (*shape, *pointwise):
            given, expected = shorten(tuple(value.shape)), (*shape, *pointwise)
            raise InputError(f"weights: got the key {theirs!r} of shape {given}, expected {expected}")
        value = value.reshape(shape)
        if joint:
            value = _part_of_qkv(value, name.split(".")[-2], config.head_channels)
        if name == "time_in.weight" and not sines_first:
            value = value.roll(value.shape[1] // 2, dims=1)
        ours[name] = value.float().contiguous()
    extra = sorted(set(state) - {rename_key(name, naming) for name in wanted})
    if extra:
        raise InputError(f"weights: got the key {shorten(extra[0])}, expected no such key for this network")
    return ours


def _part_of_qkv(qkv: Tensor, part: str, head_channels: int | None) -> Tensor:
    """Query, key or value of all heads, out of (heads · 3 · head_channels, …)."""
    heads = qkv.unflatten(0, (-1, 3, head_channels or len(qkv) // 3))
    return heads[:, ("query", "key", "value").index(part)].flatten(0, 1)


def count_keys(has: Callable[[str], bool], pattern: str) -> int:
    """How many of ``pattern`` with 0, 1, 2, … in place of ``{}`` there are without a gap, as ``has`` says."""
    return next(n for n in itertools.count() if not has(pattern.format(n)))


def infer_config(state: State, naming: Naming, **family: Any) -> UNetConfig:
    """The config of a network whose size is read from the shapes in its state.

    Args:
        state: tensors by their names.
        naming: from our names to theirs.
        family: the fields of the config that no shape shows.

    Raises:
        InputError: where a key that shows the size is missing, or has no such shape.
    """

    def shape(name: str) -> torch.Size:
        theirs = rename_key(name, naming)
        if theirs not in state:
            raise InputError(f"weights: got no key {theirs!r}, expected a network of residual blocks")
        if state[theirs].ndim < 2:
            found = tuple(state[theirs].shape)
            raise InputError(f"weights: got the key {theirs!r} of shape {found}, expected the weight of a layer")
        return state[theirs].shape

    def has(name: str) -> bool:
        return rename_key(name, naming) in state

    count = partial(count_keys, has)

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
        num_classes=shape("class_embedding.weight")[0] if has("class_embedding.weight") else None,
        null_class=not has("class_embedding.weight"),
        **family,
    )


def infer_image_size(config: UNetConfig) -> int:
    """Height and width of a network's pictures, where attention begins at 16×16 as in Ho et al.'s networks."""
    return 16 * 2 ** min(config.attention_levels, default=len(config.channels) - 1)
