"""Tensors out of a TorchScript archive, without running its code."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipward.errors import InputError, shorten
from clipward.files import check_archive

STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
LISTS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")
LARGEST_PICKLE = 64 * 2**20  # bytes of the objects, without their tensors


class Module:
    """What stands for a module of the archive: the attributes that its state has."""


def is_torchscript(path: Path) -> bool:
    """Whether a file is a zip archive with code in it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def read_torchscript(path: Path, field: str) -> dict[str, Tensor]:
    """The parameters and buffers of a TorchScript archive by name, as ``torch.jit.load(path).state_dict()`` has them.

    Only tensors are read. The archive's code is never run, nor even compiled.

    Args:
        path: the archive.
        field: the setting that names it, for errors.

    Raises:
        InputError: where it is no such archive, is damaged, or holds more than modules and tensors.
    """
    check_archive(path, field)
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2]: name for name in archive.namelist()}
            if archive.getinfo(names["data.pkl"]).file_size > LARGEST_PICKLE:
                raise InputError(f"{field}: {shorten(path)} holds more objects than a CLIP has")
            state: dict[str, Tensor] = {}
            with archive.open(names["data.pkl"]) as file:
                collect(_Unpickler(file, archive, names).load(), _declared(archive, names), "", state)
            return state
    except InputError:
        raise
    except Exception as error:  # of a file that may hold anything
        raise InputError(f"{field}: {shorten(path)} is damaged, or holds more than tensors ({error})") from error


def collect(module: Any, declared: dict[str, set[str]], prefix: str, state: dict[str, Tensor]) -> None:
    """Add the parameters and buffers of a module and of those in it to ``state``."""
    for name, value in vars(module).items():
        if isinstance(value, Module):
            collect(value, declared, f"{prefix}{name}.", state)
        elif isinstance(value, Tensor) and name in declared.get(type(module).__qualname__, set()):
            state[prefix + name] = value


def _declared(archive: zipfile.ZipFile, names: dict[str, str]) -> dict[str, set[str]]:
    """The names of parameters and buffers that each class of the archive's code declares."""
    found: dict[str, set[str]] = {}
    for name in (name for name in names if name.startswith("code/") and name.endswith(".py")):
        place = name.removeprefix("code/").removesuffix(".py").replace("/", ".")
        text = archive.read(names[name]).decode("utf-8", "replace")
        for part in re.split(r"^class ", text, flags=re.MULTILINE)[1:]:
            lists = re.findall(r"^  __(?:parameters|buffers)__ = \[(.*?)\]", part, flags=re.MULTILINE | re.DOTALL)
            found[f"{place}.{part.partition('(')[0]}"] = {
                each for line in lists for each in re.findall(r'"(\w+)"', line)
            }
    return found


class _Unpickler(pickle.Unpickler):
    """Makes modules, tensors and plain values, and refuses everything else."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, names: dict[str, str]) -> None:
        super().__init__(file)
        self.archive, self.names = archive, names

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return type("Module", (Module,), {"__qualname__": f"{module}.{name}"})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle" and name in LISTS:
            return list
        if (module, name) == ("torch.jit._pickle", "restore_type_tag"):
            return _untag
        raise pickle.UnpicklingError(f"{shorten(f'{module}.{name}')} is refused")

    def persistent_load(self, pid: Any) -> Tensor:
        """A flat tensor: ``pid`` is ("storage", its type, its file, a device, its length)."""
        _, dtype, key, _, count = pid
        content = self.archive.read(self.names[f"data/{key}"])
        if len(content) != count * dtype.itemsize:
            raise pickle.UnpicklingError(f"the tensor {shorten(key)} has another size than it says")
        return torch.frombuffer(bytearray(content), dtype=dtype) if count else torch.empty(0, dtype=dtype)


def _rebuild(flat: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    return torch.as_strided(flat, size, stride, offset)


def _untag(value: Any, _: Any) -> Any:
    return value
