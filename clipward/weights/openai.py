"""Dhariwal & Nichol's networks, by the names of openai/guided-diffusion; RePaint's are the same.

A state does not say its schedule, which is the published one: linear β from 1e-4 to 0.02, T = 1000, predicted noise.

Nor do its shapes say how attention is split into heads. The published networks have heads of 64 channels. One that was
trained with another ``num_head_channels`` needs it as ``head_channels``; ``convert --head_channels`` writes a file that
holds it. Ours cannot be a network with ``num_heads``, whose heads have another width on each level, or with
``use_new_attention_order``, which orders query, key and value differently. Their files look the same: they cannot be
recognised, and give wrong pictures.
"""

from collections.abc import Sequence
from pathlib import Path

from clipward.weights.architecture import Architecture, Weights
from clipward.weights.keys import UNSAID, Naming, State, count_keys, infer_config, remap_state

NAME = "openai/guided-diffusion"
FAMILY = {"norm_eps": 1e-5, "downsample_padding": 1, "freq_shift": 0}


def matches(state: State) -> bool:
    """Whether ``state`` has this project's names."""
    return "time_embed.0.weight" in state


def from_state(state: State, path: Path, head_channels: int | None = None) -> Weights:
    """Our weights from theirs; the size of the pictures is the one whose coarsest level is 8×8, as published.

    Args:
        state: tensors by their names.
        path: of the file.
        head_channels: of an attention head, 64 by default; no shape shows it.

    Raises:
        InputError: where a key is missing, extra or of another shape.
    """
    blocks = count_keys(state.__contains__, "output_blocks.{}.0.in_layers.0.weight")
    joins = ("1.conv", "2.conv", "1.in_layers.0", "2.in_layers.0")
    last = [n for n in range(blocks) if any(f"output_blocks.{n}.{join}.weight" in state for join in joins)]
    num_res_blocks = min(last, default=max(blocks - 1, 0))  # the last block of a level leads to the next
    levels = blocks // (num_res_blocks + 1)
    attended = [i for i in range(levels) if f"input_blocks.{1 + i * (num_res_blocks + 1)}.1.qkv.weight" in state]
    naming = make_naming(levels, num_res_blocks, attended)
    unet = infer_config(state, naming, **FAMILY, head_channels=head_channels or 64)
    ours = remap_state(state, unet, naming, sines_first=False)
    return Weights(Architecture(unet, 8 * 2 ** (levels - 1)), ours, UNSAID)


def make_naming(levels: int, num_res_blocks: int, attended: Sequence[int]) -> Naming:
    """From our names to theirs, which number the blocks of all levels in one list.

    Args:
        levels: how many.
        num_res_blocks: on each level of the way down.
        attended: the levels with attention, from the finest (0).
    """
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
        ("class_embedding", "label_emb"),
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
