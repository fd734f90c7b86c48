"""``clipward convert``: weights in another format."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli

from clipward.cli.model_card import check_login, make_card, push, read_record
from clipward.cli.parser import OneLineParser
from clipward.diffusion.denoiser import Parametrisation
from clipward.diffusion.schedule import ScheduleName
from clipward.errors import InputError, shorten
from clipward.files import check_writable
from clipward.weights.architecture import Weights
from clipward.weights.diffusers import HUB_NAME, save_diffusers
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
    push_to_hub: str | None = None,
    private: bool = False,
    dry_run: bool = False,
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
        push_to_hub: USER/NAME of a repository on the hub to upload the diffusers folder to, with a model card.
        private: let nobody else see the repository.
        dry_run: write the folder with its card, show it, and upload nothing.
    """
    if push_to_hub is not None:
        if not HUB_NAME.fullmatch(push_to_hub):
            raise InputError(
                f"push_to_hub: got {shorten(push_to_hub)}, expected USER/NAME of letters, digits, '-', '_' and '.'"
            )
        if to != "diffusers":
            raise InputError(f"push_to_hub: got --to {to} beside it, expected --to diffusers")
    elif dry_run or private:
        name = "dry_run" if dry_run else "private"
        raise InputError(f"{name}: got no --push_to_hub beside it, expected USER/NAME to make the card for")
    if half and to == "diffusers":
        raise InputError(
            "half: got true beside --to diffusers, expected --to safetensors; diffusers' folder is float32"
        )
    if "://" in target:
        raise InputError(f"target: got {shorten(target)}, expected a file or a folder of this machine")
    path = Path(target)
    if not target:
        raise InputError("target: got an empty name, expected a file or a folder to write")
    check_writable(path, "target", folder=to == "diffusers")
    if path.exists():
        raise InputError(f"target: {target} exists; use another name")
    if head_channels is not None and head_channels < 1:
        raise InputError(f"head_channels: got {head_channels}, expected 1 or more")
    settings: dict[str, Any] = {"image_size": image_size, "schedule": schedule, "parametrisation": parametrisation}
    weights = load_weights(source, use_ema, head_channels)
    said, given = weights.architecture, {name: value for name, value in settings.items() if value is not None}
    architecture = replace(said, **given)
    for name, value in given.items():
        if name not in weights.assumed and replace(said, **{name: value}) != said:
            raise InputError(f"{name}: got {value}, but {shorten(source)} says {getattr(said, name)}; leave it out")
    if head_channels not in (None, said.unet.head_channels):
        raise InputError(
            f"head_channels: got {head_channels}, but {shorten(source)} says {said.unet.head_channels}; leave it out"
        )
    weights = Weights(architecture, weights.state)
    if push_to_hub is not None and not dry_run:
        check_login()
    if to == "diffusers":
        card = {} if push_to_hub is None else make_card(push_to_hub, weights, source, read_record(source))
        save_diffusers(path, weights, card)
    else:
        save_weights(path, weights, half)
    count = sum(value.numel() for value in weights.state.values())
    height, width = architecture.size
    print(f"{target}: {count / 1e6:.1f} M parameters for {width}×{height} pictures")
    if push_to_hub is not None and dry_run:
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            size = file.stat().st_size
            shown = f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
            print(f"  {file.relative_to(path)}  {shown}")
        seen = "a private repository" if private else "which everybody sees"
        place = f"https://huggingface.co/{push_to_hub}, {seen}"
        print(f"nothing is uploaded; without --dry_run true, these files go to {place}")
    elif push_to_hub is not None:
        print(f"uploaded: {push(path, push_to_hub, private)}")


def run(args: Sequence[str]) -> None:
    auto_cli(convert, args=list(args), prog="clipward convert", parser_class=OneLineParser)
