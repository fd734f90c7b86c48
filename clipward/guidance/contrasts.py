"""Contrast captions: what a text says with one of its phrases exchanged for another that excludes it."""

import re
from collections.abc import Sequence
from functools import partial

from clipward.errors import InputError, shorten
from clipward.files import find_shipped
from clipward.yaml_files import read_yaml


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
        groups = read_yaml(
            find_shipped(source, "contrasts", "contrasts", "groups of phrases, a YAML file"), "contrasts"
        )
    else:
        groups = source
    if not isinstance(groups, Sequence) or isinstance(groups, str):
        raise InputError(f"contrasts: got {shorten(groups)}, expected groups such as [[old, young], [man, woman]]")
    for group in groups:
        phrases = list(group) if isinstance(group, Sequence) and not isinstance(group, str) else []
        texts = {each.strip().lower() for each in phrases if isinstance(each, str) and each.strip()}
        if len(texts) < max(2, len(phrases)):
            raise InputError(
                f"contrasts: got {shorten(group)}, expected two or more different phrases that exclude each other"
            )
    return [list(group) for group in groups]
