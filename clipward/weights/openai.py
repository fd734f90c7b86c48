"""Dhariwal & Nichol's networks in the layout of openai/guided-diffusion, and RePaint's."""

from collections.abc import Sequence

from clipward.weights.keys import Naming

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
