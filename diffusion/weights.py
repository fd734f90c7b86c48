"""Weights on disk: ours, which know their own architecture, and those of other projects, recognised by content."""

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion.architecture import Architecture, default_var_type
from diffusion.convert import diffusers_naming, from_state, named, renamed, up_to_date
from diffusion.diffusers_format import architecture_of, configs_of
from errors import InputError, first_line

FORMAT = "clipward-ddpm-1"


@dataclass(frozen=True)
class Weights:
    """A U-Net's parameters by name, and what they are the parameters of."""

    architecture: Architecture
    state: dict[str, Tensor]

    def into(self, network: nn.Module) -> None:
        """Copy into ``network``.

        Raises:
            InputError: on the first key that is missing, extra or of another shape.
        """
        own = network.state_dict()
        for name in sorted({*own, *self.state}):
            if name not in self.state:
                raise InputError(f"weights: the key {name} {tuple(own[name].shape)} is missing")
            if name not in own:
                raise InputError(f"weights: the key {name} {tuple(self.state[name].shape)} is none of this network's")
            if own[name].shape != self.state[name].shape:
                given, wanted = tuple(self.state[name].shape), tuple(own[name].shape)
                raise InputError(f"weights: the key {name} has the shape {given}; {wanted} would do")
        network.load_state_dict(self.state)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; it takes its place at the end, and is gone if something went wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.touch()
    mode = aside.stat().st_mode  # safetensors would make a file that only its owner reads
    try:
        yield aside
        aside.chmod(mode)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` to write to, that takes its place at the end as a file of :func:`whole` does."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        yield aside
        aside.replace(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def save_weights(path: Path, weights: Weights, half: bool = False) -> None:
    """Write safetensors, in half precision if asked, whole or not at all."""
    metadata = {"format": FORMAT, "architecture": json.dumps(weights.architecture.to_dict())}
    with whole(path) as aside:
        save_file(_storable(weights.state, half), aside, metadata)


def save_diffusers(folder: Path, weights: Weights) -> None:
    """Write a folder that diffusers' ``DDPMPipeline.from_pretrained`` opens, whole or not at all.

    Raises:
        InputError: where diffusers has no such network.
    """
    configs = configs_of(weights.architecture)
    naming = diffusers_naming(len(weights.architecture.unet.channels))
    state = {named(name, naming): value for name, value in weights.state.items()}
    with whole_folder(folder) as aside:
        for name, config in configs.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / name).write_text(json.dumps(config, indent=2) + "\n")
        save_file(_storable(state), aside / "unet/diffusion_pytorch_model.safetensors", {"format": "pt"})


def _storable(state: dict[str, Tensor], half: bool = False) -> dict[str, Tensor]:
    return {k: (v.half() if half else v).detach().contiguous().cpu() for k, v in state.items()}


HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(?<!\.ckpt)(?<!\.pt)(?<!\.pth)(?<!\.bin)(?<!\.safetensors)")


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


def _diffusers(folder: Path, state: dict[str, Tensor]) -> Weights:
    """``folder`` is the one with the network's ``config.json``; the scheduler's lies in it or beside it."""
    places = (folder / "scheduler_config.json", folder.parent / "scheduler" / "scheduler_config.json")
    scheduler = next((place for place in places if place.is_file()), None)
    if scheduler is None:
        raise InputError(f"weights: {folder} has no scheduler_config.json; one of a DDPMScheduler would do")
    config = _read_json(folder / "config.json")
    architecture = architecture_of(config, _read_json(scheduler))
    naming, sines_first = diffusers_naming(len(architecture.unet.channels)), not config.get("flip_sin_to_cos", True)
    return Weights(architecture, renamed(up_to_date(state), architecture.unet, naming, sines_first))


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    configs = ["*config.json", "model_index.json"]
    try:
        for kind in ("safetensors", "bin"):
            files = [f"{folder}diffusion_pytorch_model.{kind}" for folder in ("", "unet/")]
            folder = Path(snapshot_download(name, allow_patterns=configs + files))
            if any((folder / file).is_file() for file in files):
                break
    except Exception as error:  # of the network, the hub or the disk
        raise InputError(
            f"weights: {name} is no file or folder, and the hub gives no such model ({first_line(error)})"
        ) from error
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"weights: {path} is no JSON ({error})") from error


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


def read_safetensors(path: Path, field: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors, in float32, of a file that ``field`` names.

    Raises:
        InputError: where the file is missing or damaged.
    """
    if not path.is_file():
        raise InputError(f"{field}: there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{field}: {path} is no safetensors file, or a damaged one ({error})") from error


def state_hash(state: dict[str, Tensor]) -> str:
    """SHA-256 over names and values, its first 16 digits: the same for the same weights in any file."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
