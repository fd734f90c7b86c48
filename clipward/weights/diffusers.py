"""diffusers: a ``UNet2DModel``'s and a ``DDPMScheduler``'s JSON and keys, to and from ours; and the hub."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from clipward.errors import InputError, first_line
from clipward.files import atomic_folder, read_json, to_storable
from clipward.networks.unet import UNetConfig
from clipward.weights.architecture import Architecture, Weights
from clipward.weights.keys import Naming, State, remap_state, rename_key

NAME = "diffusers"
VERSION = "0.35.0"  # whose names these are
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(?<!\.ckpt)(?<!\.pt)(?<!\.pth)(?<!\.bin)(?<!\.safetensors)")
FILES = tuple(f"diffusion_pytorch_model.{kind}" for kind in ("safetensors", "bin"))

# their words for the scheduler's settings, by ours
BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
VAR_TYPES = ("fixed_small", "fixed_large", "learned_range")

# Settings that our network has only these values of; the first is what a config without the setting means.
ONLY = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}
WITH_ATTENTION, WITHOUT = ("AttnDownBlock2D",), ("DownBlock2D", "ResnetDownsampleBlock2D")


# a folder, or the hub


def find_file(folder: Path) -> Path | None:
    """The network's state in the folder of a pipeline, or of the network itself, with its ``config.json`` beside it."""
    files = (folder / place / name for place in ("unet", "") for name in FILES)
    return next((file for file in files if file.is_file() and (file.parent / "config.json").is_file()), None)


def download(name: str) -> Path:
    """The folder with a copy of ``owner/name`` on the hub: its JSON, and its network's state.

    Raises:
        InputError: where the hub does not give it.
    """
    from huggingface_hub import snapshot_download

    configs = ["*config.json", "model_index.json"]
    try:
        for kind in FILES:
            files = [f"{folder}{kind}" for folder in ("", "unet/")]
            folder = Path(snapshot_download(name, allow_patterns=configs + files))
            if any((folder / file).is_file() for file in files):
                break
    except Exception as error:  # of the network, the hub or the disk
        raise InputError(
            f"weights: {name} is no file or folder, and the hub gives no such model ({first_line(error)})"
        ) from error
    return folder


# from diffusers


def matches(state: State) -> bool:
    """Whether ``state`` has this project's names."""
    return "time_embedding.linear_1.weight" in state


def from_state(state: State, path: Path, head_channels: int | None = None) -> Weights:
    """Our weights from theirs, by the ``config.json`` beside ``path`` and the pipeline's ``scheduler_config.json``.

    Raises:
        InputError: where a config is missing, has what ours lacks, or does not fit the state.
    """
    folder = path.parent
    if not (folder / "config.json").is_file():
        raise InputError(f"weights: got no config.json beside {path}, which has diffusers' keys; use its whole folder")
    places = (folder / "scheduler_config.json", folder.parent / "scheduler" / "scheduler_config.json")
    scheduler = next((place for place in places if place.is_file()), None)
    if scheduler is None:
        raise InputError(f"weights: got no scheduler_config.json for {folder}, expected a DDPMScheduler's")
    config = read_json(folder / "config.json")
    architecture = architecture_of(config, read_json(scheduler))
    naming, sines_first = naming_of(len(architecture.unet.channels)), not config.get("flip_sin_to_cos", True)
    return Weights(architecture, remap_state(modernise_keys(state), architecture.unet, naming, sines_first))


def architecture_of(unet: Mapping[str, Any], scheduler: Mapping[str, Any]) -> Architecture:
    """Ours out of ``config.json`` and ``scheduler_config.json``; what they don't name has diffusers' default.

    Raises:
        InputError: where they have what ours lacks, or lack what ours needs.
    """
    for setting, value in (("trained_betas", None), ("rescale_betas_zero_snr", False), ("thresholding", False)):
        if scheduler.get(setting) not in (value, None):
            raise InputError(f"weights: got {setting} in scheduler_config.json, expected {value}")
    if scheduler.get("clip_sample", True) and scheduler.get("clip_sample_range", 1) != 1:
        given = scheduler["clip_sample_range"]
        raise InputError(f"weights: got clip_sample_range {given} in scheduler_config.json, expected 1")

    def ours(setting: str, names: Mapping[str, Any], default: str) -> Any:
        value = scheduler.get(setting) or default
        if value not in names:
            known = ", ".join(names)
            raise InputError(f"weights: got {setting} {value!r} in scheduler_config.json, expected one of {known}")
        return names[value]

    network = unet_from_config(unet)
    own = {name: name for name in VAR_TYPES}
    return Architecture(
        network,
        image_size=unet.get("sample_size") or Architecture.image_size,
        schedule=ours("beta_schedule", {theirs: name for name, theirs in BETA_SCHEDULES.items()}, "linear"),
        num_timesteps=scheduler.get("num_train_timesteps", 1000),
        betas=(scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02)),
        parametrisation=ours("prediction_type", {theirs: name for name, theirs in PREDICTION_TYPES.items()}, "epsilon"),
        var_type=ours(
            "variance_type",
            {**own, "fixed_small_log": "fixed_small"},
            "learned_range" if network.learns_variance else "fixed_small",
        ),
        clip_denoised=scheduler.get("clip_sample", True),
    )


def unet_from_config(config: Mapping[str, Any]) -> UNetConfig:
    """Ours out of the ``config.json`` of a ``UNet2DModel``.

    Raises:
        InputError: where it has what ours lacks, or lacks what ours needs.
    """
    for name, values in ONLY.items():
        if config.get(name, values[0]) not in values:
            raise InputError(f"weights: got {name} {config[name]!r} in config.json, expected {values[0]!r}")
    try:
        kinds = config["down_block_types"]
        channels, in_channels = tuple(config["block_out_channels"]), config["in_channels"]
    except KeyError as error:
        raise InputError(f"weights: got no {error.args[0]} in config.json, expected a UNet2DModel's") from error
    for kind in kinds:
        if kind not in WITH_ATTENTION + WITHOUT:
            known = ", ".join(WITH_ATTENTION + WITHOUT)
            raise InputError(f"weights: got {kind!r} among down_block_types in config.json, expected {known}")
    out_channels = config.get("out_channels", in_channels)
    return UNetConfig(
        image_channels=in_channels,
        out_channels=None if out_channels == in_channels else out_channels,
        channels=channels,
        num_res_blocks=config.get("layers_per_block", 2),
        attention_levels=tuple(level for level, kind in enumerate(kinds) if kind in WITH_ATTENTION),
        dropout=config.get("dropout", 0.0),
        norm_groups=config.get("norm_num_groups", 32),
        norm_eps=config.get("norm_eps", 1e-5),
        head_channels=config.get("attention_head_dim", 8),
        scale_shift_norm=config.get("resnet_time_scale_shift", "default") == "scale_shift",
        resblock_updown=config.get("downsample_type", "conv") == "resnet",
        downsample_padding=config.get("downsample_padding", 1),
        freq_shift=config.get("freq_shift", 0),
    )


def naming_of(levels: int) -> Naming:
    """From our names to theirs."""
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


def modernise_keys(state: State) -> dict[str, Tensor]:
    """A state of ``UNet2DModel`` with the names that attention layers have had since diffusers 0.13."""
    since = [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")]
    return {rename_key(name, since): value for name, value in state.items()}


# to diffusers


def save_diffusers(folder: Path, weights: Weights) -> None:
    """Write a folder that diffusers' ``DDPMPipeline.from_pretrained`` opens; a failure leaves no folder.

    Raises:
        InputError: where diffusers has no such network.
    """
    configs = configs_of(weights.architecture)
    naming = naming_of(len(weights.architecture.unet.channels))
    state = {rename_key(name, naming): value for name, value in weights.state.items()}
    with atomic_folder(folder) as aside:
        for name, config in configs.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / name).write_text(json.dumps(config, indent=2) + "\n")
        save_file(to_storable(state), aside / "unet/diffusion_pytorch_model.safetensors", {"format": "pt"})


def configs_of(architecture: Architecture) -> dict[str, dict[str, Any]]:
    """The JSON of a folder that ``DDPMPipeline.from_pretrained`` opens, by file.

    Raises:
        InputError: where diffusers has no such network.
    """
    pipeline = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    scheduler = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": architecture.num_timesteps,
        "beta_schedule": BETA_SCHEDULES[architecture.schedule],
        "beta_start": architecture.betas[0],
        "beta_end": architecture.betas[1],
        "prediction_type": PREDICTION_TYPES[architecture.parametrisation],
        "variance_type": architecture.var_type,
        "clip_sample": architecture.clip_denoised,
    }
    return {
        "model_index.json": {"_class_name": "DDPMPipeline", "_diffusers_version": VERSION, **pipeline},
        "unet/config.json": unet_to_config(architecture.unet, architecture.image_size),
        "scheduler/scheduler_config.json": scheduler,
    }


def unet_to_config(config: UNetConfig, image_size: int) -> dict[str, Any]:
    """The ``config.json`` of a ``UNet2DModel`` with our network's numbers.

    Raises:
        InputError: where diffusers has no such network.
    """
    if config.patch != 1:
        raise InputError(f"to: got diffusers, which has no network of patch {config.patch}; use safetensors")
    without = "Resnet{}sampleBlock2D" if config.resblock_updown else "{}Block2D"
    with_attention = [level in config.attention_levels for level in range(len(config.channels))]
    resample = "resnet" if config.resblock_updown else "conv"

    def kinds(way: str, attended: list[bool]) -> list[str]:
        return [f"Attn{way}Block2D" if attention else without.format(way) for attention in attended]

    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": VERSION,
        "sample_size": image_size,
        "in_channels": config.image_channels,
        "out_channels": config.out_channels or config.image_channels,
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "freq_shift": config.freq_shift,
        "flip_sin_to_cos": False,
        "down_block_types": kinds("Down", with_attention),
        "up_block_types": kinds("Up", with_attention[::-1]),
        "block_out_channels": list(config.channels),
        "layers_per_block": config.num_res_blocks,
        "mid_block_scale_factor": 1,
        "downsample_padding": config.downsample_padding,
        "downsample_type": resample,
        "upsample_type": resample,
        "dropout": config.dropout,
        "act_fn": "silu",
        "attention_head_dim": config.head_channels,
        "norm_num_groups": config.norm_groups,
        "attn_norm_num_groups": config.norm_groups,
        "norm_eps": config.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
        "add_attention": True,
    }
