"""The grammar of a text: one or more parts, each with a weight, as in ``an old man:2 | a beard:-1``."""

import re
from dataclasses import dataclass
from typing import Any

from clipward.errors import InputError, shorten

TOKEN = re.compile(r"\\[|:\\]|.", re.DOTALL)  # an escaped character, or any character
MOST_PARTS = 100
MOST_PART_WEIGHT = 1e6  # the least is its inverse
MARKS = re.compile(r"[|:\\]")  # without any of these a text is one sentence
# control characters but white space, a byte order mark, and halves of characters, which no file can hold
FAULTY = re.compile("[\x00-\x08\x0e-\x1f\x7f\ufeff\ud800-\udfff]")
NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)")


@dataclass(frozen=True)
class Part:
    """A sentence, and how strongly it guides beside the others. A negative weight guides away from it."""

    text: str
    weight: float = 1.0


def check_text(value: Any) -> str:
    """A text that any file can hold.

    Raises:
        InputError: for what is no text, or has control characters, a byte order mark or half a character (a surrogate),
            and for parts and weights that can't be read.
    """
    if not isinstance(value, str):
        raise InputError(f"text: got {shorten(value)}, expected a sentence")
    found = FAULTY.search(value)
    if found:
        raise InputError(f"text: got {shorten(value)}, expected one without the character U+{ord(found.group()):04X}")
    split_text(value)
    return str(value)


def split_text(text: str) -> list[Part]:
    r"""Split a text at each ``|`` into parts, and take the weight from the end of each.

    A weight is a colon and a number, with no space between. A colon right after a digit has no weight behind it, so
    ``ratio 3:2`` and ``at 12:30`` are taken whole; ``Blade Runner 2049 :2`` has the weight 2. ``\|``, ``\:`` and ``\\``
    stand for the characters themselves. A part without a weight has the weight 1, and a text of one part without a
    weight is taken as it is.

    Returns:
        the parts; none of an empty text.

    Raises:
        InputError: where one of several parts is empty, a weight is 0, too small or too large, or there are more than
            100 parts.
    """
    if not text.strip():
        return []
    if is_one_sentence(text):
        return [Part(text)]
    parts: list[list[str]] = [[]]
    for token in TOKEN.findall(text):
        if token == "|":
            parts.append([])
        else:
            parts[-1].append(token)
    if len(parts) > MOST_PARTS:
        raise InputError(f"text: {shorten(text)} has {len(parts)} parts, expected at most {MOST_PARTS}")
    return [_read(tokens, number, len(parts), text) for number, tokens in enumerate(parts, start=1)]


def is_one_sentence(text: str) -> bool:
    """Whether a text certainly has no parts, weights or escaped characters."""
    return MARKS.search(text) is None


def _read(tokens: list[str], number: int, count: int, text: str) -> Part:
    sentence, weight = tokens, 1.0
    colon = max((i for i, token in enumerate(tokens) if token == ":"), default=None)
    if colon is not None:
        tail, follows_digit = "".join(tokens[colon + 1 :]).rstrip(), colon > 0 and tokens[colon - 1] in "0123456789"
        if NUMBER.fullmatch(tail) and not follows_digit:
            sentence, weight = tokens[:colon], float(tail)
    words = "".join(token[-1] for token in sentence)
    where = shorten(text) if count == 1 else f"part {number} of {shorten(text)}"
    if not words.strip():
        raise InputError(rf"text: {where} is empty, expected a sentence; write \| and \: for the characters themselves")
    if not 1 / MOST_PART_WEIGHT <= abs(weight) <= MOST_PART_WEIGHT:
        raise InputError(
            f"text: {where} has the weight {weight:g}, expected a size from 1e-6 to 1e6; leave the part out for 0"
        )
    return Part(words if sentence is tokens and count == 1 else words.strip(), weight)


def split_negative(text: str | None) -> list[Part]:
    """The parts of a negative text, whose weights guide away.

    Raises:
        InputError: as :func:`split_text` does, and for a weight below 0.
    """
    if text and not text.strip():
        raise InputError(f"negative_text: got {shorten(text)}, expected a phrase; leave it out for none")
    try:
        parts = split_text(check_text(text or ""))
    except InputError as error:
        raise InputError(f"negative_{error}") from error
    below = next((part for part in parts if part.weight < 0), None)
    if below is not None:
        raise InputError(f"negative_text: {shorten(below.text)} has the weight {below.weight:g}, expected one above 0")
    return [Part(part.text, -part.weight) for part in parts]
