"""Values out of a header or JSON, held to the types of a dataclass's fields."""

from collections.abc import Collection
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from clipward.errors import InputError, shorten
from clipward.values import describe, fits

Parsed = TypeVar("Parsed")


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
