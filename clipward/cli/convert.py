"""``clipward convert``: weights in another format."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli

from clipward.cli.parser import OneLineParser
from clipward.diffusion.denoiser import Parametrisation
from clipward.diffusion.schedule import ScheduleName
from clipward.errors import InputError
from clipward.weights.architecture import Weights
from clipward.weights.diffusers import save_diffusers
from clipward.weights.load import load_weights, save_weights


def convert(
    source: str,
    target: str,
    to: Literal["safetensors", "diffusers"] = "safetensors",
    use_ema: bool = True,
    half: bool = False,
    image_size: int | tuple[int, int] | None = None,
    head_channels: int | None = None,
    schedule: ScheduleName | None = None,
    parametrisation: Parametrisation | None = None,
) -> None:
    """Write weights of any kind that --weights takes as our safetensors or as a diffusers folder.

    Args:
        source: the weights: a file, a folder, or the name of a diffusers model on the hub.
        target: the file (safetensors) or folder (diffusers) to write.
        to: what to write.
        use_ema: take the averaged weights where a file has both.
        half: write safetensors in half precision.
        image_size: of the pictures, or '[HEIGHT, WIDTH]', where the source doesn't know it.
        head_channels: of an attention head, where the source doesn't know it; 64 in OpenAI's published networks.
        schedule: where the source doesn't know it; linear in all that pesser and OpenAI published for faces.
        parametrisation: what the network puts out, where the source doesn't know it.
    """
    path = Path(target)
    if path.exists():
        raise InputError(f"target: {target} exists; use another name")
    weights = load_weights(source, use_ema, head_channels)
    given: dict[str, Any] = {"image_size": image_size, "schedule": schedule, "parametrisation": parametrisation}
    architecture = replace(weights.architecture, **{name: value for name, value in given.items() if value is not None})
    weights = Weights(architecture, weights.state)
    if to == "diffusers":
        save_diffusers(path, weights)
    else:
        save_weights(path, weights, half)
    count = sum(value.numel() for value in weights.state.values())
    height, width = architecture.size
    print(f"{target}: {count / 1e6:.1f} M parameters for {width}×{height} pictures")


def run(args: Sequence[str]) -> None:
    auto_cli(convert, args=list(args), prog="clipward convert", parser_class=OneLineParser)
