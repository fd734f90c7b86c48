"""A request: what one picture is made of, and which values are ones."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from clipward.editing import EDIT_FIELDS, Edit, has_picture
from clipward.errors import InputError, list_names, shorten
from clipward.texts import check_text
from clipward.values import ClassLabel, check_label, check_seed, check_weight

FIELDS = ("text", "seed", "guidance_weight", "class_label", *EDIT_FIELDS)


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
    class_label: ClassLabel = None

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
    if guidance_weight and not text.strip() and not has_picture(edit):
        raise InputError(
            f"text: got {shorten(text)}, expected a sentence; use guidance_weight 0 for an unguided picture"
        )
    return text if text.strip() else "", seed, guidance_weight


def check_columns(names: Iterable[Any]) -> None:
    """Raise :class:`InputError` where a row or a table of these keys is no request."""
    given = list(names)
    unknown = [name for name in given if name not in FIELDS]
    if unknown:
        raise InputError(f"got {list_names(unknown)}, expected no other keys than {', '.join(FIELDS)}")
    if "text" not in given and "image_prompt" not in given:
        raise InputError(f"got {list_names(given) or 'no key'}, expected a text")
