"""Checkpoints on disk: each whole or not there, and a damaged one is never loaded in silence."""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from clipward.errors import InputError
from clipward.files import whole


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint aside and renames it when all of it is on the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any = None) -> None:
        with whole(Path(path)) as aside, aside.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())


def last_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint below ``root``, if there is any.

    Raises:
        InputError: where it is damaged.
    """
    found = _by_age(root)
    if found:
        check(found[0], root)
    return found[0] if found else None


def check(path: Path, root: Path) -> None:
    """Raise :class:`InputError` if the checkpoint is damaged, with the newest sound one below ``root`` to take instead.

    A checkpoint in parts, which is a folder, is left to who loads it.
    """
    harm = _harm(path)
    if harm is None:
        return
    older = [other for other in _by_age(root) if other != path and _age(other) <= _age(path)]
    sound = next((other for other in older if _harm(other) is None), None)
    advice = f"--ckpt_path {sound}, saved before it, would do" if sound else "there is none before it"
    raise InputError(f"ckpt_path: {path} is damaged ({harm}); {advice}")


def _by_age(root: Path) -> list[Path]:
    """Newest first; of two of one age, ``last.ckpt`` is the copy."""
    return sorted(root.rglob("*.ckpt"), key=lambda path: (_age(path), path.name == "last.ckpt"), reverse=True)


def _age(path: Path) -> float:
    return path.stat().st_mtime


def _harm(path: Path) -> str | None:
    if path.is_dir():
        return None
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return str(error)
    return None if bad is None else f"{bad} has another checksum"
