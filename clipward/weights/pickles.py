"""Pickled checkpoints: read without running code, and the state inside what training programs save around it."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipward.errors import InputError, first_line, shorten
from clipward.files import check_archive

AVERAGED = ("ema.shadow", "shadow", "ema")
TRAINED = ("model", "state_dict", "")


def unpickle(path: Path) -> Any:
    """What ``torch.save`` wrote to ``path``, as long as it is tensors, numbers, texts and collections of them.

    Raises:
        InputError: where the file is damaged or holds anything else.
    """
    check_archive(path, "weights")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), first_line(error))
        reason = reason.strip().partition(". ")[0]  # what follows is advice for a file that is trusted
        raise InputError(
            f"weights: got {shorten(path)}, which is damaged or holds more than tensors, which could run code "
            f"({reason}); use a file with the state dict alone, written by torch.save or as safetensors"
        ) from error
    except Exception as error:
        raise InputError(
            f"weights: got {shorten(path)}, which is no checkpoint or a damaged one ({first_line(error)})"
        ) from error


def find_state(path: Path, content: Any, use_ema: bool) -> dict[str, Tensor]:
    """The state in ``content``, without a prefix that all of its keys share.

    Args:
        path: where ``content`` was read.
        content: a state, or dictionaries around it: averaged weights under ``ema.shadow``, ``shadow`` or ``ema``, those
            that train under ``model`` or ``state_dict``.
        use_ema: take the averaged weights where there are both.

    Raises:
        InputError: where there is no state.
    """
    found = (_find_tensors(content, place) for place in AVERAGED)
    averaged, trained = next((each for each in found if each is not None), None), _find_trained(content)
    state = trained
    if averaged is not None and use_ema:
        state = _name_averages(averaged, trained, path) if isinstance(averaged, list) else averaged
    elif use_ema and isinstance(content, dict) and isinstance(content.get("ema"), dict | list):
        raise InputError(
            f"weights: got an ema in {shorten(path)} that is no dictionary of tensors; use --use_ema false"
        )
    if state is None and averaged is not None:
        raise InputError(f"weights: got {shorten(path)} with averaged weights alone; use --use_ema true")
    if state is None:
        places = ", ".join((*AVERAGED, *filter(None, TRAINED)))
        raise InputError(f"weights: got no tensors in {shorten(path)}, expected a dictionary, bare or under {places}")
    while len({name.partition(".")[0] for name in state}) == 1 and all("." in name for name in state):
        state = {name.partition(".")[2]: value for name, value in state.items()}
    return state


def _find_tensors(content: Any, place: str) -> dict[str, Tensor] | list[Tensor] | None:
    """What stands at a dotted ``place``, if it is tensors and nothing else."""
    for part in filter(None, place.split(".")):
        content = content.get(part) if isinstance(content, dict) else None
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ()
    if not values or not all(isinstance(value, Tensor) for value in values):
        return None
    return {str(name): value for name, value in content.items()} if isinstance(content, dict) else list(values)


def _find_trained(content: Any) -> dict[str, Tensor] | None:
    found = (_find_tensors(content, place) for place in TRAINED)
    return next((state for state in found if isinstance(state, dict)), None)


def _name_averages(averaged: list[Tensor], trained: dict[str, Tensor] | None, path: Path) -> dict[str, Tensor]:
    """Averages by the names of the parameters, which have the same order in this file or in ``model.pt`` beside it."""
    beside = path.with_name("model.pt")
    if trained is None and beside.is_file() and beside != path:
        trained = _find_trained(unpickle(beside))
    if trained is None:
        raise InputError(
            f"weights: got averaged weights without names in {shorten(path)}; put model.pt of the same run beside it"
        )
    if [value.shape for value in averaged] != [value.shape for value in trained.values()]:
        raise InputError(
            f"weights: got averaged weights without names in {shorten(path)}, expected the shapes of model in its order"
        )
    return dict(zip(trained, averaged, strict=True))
