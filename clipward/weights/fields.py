"""Values out of a header or JSON, held to the types of a dataclass's fields."""

import math
from collections.abc import Collection
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from clipward.errors import InputError, shorten

Parsed = TypeVar("Parsed")
ONE = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    dict: "a dictionary",
    NoneType: "null",
}
MANY = {int: "whole numbers", float: "numbers", str: "texts"}


def parse_dataclass(kind: type[Parsed], values: Any, name: str, optional: Collection[str] = ()) -> Parsed:
    """Make a ``kind``, and the dataclasses that are its fields, of what JSON holds.

    Args:
        kind: a dataclass.
        values: its fields by name; lists stand for tuples.
        name: what messages call it.
        optional: names of fields that may be left out, for their defaults.

    Raises:
        InputError: where a field is missing, unknown or of another type.
    """
    if not isinstance(values, dict):
        raise InputError(f"weights: got {shorten(values)} for {name}, expected a dictionary")
    assert is_dataclass(kind)
    hints, known = get_type_hints(kind), [field.name for field in fields(kind)]
    unknown = next((key for key in values if key not in known), None)
    if unknown is not None:
        raise InputError(f"weights: got {shorten(unknown)} in {name}, which this version lacks; use a newer one")
    missing = next((key for key in known if key not in values and key not in optional), None)
    if missing is not None:
        raise InputError(f"weights: got no {name}.{missing}, expected {describe(hints[missing])}")
    return kind(**{key: parse(hints[key], value, f"{name}.{key}", optional) for key, value in values.items()})


def parse(kind: Any, value: Any, name: str, optional: Collection[str] = ()) -> Any:
    """``value`` as a field of the type ``kind`` holds it, where lists are tuples.

    Raises:
        InputError: where it is of another type.
    """
    if isinstance(kind, type) and is_dataclass(kind):
        return parse_dataclass(kind, value, name, optional)
    if not fits(kind, value):
        raise InputError(f"weights: got {shorten(value)} for {name}, expected {describe(kind)}")
    return tuple(value) if isinstance(value, list) else value


def fits(kind: Any, value: Any) -> bool:
    """Whether ``value`` is of the type ``kind``; a whole number is a number too, true and false are neither."""
    origin, options = get_origin(kind), get_args(kind)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in options)
    if origin in (Union, UnionType):
        return any(fits(option, value) for option in options)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        kinds = options[:1] * len(value) if options[-1] is ... else options
        return len(kinds) == len(value) and all(map(fits, kinds, value))
    if kind is float:
        return type(value) is int or (type(value) is float and math.isfinite(value))
    return type(value) is kind


def describe(kind: Any) -> str:
    """The type ``kind`` in words."""
    origin, options = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return "a dictionary"
    if origin is Literal:
        names = [str(option) for option in options]
        return " or ".join([", ".join(names[:-1]), names[-1]])
    if origin in (Union, UnionType):
        return " or ".join(describe(option) for option in options)
    if origin is tuple:
        return f"a list of {'' if options[-1] is ... else f'{len(options)} '}{MANY[options[0]]}"
    return ONE[kind]
