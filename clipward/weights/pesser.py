"""Ho et al.'s networks, by the names of pesser/pytorch_diffusion and ermongroup/ddim.

A state does not say its schedule, which is the published one: linear β from 1e-4 to 0.02, T = 1000, predicted noise.
"""

from pathlib import Path

from clipward.weights.architecture import Architecture, Weights
from clipward.weights.keys import UNSAID, Naming, State, count_keys, infer_config, infer_image_size, remap_state

NAME = "pesser/pytorch_diffusion"
FAMILY = {"norm_eps": 1e-6, "head_channels": None, "downsample_padding": 0, "freq_shift": 1}


def matches(state: State) -> bool:
    """Whether ``state`` has this project's names."""
    return "temb.dense.0.weight" in state


def from_state(state: State, path: Path, head_channels: int | None = None) -> Weights:
    """Our weights from theirs; the size of the pictures is the one at which attention begins at 16×16.

    Raises:
        InputError: where a key is missing, extra or of another shape.
    """
    naming = make_naming(count_keys(state.__contains__, "down.{}.block.0.conv1.weight"))
    unet = infer_config(state, naming, **FAMILY | ({"head_channels": head_channels} if head_channels else {}))
    return Weights(Architecture(unet, infer_image_size(unet)), remap_state(state, unet, naming), UNSAID)


def make_naming(levels: int) -> Naming:
    """From our names to theirs, which count the levels of the way up from the finest too."""
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
