"""The words that name attributes, and the sentences that ask for them."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from clipward.errors import InputError, list_names, shorten
from clipward.files import find_shipped, read_json
from clipward.texts import split_text
from clipward.values import fits
from clipward.yaml_files import read_yaml

Vocabulary = dict[str, dict[str, list[str]]]  # {attribute: {value: [words that name it in a text]}}
Prompts = dict[str, dict[str, str]]  # {attribute: {value: a sentence that is true of it}}


def find_attributes(vocabulary: Vocabulary, text: str) -> dict[str, str]:
    """What a text names: ``"an old man"`` gives ``{"gender": "man", "age": "old"}``."""
    found: dict[str, str] = {}
    for attribute, values in vocabulary.items():
        hits = [
            (len(words), value)
            for value, names in values.items()
            for words in names
            if re.search(rf"\b{re.escape(words)}\b", text, re.IGNORECASE)
        ]
        if hits:
            found[attribute] = max(hits)[1]  # the longest: "no glasses" before "glasses"
    return found


def find_allowed(vocabulary: Vocabulary, text: str) -> dict[str, set[str]]:
    """The values that are right, for each attribute that a part of a text names: not those of a negative part."""
    allowed: dict[str, set[str]] = {}
    for part in split_text(text):
        for attribute, value in find_attributes(vocabulary, part.text).items():
            right = {value} if part.weight > 0 else vocabulary[attribute].keys() - {value}
            allowed[attribute] = allowed.get(attribute, right) & right
    return allowed


def check_attributes(vocabulary: Vocabulary, text: str, role: str) -> None:
    """Raise :class:`InputError` where a text names nothing of the vocabulary."""
    if not find_allowed(vocabulary, text):
        known = ", ".join(vocabulary)
        raise InputError(f"text: the {role} finds nothing to look for in {shorten(text)}; it knows of {known}")


def check_vocabulary(vocabulary: Any) -> None:
    """Raise :class:`TypeError` where it is no :data:`Vocabulary`."""
    if not fits(Vocabulary, vocabulary) or not vocabulary or not all(vocabulary.values()):
        raise TypeError("attributes have values, which have lists of words")
    if not all(all(words) for values in vocabulary.values() for words in values.values()):
        raise TypeError("an empty word")


@runtime_checkable
class HasLabels(Protocol):
    """Data whose pictures may have labels: the values of each attribute, in their order, or None without any."""

    @property
    def attributes(self) -> dict[str, list[str]] | None: ...


def find_labels(data: Any) -> dict[str, list[str]] | None:
    """The values of each attribute of the labels, in their order; None without any."""
    return data.attributes if isinstance(data, HasLabels) else None


def check_labels_of(data: Any, vocabulary: Mapping[str, Iterable[str]], setting: str) -> None:
    """Check that labels are those of a vocabulary, since a network knows attributes and values by their places alone.

    Args:
        data: where it says nothing of its labels, nothing is checked.
        vocabulary: the values of each attribute; the labels may have further attributes after these.
        setting: which holds the vocabulary, for errors.

    Raises:
        InputError: where attributes or values are missing, or have another order.
    """
    if not isinstance(data, HasLabels) or not vocabulary:
        return
    wanted = {name: list(values) for name, values in vocabulary.items()}
    if data.attributes is None:
        raise InputError(f"data.labels: got none, expected labels of {list_names(wanted)}, as in {setting}")
    names = list(data.attributes)
    if names[: len(wanted)] != list(wanted):
        raise InputError(f"data.labels: got {list_names(names)}, expected {list_names(wanted)}, as in {setting}")
    for name, values in wanted.items():
        if data.attributes[name] != values:
            given, expected = list_names(data.attributes[name]), list_names(values)
            raise InputError(f"data.labels: got {given} for {name}, expected {expected}, in the order of {setting}")


def load_vocabulary(source: str | Path, field: str = "vocabulary") -> tuple[Vocabulary, Prompts]:
    """Read ``{attribute: {value: {"prompt": a sentence, "words": [words that name it]}}}``.

    Args:
        source: a YAML or JSON file, or the name of one that ships in ``configs/vocabularies``, such as ``faces``.
        field: the setting that names it, for errors.

    Raises:
        InputError: where there is no such file, or it holds something else.
    """
    path = find_shipped(source, "vocabularies", field)
    entries = read_json(path, field) if path.suffix == ".json" else read_yaml(path, field)
    try:
        prompts = {name: {v: e["prompt"] for v, e in values.items()} for name, values in entries.items()}
        vocabulary = {name: {v: e["words"] for v, e in values.items()} for name, values in entries.items()}
        check_vocabulary(vocabulary)
        if not fits(Prompts, prompts) or not all(all(map(str.strip, each.values())) for each in prompts.values()):
            raise TypeError("prompts are sentences")
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{field}: {path} can't be read ({type(error).__name__}); expected "
            '{"gender": {"man": {"prompt": "a man", "words": ["man", "boy"]}, …}, …}'
        ) from error
    return vocabulary, prompts
