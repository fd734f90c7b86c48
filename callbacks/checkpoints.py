"""Checkpoints on disk: they are written atomically, and a damaged one is never loaded."""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from clipward.errors import InputError
from clipward.files import atomic_write


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under another name and renames it when all of it is on the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any = None) -> None:
        with atomic_write(Path(path)) as aside, aside.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())


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

    A sharded checkpoint is a folder, which is checked when it is loaded.

    Args:
        path: the checkpoint.
        root: the folder to search for a sound one.
    """
    damage = _find_damage(path)
    if damage is None:
        return
    older = [other for other in _sort_by_age(root) if other != path and _age(other) <= _age(path)]
    sound = next((other for other in older if _find_damage(other) is None), None)
    advice = f"use --ckpt_path {sound}, saved before it" if sound else "there is none before it"
    raise InputError(f"ckpt_path: {path} is damaged ({damage}); {advice}")


def _sort_by_age(root: Path) -> list[Path]:
    """The checkpoints below ``root``, newest first; of two of one age, ``last.ckpt``, which is a copy, comes first."""
    return sorted(root.rglob("*.ckpt"), key=lambda path: (_age(path), path.name == "last.ckpt"), reverse=True)


def _age(path: Path) -> float:
    """The time of the last change, in seconds."""
    return path.stat().st_mtime


def _find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    if path.is_dir():
        return None
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return str(error)
    return None if bad is None else f"{bad} has another checksum"
