"""Ho et al.'s networks in the layout of pesser/pytorch_diffusion and ermongroup/ddim."""

from clipward.weights.keys import Naming

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
