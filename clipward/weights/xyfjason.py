"""Networks of the CLIP-guidance document's own repository, by the names of its U-Net.

A state does not say its schedule, which is the published one: linear β from 1e-4 to 0.02, T = 1000, predicted noise.
Nor do its shapes say how attention is split into heads: the published networks have one head.

Its training saves ``{model, ema: {decay, shadow, num_updates}}``, later a ``model.pt`` and the same ``ema`` as an
``ema.pt``. ``shadow`` is a state, later a list of tensors in the order of the parameters, whose names ``model.pt`` has.
"""

from collections.abc import Sequence
from pathlib import Path

from clipward.weights.architecture import Architecture, Weights
from clipward.weights.keys import UNSAID, Naming, State, count_keys, infer_config, infer_image_size, remap_state

NAME = "xyfjason"
FAMILY = {"norm_eps": 1e-5, "downsample_padding": 1, "freq_shift": 1}


def matches(state: State) -> bool:
    """Whether ``state`` has this project's names."""
    return "first_conv.weight" in state and "time_embed.1.weight" in state


def from_state(state: State, path: Path, head_channels: int | None = None) -> Weights:
    """Our weights from theirs; the size of the pictures is the one at which attention begins at 16×16.

    Args:
        state: tensors by their names.
        path: of the file.
        head_channels: of an attention head; one head by default.

    Raises:
        InputError: where a key is missing, extra or of another shape.
    """
    levels = count_keys(state.__contains__, "down_blocks.{}.0.blk1.0.weight")
    attended = [i for i in range(levels) if f"down_blocks.{i}.1.q.weight" in state]
    num_res_blocks = sum(name.startswith("down_blocks.0.") and name.endswith(".blk1.0.weight") for name in state)
    naming = make_naming(levels, num_res_blocks, attended)
    unet = infer_config(state, naming, **FAMILY, head_channels=head_channels)
    return Weights(Architecture(unet, infer_image_size(unet)), remap_state(state, unet, naming), UNSAID)


def make_naming(levels: int, num_res_blocks: int, attended: Sequence[int]) -> Naming:
    """From our names to theirs, which number blocks, attentions and the convolution after them in one list a level.

    Args:
        levels: how many.
        num_res_blocks: on each level of the way down.
        attended: the levels with attention, from the finest (0).
    """
    stems = []
    for way, depth, join in (("down", num_res_blocks, ""), ("up", num_res_blocks + 1, ".1")):
        for i in range(levels):
            level = i if way == "down" else levels - 1 - i
            pitch = 2 if level in attended else 1
            for j in range(depth):
                stems.append((f"{way}.{i}.blocks.{j}", f"{way}_blocks.{i}.{j * pitch}"))
                stems.append((f"{way}.{i}.attentions.{j}", f"{way}_blocks.{i}.{j * pitch + 1}"))
            stems.append((f"{way}.{i}.resample.conv", f"{way}_blocks.{i}.{depth * pitch}{join}"))
    return [
        *stems,
        ("time_in", "time_embed.1"),
        ("time_out", "time_embed.3"),
        ("conv_in", "first_conv"),
        ("norm_out", "last_conv.0"),
        ("conv_out", "last_conv.2"),
        ("middle", "bottleneck_block"),
        ("norm1", "blk1.0"),
        ("conv1", "blk1.2"),
        ("time", "proj.1"),
        ("norm2", "blk2.0"),
        ("conv2", "blk2.3"),
        ("query", "q"),
        ("key", "k"),
        ("value", "v"),
        ("out", "proj"),
    ]
