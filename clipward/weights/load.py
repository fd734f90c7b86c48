"""Weights on disk: ours, which know their own architecture, and those of other projects, recognised by content."""

import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from clipward.errors import InputError, first_line
from clipward.files import _storable, read_safetensors, whole
from clipward.networks.unet import UNetConfig
from clipward.weights.architecture import Architecture, Weights, default_var_type
from clipward.weights.diffusers import HUB_NAME, _diffusers, _download
from clipward.weights.keys import State, measured, renamed
from clipward.weights.openai import OPENAI, openai_naming
from clipward.weights.pesser import HO, pesser_naming

FORMAT = "clipward-ddpm-1"


def save_weights(path: Path, weights: Weights, half: bool = False) -> None:
    """Write safetensors, in half precision if asked, whole or not at all."""
    metadata = {"format": FORMAT, "architecture": json.dumps(weights.architecture.to_dict())}
    with whole(path) as aside:
        save_file(_storable(weights.state, half), aside, metadata)


def load_weights(source: str | Path, use_ema: bool = True, head_channels: int | None = None) -> Weights:
    """Read weights, recognised by what they hold:

    - our safetensors, or a folder with ``ddpm.safetensors``;
    - a Lightning checkpoint of :class:`DDPMModule`;
    - a diffusers folder (``unet/`` or its root), or the name of one on the hub; its scheduler's settings are taken too;
    - a state in the layout of pesser/pytorch_diffusion or openai/guided-diffusion (and RePaint), as safetensors or
      pickled, bare or under ``ema.shadow``, ``ema``, ``model`` or ``state_dict``.

    Args:
        source: a file, a folder, or ``owner/name`` on the hub.
        use_ema: take the averaged weights where a file has both.
        head_channels: of an attention head, where the file can't tell.

    Raises:
        InputError: where there is none, it is none of these, or it is damaged.
    """
    path = Path(source)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        if HUB_NAME.fullmatch(str(source)):
            return _load_folder(_download(str(source)))
        raise InputError(f"weights: there is no file {source}")
    if path.suffix == ".safetensors" or _is_safetensors(path):
        metadata, state = read_safetensors(path, "weights")
        if metadata.get("format") == FORMAT:
            return Weights(Architecture.from_dict(json.loads(metadata["architecture"])), state)
    else:
        content = _unpickle(path)
        if isinstance(content, dict) and "architecture" in content:
            state = content["state_dict" if use_ema else "current_model_state"]
            state = {n.removeprefix("unet."): v for n, v in state.items() if n.startswith("unet.")}
            return Weights(Architecture.from_dict(content["architecture"]), state)
        state = _unwrapped(path, content, use_ema)
    if "time_embedding.linear_1.weight" in state:
        if not (path.parent / "config.json").is_file():
            raise InputError(f"weights: {path} is diffusers', but has no config.json beside it; its folder would do")
        return _diffusers(path.parent, state)
    unet, state, image_size = from_state(state, head_channels)
    return Weights(Architecture(unet, image_size, var_type=default_var_type(unet)), state)


def _is_safetensors(path: Path) -> bool:
    return path.open("rb").read(9)[8:] == b"{"


def _load_folder(folder: Path) -> Weights:
    if (folder / "ddpm.safetensors").is_file():
        return load_weights(folder / "ddpm.safetensors")
    for unet in (folder / "unet", folder):
        for suffix in ("safetensors", "bin"):
            file = unet / f"diffusion_pytorch_model.{suffix}"
            if file.is_file() and (unet / "config.json").is_file():
                content = read_safetensors(file, "weights")[1] if suffix == "safetensors" else _unpickle(file)
                return _diffusers(unet, content)
    raise InputError(
        f"weights: {folder} holds neither ddpm.safetensors nor diffusers' config.json and diffusion_pytorch_model; "
        "a folder with one of them would do"
    )


def _unpickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), first_line(error))
        raise InputError(
            f"weights: {path} is damaged, or holds more than tensors, which could run code ({reason.strip()}); a file "
            "with the state dict alone, written by torch.save or as safetensors, would do"
        ) from error
    except Exception as error:
        raise InputError(f"weights: {path} is no checkpoint, or a damaged one ({first_line(error)})") from error


def _unwrapped(path: Path, content: Any, use_ema: bool) -> dict[str, Tensor]:
    """The state within what training programs save, without a prefix that all of its keys share."""
    for place in (["ema.shadow", "ema"] if use_ema else []) + ["model", "state_dict", ""]:
        state = content
        for part in filter(None, place.split(".")):
            state = state.get(part) if isinstance(state, dict) else None
        if isinstance(state, dict) and state and all(isinstance(v, Tensor) for v in state.values()):
            while len({name.partition(".")[0] for name in state}) == 1 and all("." in name for name in state):
                state = {name.partition(".")[2]: value for name, value in state.items()}
            return state
    raise InputError(
        f"weights: {path} has no dictionary of tensors, bare or under ema.shadow, ema, model or state_dict; one would "
        "do"
    )


# any of those that need no config
def from_state(state: State, head_channels: int | None = None) -> tuple[UNetConfig, dict[str, Tensor], int]:
    """Our network's config and state, and the size of its pictures, out of a state by pesser's or OpenAI's code.

    Both sizes of pictures are what the published networks have: attention begins at 16×16 in Ho et al.'s, and the
    coarsest level is 8×8 in Dhariwal & Nichol's.

    Args:
        state: by their names.
        head_channels: of an attention head, which no shape shows; by default 64 in OpenAI's, as they publish.

    Raises:
        InputError: where the state is neither's, or a key does not fit.
    """
    given = {} if head_channels is None else {"head_channels": head_channels}
    if "temb.dense.0.weight" in state:
        naming = pesser_naming(_count(state, "down.{}.block.0.conv1.weight"))
        config = measured(state, naming, **HO | given)
        image_size = 16 * 2 ** min(config.attention_levels, default=len(config.channels) - 1)
        return config, renamed(state, config, naming), image_size
    if "time_embed.0.weight" in state:
        blocks = _count(state, "output_blocks.{}.0.in_layers.0.weight")
        joins = ("1.conv", "2.conv", "1.in_layers.0", "2.in_layers.0")
        up = [n for n in range(blocks) if any(f"output_blocks.{n}.{join}.weight" in state for join in joins)]
        num_res_blocks = min(up, default=blocks - 1)
        levels = blocks // (num_res_blocks + 1)
        attended = [i for i in range(levels) if f"input_blocks.{1 + i * (num_res_blocks + 1)}.1.qkv.weight" in state]
        naming = openai_naming(levels, num_res_blocks, attended)
        config = measured(state, naming, **OPENAI | given)
        return config, renamed(state, config, naming, sines_first=False), 8 * 2 ** (levels - 1)
    raise InputError(
        f"weights: the keys {', '.join(list(state)[:3])} … are of no network that is known here; a diffusers folder, "
        "or a file in the layout of pesser/pytorch_diffusion or openai/guided-diffusion, would do"
    )


def _count(state: State, pattern: str) -> int:
    return next(n for n in itertools.count() if pattern.format(n) not in state)
