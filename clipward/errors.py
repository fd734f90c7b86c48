"""The error that a person can mend, and what its line may echo."""

import reprlib
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

LIMIT = 80  # characters of what was given that a message repeats


class InputError(ValueError):
    """Bad input: one line that names the field, what was given and what is expected. The CLI prints it bare."""


def first_line(error: Exception) -> str:
    """What another library's error says first, cut to 100 characters, for a line of our own."""
    try:
        line = str(error).strip().partition("\n")[0].strip()
    except Exception:  # an error that can't be written
        line = ""
    return _cut("".join(each if each.isprintable() else "?" for each in line or type(error).__name__), 100)


def shorten(value: object) -> str:
    """Write what was given for a message: as Python writes it, on one line of at most 80 characters.

    Args:
        value: anything: a text of any length, a path, a deeply nested or faulty object.

    Returns:
        printable characters, with … for what is left out in the middle.
    """
    text = _SHORT.repr(str(value) if isinstance(value, PurePath) else value)
    return _cut(text if text.isprintable() else " ".join(ascii(text)[1:-1].split()), LIMIT)


def list_names(names: Iterable[Any], most: int = 6) -> str:
    """Join names for a message: ``a, b, c and 12 more``, each of at most 40 characters."""
    given = list(names)
    shown = ", ".join(
        _cut(shorten(name)[1:-1] if isinstance(name, str) else shorten(name), 40) for name in given[:most]
    )
    return f"{shown} and {len(given) - most} more" if len(given) > most else shown


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    tail = limit // 2
    return f"{text[: limit - tail - 1]}…{text[-tail:]}"


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.fillvalue = 2, LIMIT, LIMIT, "…"

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write whole numbers of thousands of digits, but for hexadecimal ones."""
        return _cut(str(x) if x.bit_length() < 1000 else hex(x), LIMIT)


_SHORT = _Short()
