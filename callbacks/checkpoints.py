"""Checkpoints on disk: they are written atomically, and a damaged or foreign one is never loaded."""

import os
import re
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from clipward.errors import InputError, first_line, list_names, shorten
from clipward.files import atomic_write, check_archive, remove_leftovers

NEEDED = ("state_dict", "epoch", "global_step", "pytorch-lightning_version")
VERSION = re.compile(r"[2-9]\d*\.\d+(\.\w+)*")  # of Lightning; fit was never made for an older one
NAMES = r".+\.ckpt"
TO_TRAIN = ("optimizer_states", "lr_schedulers", "loops")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under another name and renames it when all of it is on the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(Path(path).parent, NAMES)
        with atomic_write(Path(path), clear=False) as aside, aside.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's own, in place of what the disk said
                raise _of_the_disk(error) or error from None
            file.flush()
            os.fsync(file.fileno())


def _of_the_disk(error: BaseException | None) -> OSError | None:
    """The disk's error that another one came of."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def remove_unfinished(root: Path) -> None:
    """Remove the hidden temporary files of checkpoints below ``root`` whose writers were killed."""
    for folder in sorted({path.parent for path in root.rglob(".*.ckpt.*")}):
        remove_leftovers(folder, NAMES)


def last_checkpoint(root: Path) -> Path | None:
    """Find the newest checkpoint below ``root``, if there is any.

    Raises:
        InputError: where it is damaged.
    """
    found = _sort_by_age(root)
    if found:
        check(found[0], root)
    return found[0] if found else None


def check(path: Path, root: Path) -> None:
    """Raise :class:`InputError` if a checkpoint is damaged, and name the newest sound one before it.

    Args:
        path: the checkpoint.
        root: the folder to search for a sound one.
    """
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no file"
        raise InputError(f"ckpt_path: got {shorten(path)}, which is {kind}; expected a file that fit saved")
    damage = _find_damage(path)
    if damage is None:
        return
    older = [other for other in _sort_by_age(root) if other != path and _age(other) <= _age(path)]
    sound = next((other for other in older if _find_damage(other) is None), None)
    advice = f"use --ckpt_path {sound}, saved before it" if sound else "there is none before it"
    raise InputError(f"ckpt_path: {path} is damaged ({damage}); {advice}")


def check_content(path: Path, needed: Iterable[str] = NEEDED) -> None:
    """Check that a file, which is sound, is a checkpoint: its tensors are not read, and no code in it is run.

    Args:
        path: the file.
        needed: the keys that it must have.

    Raises:
        InputError: where it is something else.
    """
    check_archive(path, "ckpt_path")
    refusal = f"ckpt_path: {path} is no checkpoint of fit"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # unpickling a stranger's file raises anything
        if isinstance(error, MemoryError):
            raise
        raise InputError(f"{refusal} ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise InputError(f"{refusal}, but {shorten(type(content).__name__)}; use --weights for weights alone")
    missing = [name for name in needed if name not in content]
    if missing:
        raise InputError(f"{refusal}: it has no {list_names(missing)}; use --weights for weights alone")
    for name in ("state_dict", "current_model_state", "loops", "callbacks"):
        if not isinstance(content.get(name, {}), dict):
            raise InputError(f"{refusal}: {name} is {shorten(content[name])}, expected a mapping")
    if not isinstance(content.get("loops", {"fit_loop": {}}).get("fit_loop"), dict):
        raise InputError(f"{refusal}: loops.fit_loop is no mapping, expected one")
    for name in ("optimizer_states", "lr_schedulers"):
        states = content.get(name, [])
        if not isinstance(states, list) or not all(isinstance(state, dict) for state in states):
            raise InputError(f"{refusal}: {name} is {shorten(states)}, expected a list of mappings")
    for name in ("epoch", "global_step"):
        if type(content.get(name, 0)) is not int or content.get(name, 0) < 0:
            raise InputError(f"{refusal}: {name} is {shorten(content[name])}, expected a whole number from 0 on")
    version = content.get("pytorch-lightning_version", "2.0")
    if not isinstance(version, str) or not VERSION.fullmatch(version):
        raise InputError(f"{refusal}: pytorch-lightning_version is {shorten(version)}, expected one such as 2.6.0")


def _sort_by_age(root: Path) -> list[Path]:
    """The checkpoints below ``root``, newest first; of two of one age, ``last.ckpt``, which is a copy, comes first."""
    found = (path for path in root.rglob("*.ckpt") if path.is_file())
    return sorted(found, key=lambda path: (_age(path), path.name == "last.ckpt"), reverse=True)


def _age(path: Path) -> float:
    """The time of the last change, in seconds."""
    return path.stat().st_mtime


def _find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    try:
        check_archive(path, "")
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
    except InputError as error:
        return str(error).partition(shorten(path))[2].strip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, NotImplementedError, zlib.error) as error:
        return first_line(error)
    return None if bad is None else f"{bad} has another checksum"
