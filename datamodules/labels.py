"""Labels of pictures: which value each attribute has, by columns that say yes or no."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clipward.datamodules.sources import find_column
from clipward.errors import InputError, shorten

Labels = Mapping[str, Mapping[str, str | None]]  # {attribute: {value: a column, "not" and a column, or None}}
UNKNOWN = -1


def read_labels(rows: Any, labels: Labels) -> Tensor:
    """Read the labels of all rows of a ``datasets.Dataset``.

    Args:
        rows: with columns of booleans or numbers. A number above 0 is true, so that 1 and 0 serve, and 1 and −1.
        labels: for each attribute its values, and for each value the column that is true of it, ``not`` and the column
            that is false, or None for a value that no row has.

    Returns:
        (N, attributes), int64: the position of the one value that a row has; −1 where it has none, or several.

    Raises:
        InputError: for a column that is missing or says neither yes nor no, and an attribute without two values.
    """
    check_label_columns(rows, labels)
    return choose_labels(rows, labels, len(rows))


def choose_labels(columns: Mapping[str, Sequence[Any]], labels: Labels, count: int) -> Tensor:
    """(N, attributes) of :func:`read_labels`, from the columns of ``count`` rows."""
    attributes = [_choose([_holds(columns, rule, count) for rule in values.values()]) for values in labels.values()]
    return torch.stack(attributes, dim=1)


def list_label_columns(labels: Labels) -> list[str]:
    """The columns that labels are read from, each once."""
    rules = filter(None, (rule for values in labels.values() for rule in values.values()))
    return list(dict.fromkeys(_split(rule)[0] for rule in rules))


def check_label_columns(rows: Any, labels: Labels) -> None:
    """Raise :class:`InputError` where rows don't have the columns of labels, or they say neither yes nor no."""
    check_labels(labels)
    for column in list_label_columns(labels):
        kind = find_column(rows, "labels", column)
        if not kind.startswith(("bool", "int", "uint", "float")):
            raise InputError(
                f"data.labels: got {shorten(column)}, a column of {shorten(kind)}, expected booleans or numbers"
            )


def check_classes(classes: str | None, labels: Labels | None) -> list[str] | None:
    """The names of the classes, which are the values of an attribute.

    Raises:
        InputError: where there is no such attribute.
    """
    if classes is None:
        return None
    if classes not in (labels or {}):
        raise InputError(f"data.classes: got {shorten(classes)}, expected an attribute of data.labels")
    return list((labels or {})[classes])


def check_labels(labels: Labels) -> None:
    """Raise :class:`InputError` where an attribute has fewer than two values."""
    few = next((attribute for attribute, values in labels.items() if len(values) < 2), None)
    if few is not None or not labels:
        raise InputError(f"data.labels: got {shorten(dict(labels))}, expected two values or more for each attribute")


def _split(rule: str) -> tuple[str, bool]:
    """``"not male"`` -> the column, and what it has to be."""
    column = rule.removeprefix("not ").strip()
    return column, column == rule.strip()


def _holds(columns: Mapping[str, Sequence[Any]], rule: str | None, count: int) -> Tensor:
    """(N,): whether ``rule`` is true of each row; never of a row that has no value."""
    if rule is None:
        return torch.zeros(count, dtype=torch.bool)
    column, wanted = _split(rule)
    return torch.tensor([value is not None and value == value and (value > 0) == wanted for value in columns[column]])


def _choose(holds: Sequence[Tensor]) -> Tensor:
    """The position of the only value that is true of each row."""
    true = torch.stack(list(holds))  # (values, N)
    return torch.where(true.sum(dim=0) == 1, true.int().argmax(dim=0), UNKNOWN)
