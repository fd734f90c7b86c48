"""YAML from a person: read without surprises, or refused in one line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from clipward.errors import InputError, first_line, shorten

MAX_BYTES = 1_000_000
MAX_VALUES = 100_000  # after aliases have been replaced by what they stand for
MAX_DEPTH = 100
TOO_LONG = f"more than {MAX_BYTES // 1_000_000} MB, expected less"
TOO_LARGE = re.compile(r"[-+]?[0-9]{309,}")  # a number that no float holds
BASE_8, BASE_60 = r"0[0-7_]+", r"([1-9][0-9_]*(:[0-5]?[0-9])+|[0-9][0-9_]*(:[0-5]?[0-9])+\.[0-9_]*)"
OTHER_BASE = re.compile(f"[-+]?({BASE_8}|{BASE_60})")  # as YAML 1.1 reads a number
Loader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class UnsafeYAML(yaml.YAMLError):
    """YAML that says something twice, grows too large, or has a value that is not what it seems."""


@dataclass
class _Collection:
    """A mapping or a list that is being read."""

    is_mapping: bool
    anchor: str | None
    size: int = 1
    key: str | None = None  # whose value comes next
    keys: set[str] = field(default_factory=set)


def check_yaml(text: str) -> None:
    """Raise :class:`UnsafeYAML` where a key stands twice, a number has another base, or the text is too large or deep.

    It reads the text as a stream and counts, so that aliases of aliases cost nothing.
    """
    if len(text) > MAX_BYTES:
        raise UnsafeYAML(TOO_LONG)
    sizes: dict[str, int] = {}
    open_collections: list[_Collection] = []
    for event in yaml.parse(text, Loader=Loader):
        anchor, value = getattr(event, "anchor", None), getattr(event, "value", None)
        if isinstance(event, yaml.CollectionStartEvent):
            open_collections.append(_Collection(isinstance(event, yaml.MappingStartEvent), anchor))
            if len(open_collections) > MAX_DEPTH:
                raise UnsafeYAML(f"more than {MAX_DEPTH} levels, expected less")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            ended = open_collections.pop()
            anchor, size = ended.anchor, ended.size
        elif isinstance(event, yaml.AliasEvent):
            size, anchor = sizes.get(anchor or "", MAX_VALUES + 1), None  # unknown: it is part of itself
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            if not event.style and event.tag is None and OTHER_BASE.fullmatch(event.value):
                raise UnsafeYAML(
                    f"{shorten(event.value)}, which YAML reads in base 8 or 60; expected a plain number, or quotes"
                )
            if not event.style and TOO_LARGE.fullmatch(event.value):
                raise UnsafeYAML(f"{shorten(event.value)}, expected a number below 1e308")
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        if open_collections:
            _add(open_collections, size, value, event.start_mark.line + 1)


def _add(collections: list[_Collection], size: int, value: str | None, line: int) -> None:
    """Count a value in the innermost collection; in a mapping, every other value is a key."""
    inner = collections[-1]
    inner.size += size
    if inner.size > MAX_VALUES:
        raise UnsafeYAML(f"more than {MAX_VALUES} values once its aliases are replaced, expected less")
    if not inner.is_mapping:
        return
    if inner.key is not None:
        inner.key = None
        return
    inner.key = "?" if value is None else value
    if value in inner.keys:
        path = ".".join(each.key for each in collections if each.key)
        raise UnsafeYAML(f"{path} twice (line {line}), expected it once")
    inner.keys.add(inner.key)


def load_yaml(text: str) -> Any:
    """The value of YAML, once :func:`check_yaml` has passed it."""
    check_yaml(text)
    with name_faulty_tags():
        return yaml.load(text, Loader=Loader)


@contextmanager
def name_faulty_tags() -> Iterator[None]:
    """Raise :class:`UnsafeYAML` for a value that is not what its tag says, such as ``!!bool x``."""
    try:
        yield
    except (AttributeError, KeyError, TypeError) as error:
        raise UnsafeYAML("a value that is not what its tag says") from error


def read_yaml(path: Path, field: str) -> Any:
    """The value of a YAML file, which may come from anyone.

    Args:
        path: of the file.
        field: the setting that names it, for errors.

    Raises:
        InputError: where it can't be read, or is YAML that :func:`check_yaml` refuses.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UnsafeYAML(TOO_LONG)
        return load_yaml(path.read_text(encoding="utf-8"))
    except UnsafeYAML as error:
        raise InputError(f"{field}: {path} has {error}") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or first_line(error)
        where = "" if mark is None else f" in line {mark.line + 1}"
        raise InputError(f"{field}: {path} is no YAML ({reason}{where})") from error


def read_mapping(path: Path, field: str = "config") -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        InputError: where it is no mapping, or :func:`read_yaml` refuses it.
    """
    content = read_yaml(path, field)
    if not isinstance(content, dict):
        raise InputError(f"{field}: {path} has no settings, expected lines such as `skip_steps: 50`")
    for key in _keys(content):
        if not isinstance(key, str):
            raise InputError(f"{field}: {path} has the key {shorten(key)}, expected names of settings")
    return content


def _keys(content: Any) -> Iterator[Any]:
    """All keys of mappings inside of mappings."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield key
            yield from _keys(value)
