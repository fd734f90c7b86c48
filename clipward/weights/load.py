"""Weights on disk: ours, which hold their own architecture, and those of other projects, recognised by their keys.

Another project is a file in this folder with a ``NAME``, :meth:`~Project.matches` and :meth:`~Project.from_state`, and
its place in :data:`PROJECTS`.
"""

import json
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file

from clipward.errors import InputError, list_names, shorten
from clipward.files import atomic_write, locate, read_safetensors, to_storable
from clipward.weights import diffusers, openai, pesser, xyfjason
from clipward.weights.architecture import Architecture, Weights
from clipward.weights.keys import State
from clipward.weights.pickles import find_state, unpickle

FORMAT = "clipward-ddpm-1"


class Project(Protocol):
    """What a module of this folder says of another project's weights."""

    NAME: str

    def matches(self, state: State) -> bool:
        """Whether ``state`` has this project's names."""

    def from_state(self, state: State, path: Path, head_channels: int | None = None) -> Weights:
        """Our weights from theirs.

        Args:
            state: tensors by their names.
            path: of the file that held them.
            head_channels: of an attention head, where no file says it.

        Raises:
            InputError: where they are of a network that ours cannot be.
        """


PROJECTS: tuple[Project, ...] = (diffusers, pesser, openai, xyfjason)


def save_weights(path: Path, weights: Weights, half: bool = False) -> None:
    """Write safetensors, in half precision if asked; a failure leaves no file."""
    metadata = {"format": FORMAT, "architecture": json.dumps(weights.architecture.to_dict())}
    with atomic_write(path) as aside:
        save_file(to_storable(weights.state, half), aside, metadata)


def load_weights(source: str | Path, use_ema: bool = True, head_channels: int | None = None) -> Weights:
    """Read weights, recognised by what they hold:

    - our safetensors, or a folder with ``ddpm.safetensors``;
    - a Lightning checkpoint of ``DDPMModule``;
    - a diffusers folder (``unet/`` or its root), or the name of one on the hub; its scheduler's settings are taken too;
    - a state of one of the other :data:`PROJECTS`, as safetensors or pickled, bare or inside what training programs
      save (:func:`~clipward.weights.pickles.find_state`).

    Args:
        source: a file, a folder, or ``owner/name`` on the hub.
        use_ema: take the averaged weights where a file has both.
        head_channels: of an attention head, where no file says it.

    Raises:
        InputError: where there is none, it is none of these, or it is damaged.
    """
    path = _find_file(source)
    if path.suffix == ".safetensors" or _is_safetensors(path):
        metadata, state = read_safetensors(path, "weights")
        if metadata.get("format") == FORMAT:
            return _checked(Weights(_parse_header(metadata), state))
        if metadata.get("format", "").startswith("clipward-"):
            raise InputError(f"weights: got a file of format {shorten(metadata['format'])}, expected {FORMAT}")
    else:
        content = unpickle(path)
        if isinstance(content, dict) and "architecture" in content:
            return _from_checkpoint(content, use_ema)
        state = find_state(path, content, use_ema)
    project = next((project for project in PROJECTS if project.matches(state)), None)
    if project is None:
        known = list_names(project.NAME for project in PROJECTS)
        raise InputError(f"weights: got the keys {list_names(state, 3)}, expected those of a network by {known}")
    return _checked(project.from_state(state, path, head_channels))


def _find_file(source: str | Path) -> Path:
    path = locate(source)
    if not _exists(path) and diffusers.HUB_NAME.fullmatch(str(source)):
        path = diffusers.download(str(source))
    if not _exists(path):
        raise InputError(f"weights: there is no file {shorten(source)}")
    if path.is_file():
        return path
    own = path / "ddpm.safetensors"
    file = own if own.is_file() else diffusers.find_file(path)
    if file is None:
        raise InputError(
            f"weights: got the folder {shorten(path)}, expected one with ddpm.safetensors, or with diffusers' "
            "config.json and diffusion_pytorch_model"
        )
    return file


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, a folder that is closed
        return False


def _is_safetensors(path: Path) -> bool:
    return path.open("rb").read(9)[8:] == b"{"


def _parse_header(metadata: dict[str, str]) -> Architecture:
    try:
        values = json.loads(metadata["architecture"])
    except KeyError as error:
        raise InputError("weights: got no architecture in the file's header, expected one as JSON") from error
    except (ValueError, RecursionError) as error:
        given = shorten(metadata["architecture"])
        raise InputError(f"weights: got {given} for architecture in the file's header, expected JSON") from error
    return Architecture.from_dict(values)


def _from_checkpoint(content: dict[str, Any], use_ema: bool) -> Weights:
    """From a checkpoint of ours, which keeps the averaged weights where Lightning looks for the network's."""
    place = "state_dict" if use_ema else "current_model_state"
    state = content.get(place)
    if not isinstance(state, dict):
        raise InputError(f"weights: got no {place} in the checkpoint, expected the parameters by name")
    state = {name.removeprefix("unet."): value for name, value in state.items() if name.startswith("unet.")}
    return _checked(Weights(Architecture.from_dict(content["architecture"]), state))


def _checked(weights: Weights) -> Weights:
    weights.check()
    return weights
