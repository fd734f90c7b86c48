"""Weights on disk: our safetensors, which know their own architecture, and our Lightning checkpoints."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion.denoiser import Parametrisation
from diffusion.schedule import ScheduleName
from diffusion.unet import UNetConfig
from errors import InputError

FORMAT = "clipward-ddpm-1"


@dataclass(frozen=True)
class Architecture:
    """What must be known of a diffusion model to use its weights.

    Args:
        unet: the network's size.
        image_size: height and width of the pictures it makes.
        schedule: ᾱ_t by name.
        num_timesteps: T, the number of noise levels.
        parametrisation: what the network puts out.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    image_size: int = 256
    schedule: ScheduleName = "linear"
    num_timesteps: int = 1000
    parametrisation: Parametrisation = "eps"

    def __post_init__(self) -> None:
        stride = self.unet.stride
        if self.image_size % stride:
            raise InputError(f"image_size: {self.image_size} given; a multiple of {stride} would do for this U-Net")

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Architecture":
        unet = {k: tuple(v) if isinstance(v, list) else v for k, v in values["unet"].items()}
        return cls(**{**values, "unet": UNetConfig(**unet)})


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


def save_weights(path: Path, weights: Weights) -> None:
    """Write safetensors in half precision, whole or not at all."""
    metadata = {"format": FORMAT, "architecture": json.dumps(weights.architecture.to_dict())}
    state = {name: value.half().contiguous().cpu() for name, value in weights.state.items()}
    with whole(path) as aside:
        save_file(state, aside, metadata)


def load_weights(path: Path) -> Weights:
    """Read our safetensors, a folder with one, or a Lightning checkpoint of :class:`DDPMModule` (its averaged weights).

    Raises:
        InputError: where the file is missing, is none of these, or is damaged.
    """
    if path.is_dir():
        path = path / "ddpm.safetensors"
    if path.is_file() and path.open("rb").read(2) == b"PK":
        return _load_checkpoint(path)
    metadata, state = read_safetensors(path, "weights")
    if metadata.get("format") != FORMAT:
        raise InputError(f"weights: {path} does not say what network it is for; a file written by Clipward would do")
    return Weights(Architecture.from_dict(json.loads(metadata["architecture"])), state)


def _load_checkpoint(path: Path) -> Weights:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"weights: {path} can't be read as a checkpoint ({str(error).splitlines()[0]})") from error
    if "architecture" not in checkpoint:
        raise InputError(f"weights: {path} is no checkpoint of a DDPMModule; one of `fit`, or safetensors, would do")
    state = {n.removeprefix("unet."): v for n, v in checkpoint["state_dict"].items() if n.startswith("unet.")}
    return Weights(Architecture.from_dict(checkpoint["architecture"]), state)


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
