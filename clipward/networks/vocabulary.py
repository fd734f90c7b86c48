"""The words that name attributes, and the sentences that ask for them."""

import re
from pathlib import Path

from clipward.errors import InputError
from clipward.files import find_shipped, read_json
from clipward.texts import split_text
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
            if re.search(rf"\b{re.escape(words)}\b", text.lower())
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
        raise InputError(f"text: the {role} finds nothing to look for in {text!r}; it knows of {known}")


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
        prompts = {name: {v: str(e["prompt"]) for v, e in values.items()} for name, values in entries.items()}
        vocabulary = {
            name: {v: [str(w) for w in e["words"]] for v, e in values.items()} for name, values in entries.items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{field}: {path} can't be read ({type(error).__name__}); expected "
            '{"gender": {"man": {"prompt": "a man", "words": ["man", "boy"]}, …}, …}'
        ) from error
    return vocabulary, prompts
