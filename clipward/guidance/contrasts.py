"""Contrast captions: what a text says with one of its phrases exchanged for another that excludes it."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import yaml

from clipward.errors import InputError, first_line
from clipward.files import CONFIGS


def contrast_captions(text: str, phrases: Sequence[str]) -> list[str]:
    """What a text says with one of ``phrases`` exchanged for each of the others; nothing where it has none of them.

    Of several it is the longest: in "a man with no glasses" the "no glasses", and not the "glasses".
    """
    for phrase in sorted(phrases, key=len, reverse=True):
        pattern = re.compile(rf"\b(?:(a)n? )?{re.escape(phrase)}\b", re.IGNORECASE)
        if pattern.search(text):
            others = [other for other in phrases if other.lower() != phrase.lower()]
            return [pattern.sub(partial(_exchanged, other), text) for other in others]
    return []


def _exchanged(other: str, match: re.Match) -> str:
    if match[1] is None:
        return other
    return f"{match[1]}{'n' if other[0].lower() in 'aeiou' else ''} {other}"


def load_contrasts(source: str | Sequence[Sequence[str]]) -> list[list[str]]:
    """Groups of phrases that exclude each other.

    Args:
        source: the groups themselves, a YAML file of them, or the name of a set that ships in ``configs/contrasts``,
            such as ``faces``.

    Raises:
        InputError: where there is no such file, or a group has fewer than two phrases or one of them twice.
    """
    if isinstance(source, str):
        path = Path(source)
        if not path.is_file():
            path = CONFIGS / "contrasts" / f"{source}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
            raise InputError(f"contrasts: got {source!r}, expected groups of phrases, a YAML file or one of {known}")
        try:
            groups = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InputError(f"contrasts: {path} can't be read ({first_line(error)})") from error
    else:
        groups = source
    if not isinstance(groups, Sequence) or isinstance(groups, str):
        raise InputError("contrasts: expected a list of groups, such as [[old, young], [man, woman]]")
    for group in groups:
        phrases = [] if isinstance(group, str) or not isinstance(group, Sequence) else [str(each) for each in group]
        if len({phrase.lower() for phrase in phrases if phrase.strip()}) < max(2, len(phrases)):
            raise InputError(f"contrasts: got {group}, expected two or more different phrases that exclude each other")
    return [[str(phrase) for phrase in group] for group in groups]
