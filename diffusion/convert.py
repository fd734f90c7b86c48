"""Key maps to and from other projects' weights."""

from torch import Tensor

# (ours, diffusers'), as parts of a key between dots; the first that matches is taken.
DIFFUSERS = (
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
)


def to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our U-Net's state under the keys of diffusers' ``UNet2DModel`` (``patch`` must be 1)."""
    return {_to_diffusers(key): value for key, value in state.items()}


def from_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`to_diffusers`."""
    return {_from_diffusers(key): value for key, value in state.items()}


def _to_diffusers(key: str) -> str:
    stage = "downsamplers.0" if key.startswith("down.") else "upsamplers.0"
    return _rename(key, [*DIFFUSERS, ("resample", stage)])


def _from_diffusers(key: str) -> str:
    pairs = [*DIFFUSERS, ("resample", "downsamplers.0"), ("resample", "upsamplers.0")]
    return _rename(key, [(theirs, ours) for ours, theirs in pairs])


def _rename(key: str, pairs: list[tuple[str, str]]) -> str:
    dotted, renamed = f"{key}.", ""
    while dotted:
        for old, new in pairs:
            if dotted.startswith(f"{old}."):
                renamed, dotted = f"{renamed}{new}.", dotted[len(old) + 1 :]
                break
        else:
            part, dotted = dotted.split(".", 1)
            renamed += f"{part}."
    return renamed[:-1]
