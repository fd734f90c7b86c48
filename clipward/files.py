"""Files: written atomically, read without running code, known by a hash."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clipward.errors import InputError, first_line, shorten

CONFIGS, CHECKPOINTS = (Path(str(resources.files(f"clipward.{room}"))) for room in ("configs", "checkpoints"))
SHIPPED = "clipward:"  # before the name of something that ships
NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # that weights may be


def locate(name: str | Path) -> Path:
    """The path that a name stands for: ``clipward:NAME`` is NAME below the checkpoints that ship."""
    text = str(name)
    return CHECKPOINTS / text.removeprefix(SHIPPED) if text.startswith(SHIPPED) else Path(name)


def find_shipped(source: str | Path, folder: str, field: str, expected: str = "a YAML file") -> Path:
    """The file that ``source`` names: its path, or the name of a YAML file that ships in ``configs/FOLDER``.

    Args:
        source: such as ``faces``.
        folder: below the configs, such as ``contrasts``.
        field: the setting that holds it, for errors.
        expected: what the setting may be, for errors.

    Raises:
        InputError: where there is no such file.
    """
    if os.path.isfile(source):
        return Path(source)
    known = {path.stem: path for path in sorted((CONFIGS / folder).glob("*.yaml"))}
    if str(source) not in known:
        raise InputError(f"{field}: got {shorten(source)}, expected {expected} or one of {', '.join(known)}")
    return known[str(source)]


@contextmanager
def atomic_write(path: Path, clear: bool = True) -> Iterator[Path]:
    """A path beside ``path`` to write to; it takes its place at the end, and is gone if something went wrong.

    Args:
        path: the file.
        clear: first remove what a killed process left beside it, which lists the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if clear:
        remove_leftovers(path.parent, re.escape(path.name))
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("wb") as mark:
        _lock(mark.fileno())  # tells others that the file is in use
        mode = os.fstat(mark.fileno()).st_mode  # safetensors would make a file that only its owner reads
        try:
            yield aside
            aside.chmod(stat.S_IMODE(mode))
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` to write to; it takes its place at the end, as in :func:`atomic_write`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, re.escape(path.name))
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.mkdir()
    mark = os.open(aside, os.O_RDONLY)
    try:
        _lock(mark)
        yield aside
        aside.replace(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    finally:
        os.close(mark)


@contextmanager
def hide_bars() -> Iterator[None]:
    """Work with ``datasets`` on a small table, without a line of progress for each thing that it does."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def remove_leftovers(folder: Path, names: str) -> None:
    """Remove the hidden temporary files, and folders, of writers that were killed.

    Args:
        folder: where they are.
        names: a pattern of the names that were to be written.
    """
    pattern = re.compile(rf"\.(?:{names})\.[0-9]+")
    with os.scandir(folder) as entries:
        left = [entry for entry in entries if pattern.fullmatch(entry.name)]
    for entry in left:
        is_folder = entry.is_dir(follow_symlinks=False)
        if not (is_folder or entry.is_file(follow_symlinks=False)) or _in_use(entry.path):
            continue
        if is_folder:
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            Path(entry.path).unlink(missing_ok=True)


def _in_use(path: str) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return True
    try:
        return not _lock(handle)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Lock an open file against other processes, until it is closed; false where another one has locked it.

    A file system without locks lets all have theirs.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


class FolderLock:
    """Lets one process at a time write to a folder. The lock of a process that ended, however it did, is free.

    Args:
        path: a file in the folder, which is there while the lock is held.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def acquire(self) -> bool:
        """Take the lock, and make the folder; false where another process has it. A second call changes nothing."""
        while self._handle is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            if not _lock(handle):
                os.close(handle)
                return False
            with suppress(FileNotFoundError):  # its holder may have removed it while this process waited for it
                if os.path.samestat(os.fstat(handle), self.path.stat()):
                    self._handle = handle
                    break
            os.close(handle)
        return True

    def release(self) -> None:
        """Give the lock back, where this process has it."""
        if self._handle is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = None


def check_writable(path: Path, field: str, folder: bool = False) -> None:
    """Check that a file, or files in a folder, can be written, without leaving any trace.

    Args:
        path: of the file or folder, whose own folders may be still to be made.
        field: the setting that holds it, for errors.
        folder: whether it is a folder.

    Raises:
        InputError: where it can't be.
    """
    refusal = f"{field}: got {shorten(path)}, expected a {'folder' if folder else 'file'} that can be written"
    try:
        path = path.absolute()
        there = _nearest(path)
        if there.is_symlink() and not there.exists():
            raise InputError(f"{refusal}; {shorten(there)} is a link to nothing")
        if there == path and there.is_dir() != folder:
            raise InputError(f"{refusal}; it is a {'file' if folder else 'folder'}")
        there = path.parent if there == path and not folder else there
        if not there.is_dir():
            raise InputError(f"{refusal}; {shorten(there)} is a file")
        with tempfile.TemporaryFile(dir=there):
            longest = os.pathconf(there, "PC_NAME_MAX") - (0 if folder else 20)  # a temporary file has a longer name
        if any(len(os.fsencode(part)) > longest for part in path.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{refusal} ({getattr(error, 'strerror', None) or error})") from error


def _nearest(path: Path) -> Path:
    """The path itself, or the nearest of its folders that is there, be it a link to nothing."""
    while True:
        try:
            path.lstat()
            return path
        except (FileNotFoundError, NotADirectoryError):
            path = path.parent


def to_storable(state: dict[str, Tensor], half: bool = False) -> dict[str, Tensor]:
    return {k: (v.half() if half else v).detach().contiguous().cpu() for k, v in state.items()}


def read_json(path: Path, field: str = "weights") -> Any:
    """What a JSON file holds that ``field`` names, or that is in a folder which it names.

    Raises:
        InputError: where it can't be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{field}: {shorten(path)} can't be read as JSON ({first_line(error)})") from error


def check_archive(path: Path, field: str) -> None:
    """Refuse a zip archive that would take much more memory than its size on disk; any other file passes.

    torch writes its archives uncompressed, so one that is compressed was made by something else.

    Raises:
        InputError: for such an archive, or a damaged one, and for a pipe or a device, which may never end.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{field}: got {shorten(path)}, which is no regular file; expected one")
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise InputError(f"{field}: {shorten(path)} is a damaged archive ({first_line(error)})") from error
    if size > 1.5 * path.stat().st_size + 2**20:
        raise InputError(f"{field}: {shorten(path)} would unpack to {size >> 20} MiB; expected a file by torch.save")


def read_safetensors(path: Path, field: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors, numbers with a point in float32, of a file that ``field`` names.

    Raises:
        InputError: where the file is missing or damaged.
    """
    if not path.is_file():
        raise InputError(f"{field}: there is no file {shorten(path)}")
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{field}: {shorten(path)} is damaged or no safetensors file ({first_line(error)})") from error
    for name, value in state.items():
        if value.is_floating_point() and value.dtype not in NUMBERS:
            kind = str(value.dtype).removeprefix("torch.")
            raise InputError(
                f"{field}: got the key {shorten(name)} of {kind} values, expected float32, float16 or bfloat16"
            )
    return metadata, {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def check_state(network: Mapping[str, Tensor], state: Mapping[str, Tensor], field: str) -> None:
    """Check that a file's tensors are those of a network, before the network takes memory.

    Args:
        network: its own tensors, which may be on the meta device.
        state: the file's.
        field: the setting that names the file, for errors.

    Raises:
        InputError: on the first key that is missing, extra, of another shape or type, or not finite.
    """
    for name in sorted({*network, *state}):
        if name not in state:
            raise InputError(f"{field}: got no key {name!r}, expected one of shape {tuple(network[name].shape)}")
        if name not in network:
            raise InputError(f"{field}: got the key {shorten(name)}, expected no such key for this network")
        if network[name].shape != state[name].shape:
            given, wanted = shorten(tuple(state[name].shape)), shorten(tuple(network[name].shape))
            raise InputError(f"{field}: got the key {name!r} of shape {given}, expected {wanted}")
        if network[name].is_floating_point() and not state[name].is_floating_point():
            kind = str(state[name].dtype).removeprefix("torch.")
            raise InputError(f"{field}: got the key {name!r} of {kind} values, expected floating-point numbers")
        if state[name].is_floating_point() and not torch.isfinite(state[name]).all():
            raise InputError(f"{field}: got the key {name!r} with values that are not finite, expected finite numbers")


def state_hash(state: dict[str, Tensor]) -> str:
    """SHA-256 over names and values, its first 16 digits: the same for the same weights in any file."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
