"""Files: written atomically, read without running code, known by a hash."""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from clipward.errors import InputError, first_line, shorten

CONFIGS, CHECKPOINTS = (Path(str(resources.files(f"clipward.{room}"))) for room in ("configs", "checkpoints"))
SHIPPED = "clipward:"  # before the name of something that ships


def locate(name: str | Path) -> Path:
    """The path that a name stands for: ``clipward:NAME`` is NAME below the checkpoints that ship."""
    text = str(name)
    return CHECKPOINTS / text.removeprefix(SHIPPED) if text.startswith(SHIPPED) else Path(name)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
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
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` to write to; it takes its place at the end, as in :func:`atomic_write`."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        yield aside
        aside.replace(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def to_storable(state: dict[str, Tensor], half: bool = False) -> dict[str, Tensor]:
    return {k: (v.half() if half else v).detach().contiguous().cpu() for k, v in state.items()}


def read_json(path: Path) -> Any:
    """What a JSON file of a folder of weights holds.

    Raises:
        InputError: where it can't be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"weights: {shorten(path)} can't be read as JSON ({first_line(error)})") from error


def check_archive(path: Path, field: str) -> None:
    """Refuse a zip archive that would take much more memory than its size on disk; any other file passes.

    torch writes its archives uncompressed, so one that is compressed was made by something else.

    Raises:
        InputError: for such an archive, or a damaged one.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{field}: {shorten(path)} is a damaged archive ({first_line(error)})") from error
    if size > 1.5 * path.stat().st_size + 2**20:
        raise InputError(f"{field}: {shorten(path)} would unpack to {size >> 20} MiB; expected a file by torch.save")


def read_safetensors(path: Path, field: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors, in float32, of a file that ``field`` names.

    Raises:
        InputError: where the file is missing or damaged.
    """
    if not path.is_file():
        raise InputError(f"{field}: there is no file {shorten(path)}")
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{field}: {shorten(path)} is damaged or no safetensors file ({first_line(error)})") from error


def state_hash(state: dict[str, Tensor]) -> str:
    """SHA-256 over names and values, its first 16 digits: the same for the same weights in any file."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
