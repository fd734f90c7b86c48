"""A request: what one picture is made of, and which values are ones."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from clipward.editing import EDIT_FIELDS, Edit
from clipward.errors import InputError, list_names, shorten
from clipward.texts import split_text

FIELDS = ("text", "seed", "guidance_weight", "class_label", *EDIT_FIELDS)
MOST_SEED = 2**63 - 1  # parquet has no larger whole numbers
MOST_WEIGHT = 1e38  # float32 ends at 3.4e38
# Control characters but white space, a byte order mark, and halves of characters, which no file can hold.
FAULTY = re.compile("[\x00-\x08\x0e-\x1f\x7f\ufeff\ud800-\udfff]")


@dataclass(frozen=True)
class Request:
    """One picture to make. It depends on what stands here and on the weights, and on nothing beside it.

    Args:
        index: its number.
        text: sentences that guide, as :func:`clipward.texts.split_text` reads them; it may be empty where the weight
            is 0.
        seed: from 0 to 2**63 − 1.
        guidance_weight: a finite number; 0 is unguided.
        edit: the pictures that it is made from.
        class_label: the name or the number of its class, for a model of classes; None is that of the run.

    Raises:
        InputError: for anything else.
    """

    index: int
    text: str
    seed: int
    guidance_weight: float
    edit: Edit | None = None
    class_label: str | int | None = None

    def __post_init__(self) -> None:
        found = check_request(self.text, self.seed, self.guidance_weight, self.edit)
        for name, value in zip(("text", "seed", "guidance_weight"), found, strict=True):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "class_label", check_label(self.class_label))


def check_request(text: Any, seed: Any, guidance_weight: Any, edit: Edit | None = None) -> tuple[str, int, float]:
    """The values of a :class:`Request`.

    Raises:
        InputError: for any that it can't have.
    """
    text, seed, guidance_weight = check_text(text), check_seed(seed), check_weight(guidance_weight)
    like_a_picture = edit is not None and edit.image_prompt is not None
    if guidance_weight and not text.strip() and not like_a_picture:
        raise InputError(
            f"text: got {shorten(text)}, expected a sentence; use guidance_weight 0 for an unguided picture"
        )
    return text, seed, guidance_weight


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


def check_label(value: Any) -> str | int | None:
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
    if isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= MOST_WEIGHT:
        return float(value)
    raise InputError(f"guidance_weight: got {shorten(value)}, expected a finite number from -1e38 to 1e38")


def check_columns(names: Iterable[Any]) -> None:
    """Raise :class:`InputError` where a row or a table of these keys is no request."""
    given = list(names)
    unknown = [name for name in given if name not in FIELDS]
    if unknown:
        raise InputError(f"got {list_names(unknown)}, expected no other keys than {', '.join(FIELDS)}")
    if "text" not in given and "image_prompt" not in given:
        raise InputError(f"got {list_names(given) or 'no key'}, expected a text")
