"""Which values a setting may have, by its type, and how a message says that."""

import math
from dataclasses import is_dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from clipward.errors import InputError, shorten

ClassLabel = str | int | None  # a name or a number; None is that of the settings
MOST_SEED = 2**63 - 1  # parquet has no larger whole numbers
LEAST_TOO_LARGE = 10**308  # whole numbers that no float holds
MOST_WEIGHT = 1e38  # float32 ends at 3.4e38
ONE = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    dict: "a dictionary",
    NoneType: "null",
}
MANY = {int: "whole numbers", float: "numbers", str: "texts"}


def check_types(config: Any, name: str) -> None:
    """Check the fields of a dataclass by their types alone, which says nothing of their range.

    Args:
        config: a dataclass.
        name: what messages call it, or nothing.

    Raises:
        InputError: where a field has another type, by its name.
    """
    for field, kind in get_type_hints(type(config)).items():
        value = getattr(config, field)
        if not fits(kind, value, any_value=True):
            raise InputError(f"{name}.{field}: got {shorten(value)}, expected {describe(kind)}")


def fits(kind: Any, value: Any, any_value: bool = False) -> bool:
    """Whether ``value`` is of the type ``kind``; a whole number is a number too, true and false are neither.

    With ``any_value``, a number may be infinite or NaN, and a literal any of its type.
    """
    origin, options = get_origin(kind), get_args(kind)
    if origin is Literal:
        return any(type(value) is type(option) and (any_value or value == option) for option in options)
    if origin in (Union, UnionType):
        return any(fits(option, value, any_value) for option in options)
    if origin is list:
        return isinstance(value, list | tuple) and all(fits(options[0], each, any_value) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(kind, each, any_value) for pair in value.items() for kind, each in zip(options, pair, strict=True)
        )
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        kinds = options[:1] * len(value) if options[-1] is ... else options
        return len(kinds) == len(value) and all(
            fits(each, one, any_value) for each, one in zip(kinds, value, strict=True)
        )
    if kind is float:
        return (type(value) is int and abs(value) < LEAST_TOO_LARGE) or (
            type(value) is float and (any_value or math.isfinite(value))
        )
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
    if origin in (tuple, list):
        count = "" if origin is list or options[-1] is ... else f"{len(options)} "
        return f"a list of {count}{MANY.get(options[0], 'lists')}"
    return ONE[kind]


def check_label(value: Any) -> ClassLabel:
    """The name or the number of a class, or None; which classes there are, the model knows.

    Raises:
        InputError: for what is neither.
    """
    if value is None or isinstance(value, str):
        return value
    if not _is_whole(value):
        raise InputError(f"class_label: got {shorten(value)}, expected the name or the number of a class")
    return int(value)


def _is_whole(value: Any) -> bool:
    whole = isinstance(value, Integral) or (isinstance(value, float) and value.is_integer() and value < 2**53)
    return whole and not isinstance(value, bool)


def check_seed(value: Any) -> int:
    """A seed; whole numbers that a table keeps as 3.0 are taken too.

    Raises:
        InputError: for what is no whole number from 0 to 2**63 − 1.
    """
    if type(value) is int and 0 <= value <= MOST_SEED:
        return value
    if not _is_whole(value) or not 0 <= value <= MOST_SEED:
        raise InputError(f"seed: got {shorten(value)}, expected a whole number from 0 to 2**63 - 1")
    return int(value)


def check_weight(value: Any) -> float:
    """A guidance weight.

    Raises:
        InputError: for what is no number of float32.
    """
    if type(value) is float and abs(value) <= MOST_WEIGHT:
        return value
    if is_number(value):
        return float(value)
    raise InputError(f"guidance_weight: got {shorten(value)}, expected a finite number from -1e38 to 1e38")


def is_number(value: Any) -> bool:
    """Whether it is a finite number of float32; a whole number may be too large for that, and true is none."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    return real and bool(abs(value) <= MOST_WEIGHT)
