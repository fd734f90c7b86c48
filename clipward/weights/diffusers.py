"""diffusers: a ``UNet2DModel`` and its scheduler, to and from ours, by their JSON and their keys; and the hub.

What a scheduler says of the model is obeyed: T, the βs, what the network puts out, its variance, and whether x̂0 is
clamped. A setting of the model that has no counterpart here is refused by its name.

How a ``DDPMScheduler`` or a ``DDIMScheduler`` takes its steps is the default (:class:`Scheduler`):
``timestep_spacing``, ``steps_offset``, and for DDIM ``set_alpha_to_one``, its equal strides, and the noise that it
leaves as the network predicted it where ``clip_sample`` clamps x̂0. Two things differ: the last step of DDPM never adds
noise, and a single step of ``linspace`` begins at T−1. The steps of any other class can't be taken here; the sampler
refuses it until a person chooses others.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from safetensors.torch import save_file
from torch import Tensor

from clipward.diffusion.schedule import Scheduler
from clipward.errors import InputError, first_line, list_names, shorten
from clipward.files import atomic_folder, read_json, to_storable
from clipward.networks.unet import UNetConfig
from clipward.weights.architecture import Architecture, Weights
from clipward.weights.fields import parse
from clipward.weights.keys import Naming, State, remap_state, rename_key

NAME = "diffusers"
VERSION = "0.35.0"  # whose names these are
HUB_NAME = re.compile(  # as the hub has it, but for what looks like a file
    r"(?!.{97}|.*(?:--|\.\.))\w[\w.-]*(?<![.-])/\w[\w.-]*(?<![.-])"
    r"(?<!\.git)(?<!\.ckpt)(?<!\.pt)(?<!\.pth)(?<!\.bin)(?<!\.safetensors)",
    re.ASCII,
)
FILES = tuple(f"diffusion_pytorch_model.{kind}" for kind in ("safetensors", "bin"))
OWN = "clipward"  # our key in the config of the network
NETWORK_FILE, SCHEDULER_FILE, PIPELINE_FILE = "config.json", "scheduler_config.json", "model_index.json"

# settings by our names: what diffusers calls them, and its defaults
NETWORK_SETTINGS: dict[str, tuple[str, Any]] = {
    "image_channels": ("in_channels", 3),
    "out_channels": ("out_channels", 3),
    "channels": ("block_out_channels", [224, 448, 672, 896]),
    "num_res_blocks": ("layers_per_block", 2),
    "dropout": ("dropout", 0.0),
    "norm_groups": ("norm_num_groups", 32),
    "norm_eps": ("norm_eps", 1e-5),
    "head_channels": ("attention_head_dim", 8),
    "downsample_padding": ("downsample_padding", 1),
    "freq_shift": ("freq_shift", 0),
    "num_classes": ("num_class_embeds", None),
}
SCHEDULER_SETTINGS: dict[str, tuple[str, Any]] = {
    "num_timesteps": ("num_train_timesteps", 1000),
    "clip_denoised": ("clip_sample", True),
}
# their words by ours
BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
# ours by theirs
VARIANCE_TYPES = {name: name for name in ("fixed_small", "fixed_large", "learned_range")}
VARIANCE_TYPES["fixed_small_log"] = "fixed_small"
SPACINGS = {"leading": "leading", "uniform2": "linspace", "trailing": "trailing"}

# settings that have only these values here; the first is what a config without the setting means
ONLY_NETWORK: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DModel",),
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "class_embed_type": (None,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "downsample_type": ("conv", "resnet", None),
    "upsample_type": ("conv", "resnet", None),
}
CLAMPING = ("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler")
OTHERS = (  # which walk the same ᾱ_t and leave x̂0 as it is
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
)
ONLY_SCHEDULER: dict[str, tuple[Any, ...]] = {
    "_class_name": CLAMPING + OTHERS,
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (False, None),
    "thresholding": (False, None),
    "use_flow_sigmas": (False, None),
    "timestep_type": ("discrete", None),
}


# a folder, or the hub


def find_file(folder: Path) -> Path | None:
    """The network's state in the folder of a pipeline, or of the network itself, with its ``config.json`` beside it."""
    files = (folder / place / name for place in ("unet", "") for name in FILES)
    return next((file for file in files if file.is_file() and (file.parent / NETWORK_FILE).is_file()), None)


def download(name: str) -> Path:
    """The folder with a copy of ``owner/name`` on the hub: its JSON, and its network's state.

    Raises:
        InputError: where the hub does not give it.
    """
    from huggingface_hub import snapshot_download

    configs = [f"*{NETWORK_FILE}", PIPELINE_FILE]
    try:
        for kind in FILES:
            files = [f"{folder}{kind}" for folder in ("", "unet/")]
            folder = Path(snapshot_download(name, allow_patterns=configs + files))
            if any((folder / file).is_file() for file in files):
                break
    except Exception as error:  # of the network, the hub or the disk
        raise InputError(
            f"weights: got {shorten(name)}, which is no file or folder, and the hub gives no such model "
            f"({first_line(error)})"
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
    if not (folder / NETWORK_FILE).is_file():
        raise InputError(f"weights: got no {NETWORK_FILE} beside {shorten(path)}, expected a UNet2DModel's")
    places = (folder / SCHEDULER_FILE, folder.parent / "scheduler" / SCHEDULER_FILE)
    scheduler = next((place for place in places if place.is_file()), None)
    if scheduler is None:
        raise InputError(f"weights: got no {SCHEDULER_FILE} for {shorten(folder)}, expected a DDPMScheduler's")
    for place in (folder / PIPELINE_FILE, folder.parent / PIPELINE_FILE):
        if place.is_file():
            _refuse_other_parts(_read_dictionary(place))
    config = _read_dictionary(folder / NETWORK_FILE)
    architecture = read_architecture(config, _read_dictionary(scheduler))
    flip = parse(bool, config.get("flip_sin_to_cos", True), f"flip_sin_to_cos in {NETWORK_FILE}")
    naming, sines_first = make_naming(len(architecture.unet.channels)), not flip
    ours = remap_state(modernise_keys(state), architecture.unet, naming, sines_first)
    return Weights(architecture, ours, frozenset({"image_size"} if config.get("sample_size") is None else ()))


def read_architecture(network: Mapping[str, Any], scheduler: Mapping[str, Any]) -> Architecture:
    """Ours from ``config.json`` and ``scheduler_config.json``; what they leave out has diffusers' default.

    Raises:
        InputError: where a setting has no counterpart here, by its name.
    """
    _refuse_others(scheduler, ONLY_SCHEDULER, SCHEDULER_FILE)
    unet = read_unet(network)
    values = _read_settings(scheduler, SCHEDULER_SETTINGS, Architecture, SCHEDULER_FILE)
    name = scheduler.get("_class_name", CLAMPING[0])
    values["clip_denoised"] &= name in CLAMPING
    if values["clip_denoised"] and scheduler.get("clip_sample_range", 1) != 1:
        raise _refusal("clip_sample_range", scheduler["clip_sample_range"], SCHEDULER_FILE, "1")
    names = _read_own(network).get("class_names")
    return Architecture(
        unet,
        class_names=parse(tuple[str, ...] | None, names, f"class_names in {NETWORK_FILE}"),
        image_size=_read_size(network),
        schedule=_translate_word(scheduler, "beta_schedule", _invert(BETA_SCHEDULES), "linear"),
        betas=(_read_beta(scheduler, "beta_start", 1e-4), _read_beta(scheduler, "beta_end", 0.02)),
        parametrisation=_translate_word(scheduler, "prediction_type", _invert(PREDICTION_TYPES), "epsilon"),
        var_type=_translate_word(scheduler, "variance_type", VARIANCE_TYPES, None),
        scheduler=read_scheduler(name, scheduler),
        **values,
    )


def read_scheduler(name: str, config: Mapping[str, Any]) -> Scheduler:
    """How the class ``name`` takes its steps, by its ``scheduler_config.json``.

    Raises:
        InputError: where a setting has no counterpart here, by its name.
    """
    if name not in CLAMPING:
        return Scheduler(name)
    skip_type = _translate_word(config, "timestep_spacing", _invert(SPACINGS), "leading")
    offset = parse(int, config.get("steps_offset", 0), f"steps_offset in {SCHEDULER_FILE}")
    offset = offset if skip_type == "leading" else 0
    if not name.startswith("DDIM"):
        return Scheduler("ddpm", skip_type, offset)
    to_data = parse(bool, config.get("set_alpha_to_one", True), f"set_alpha_to_one in {SCHEDULER_FILE}")
    return Scheduler("ddim", skip_type, offset, equal_strides=True, to_data=to_data, noise_of_clamped=False)


def read_unet(config: Mapping[str, Any]) -> UNetConfig:
    """Ours from the ``config.json`` of a ``UNet2DModel``.

    Raises:
        InputError: where a setting has no counterpart here, by its name.
    """
    _refuse_others(config, ONLY_NETWORK, NETWORK_FILE)
    values = _read_settings(config, NETWORK_SETTINGS, UNetConfig, NETWORK_FILE)
    levels, groups = len(values["channels"]), values["norm_groups"]
    attended, joins = _read_levels(config, "Down", levels)
    attended_up, joins_up = _read_levels(config, "Up", levels)
    if attended_up != attended[::-1]:
        raise _refusal("up_block_types", config["up_block_types"], NETWORK_FILE, "attention as in down_block_types")
    if len(joins | joins_up) > 1:
        given = config["down_block_types"]
        raise _refusal("down_block_types", given, NETWORK_FILE, "one way, conv or resnet, to join all levels")
    scale_shift = config.get("resnet_time_scale_shift", "default") == "scale_shift"
    middle = config.get("attn_norm_num_groups")
    if middle != groups and (middle is not None or scale_shift):  # without a number, scale_shift takes the norm away
        raise _refusal("attn_norm_num_groups", middle, NETWORK_FILE, f"norm_num_groups, {groups}")
    if values["num_classes"] is not None:
        values["null_class"] = parse(bool, _read_own(config).get("null_class", False), f"null_class in {NETWORK_FILE}")
        values["num_classes"] -= values["null_class"]
    if values["out_channels"] == values["image_channels"]:
        values["out_channels"] = None
    return UNetConfig(
        attention_levels=tuple(level for level, attention in enumerate(attended) if attention),
        scale_shift_norm=scale_shift,
        resblock_updown="resnet" in joins | joins_up,
        **values,
    )


def _read_dictionary(path: Path) -> dict[str, Any]:
    values = read_json(path)
    return parse(dict, values, shorten(path))


def _refuse_other_parts(pipeline: Mapping[str, Any]) -> None:
    """A pipeline with an autoencoder, a text encoder and so on has no network of pixels, or not of pixels alone."""
    for name, part in pipeline.items():
        if isinstance(part, list) and any(part) and name not in ("unet", "scheduler"):
            raise InputError(f"weights: got the part {shorten(name)} in {PIPELINE_FILE}, expected unet and scheduler")


def _refusal(setting: str, value: Any, file: str, expected: str) -> InputError:
    given = f"of {len(value)} values" if isinstance(value, list) and len(value) > 6 else _write_value(value)
    return InputError(f"weights: got {setting} {given} in {file}, expected {expected}")


def _write_value(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else shorten(value)


def _refuse_others(config: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]], file: str) -> None:
    for setting, values in only.items():
        value = config.get(setting, values[0])
        if value not in values:
            expected = [each if isinstance(each, str) else _write_value(each) for each in values]
            raise _refusal(setting, value, file, list_names(expected))


def _read_settings(
    config: Mapping[str, Any], settings: Mapping[str, tuple[str, Any]], kind: type, file: str
) -> dict[str, Any]:
    """The fields of ``kind`` that ``settings`` maps, of their types."""
    hints = get_type_hints(kind)
    return {
        ours: parse(hints[ours], config.get(theirs, default), f"{theirs} in {file}")
        for ours, (theirs, default) in settings.items()
    }


def _invert(names: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in names.items()}


def _translate_word(scheduler: Mapping[str, Any], setting: str, names: Mapping[str, str], default: str | None) -> Any:
    """Our word for a setting's value, out of ``names`` by theirs; none where it has no value and no default."""
    given = scheduler.get(setting)
    value = default if given is None else given
    ours = next((ours for theirs, ours in names.items() if theirs == value), None)
    if ours is None and value is not None:
        raise _refusal(setting, value, SCHEDULER_FILE, list_names(names))
    return ours


def _read_levels(config: Mapping[str, Any], way: str, levels: int) -> tuple[list[bool], set[str]]:
    """Which levels have attention, in the config's order, and the kinds of layers that join levels."""
    setting = f"{way.lower()}_block_types"
    kinds = {
        f"Attn{way}Block2D": config.get(f"{way.lower()}sample_type") or "conv",
        f"{way}Block2D": "conv",
        f"Resnet{way}sampleBlock2D": "resnet",
    }
    given = config.get(setting)
    if not isinstance(given, list) or len(given) != levels:
        raise _refusal(setting, given, NETWORK_FILE, f"a list of {levels}, as block_out_channels")
    blocks = [block.removeprefix("UNetRes") if isinstance(block, str) else "" for block in given]
    for block, name in zip(blocks, given, strict=True):
        if block not in kinds:
            raise _refusal(setting, name, NETWORK_FILE, list_names(kinds))
    return [block.startswith("Attn") for block in blocks], {kinds[block] for block in blocks[:-1]}


def _read_beta(scheduler: Mapping[str, Any], setting: str, default: float) -> float:
    return parse(float, scheduler.get(setting, default), f"{setting} in {SCHEDULER_FILE}")


def _read_own(config: Mapping[str, Any]) -> dict[str, Any]:
    """What we wrote beside diffusers' settings, which say neither names of classes nor whether one is the null."""
    return parse(dict, config.get(OWN, {}), f"{OWN} in {NETWORK_FILE}")


def _read_size(network: Mapping[str, Any]) -> int | tuple[int, int]:
    size = network.get("sample_size")
    kind = int | tuple[int, int]
    return parse(kind, Architecture.image_size if size is None else size, f"sample_size in {NETWORK_FILE}")


def make_naming(levels: int) -> Naming:
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


def save_diffusers(folder: Path, weights: Weights, others: Mapping[str, bytes] | None = None) -> None:
    """Write a folder that diffusers' ``DDPMPipeline.from_pretrained`` opens; a failure leaves no folder.

    Args:
        folder: a new one.
        weights: of a network that diffusers has too.
        others: files to write beside them, by name.

    Raises:
        InputError: where diffusers has no such network.
    """
    configs = make_configs(weights.architecture)
    naming = make_naming(len(weights.architecture.unet.channels))
    state = {rename_key(name, naming): value for name, value in weights.state.items()}
    with atomic_folder(folder) as aside:
        for name, config in configs.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / name).write_text(json.dumps(config, indent=2) + "\n")
        for name, content in (others or {}).items():
            (aside / name).write_bytes(content)
        save_file(to_storable(state), aside / "unet/diffusion_pytorch_model.safetensors", {"format": "pt"})


def make_configs(architecture: Architecture) -> dict[str, dict[str, Any]]:
    """The JSON of a folder that ``DDPMPipeline.from_pretrained`` opens, by file.

    Raises:
        InputError: where diffusers has no such network.
    """
    own: dict[str, Any] = {}
    if architecture.unet.num_classes is not None:
        names = architecture.class_names
        own[OWN] = {
            "null_class": architecture.unet.null_class,
            "class_names": None if names is None else list(names),
        }
    scheduler = {
        "_diffusers_version": VERSION,
        "num_train_timesteps": architecture.num_timesteps,
        "beta_schedule": BETA_SCHEDULES[architecture.schedule],
        "beta_start": architecture.betas[0],
        "beta_end": architecture.betas[1],
        "prediction_type": PREDICTION_TYPES[architecture.parametrisation],
        "variance_type": architecture.variance,
        "clip_sample": architecture.clip_denoised,
        **make_spacing(architecture.scheduler),
    }
    name = scheduler["_class_name"]
    pipeline = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", name]}
    return {
        "model_index.json": {
            "_class_name": name.replace("Scheduler", "Pipeline"),
            "_diffusers_version": VERSION,
            **pipeline,
        },
        "unet/config.json": make_network_config(architecture.unet, architecture.image_size) | own,
        "scheduler/scheduler_config.json": scheduler,
    }


def make_spacing(scheduler: Scheduler) -> dict[str, Any]:
    """What ``scheduler_config.json`` says of how steps are taken.

    A ``uniform`` spacing is written as ``leading``, which is the same where the number of steps divides T.

    Raises:
        InputError: where diffusers has no such steps.
    """
    known = SPACINGS | {"uniform": "leading"}
    if scheduler.sampler not in ("ddpm", "ddim") or scheduler.skip_type not in known:
        raise InputError(f"to: got diffusers, which has no steps of {scheduler.sampler} and {scheduler.skip_type}")
    config = {"timestep_spacing": known[scheduler.skip_type], "steps_offset": scheduler.offset}
    if scheduler.sampler == "ddpm":
        return {"_class_name": "DDPMScheduler", **config}
    return {"_class_name": "DDIMScheduler", **config, "set_alpha_to_one": scheduler.to_data}


def make_network_config(config: UNetConfig, image_size: int | tuple[int, int]) -> dict[str, Any]:
    """The ``config.json`` of a ``UNet2DModel`` with our network's numbers.

    Raises:
        InputError: where diffusers has no such network.
    """
    if config.patch != 1:
        raise InputError(f"to: got diffusers, which has no network of patch {shorten(config.patch)}; use safetensors")
    without = "Resnet{}sampleBlock2D" if config.resblock_updown else "{}Block2D"
    with_attention = [level in config.attention_levels for level in range(len(config.channels))]
    resample = "resnet" if config.resblock_updown else "conv"

    def kinds(way: str, attended: list[bool]) -> list[str]:
        return [f"Attn{way}Block2D" if attention else without.format(way) for attention in attended]

    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": VERSION,
        "sample_size": image_size if isinstance(image_size, int) else list(image_size),
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
        "num_class_embeds": config.class_embeddings or None,
        "norm_num_groups": config.norm_groups,
        "attn_norm_num_groups": config.norm_groups,
        "norm_eps": config.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
        "add_attention": True,
    }
