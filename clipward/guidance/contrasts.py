"""Contrast captions: what a text says with one of its phrases exchanged for another that excludes it."""

import re
from collections.abc import Sequence
from functools import partial

from clipward.errors import InputError, shorten
from clipward.files import find_shipped
from clipward.yaml_files import read_yaml


def contrast_captions(text: str, phrases: Sequence[str]) -> list[str]:
    """What a text says with one of ``phrases`` exchanged for each of the others; nothing where it has none of them.

    Of several it is the longest: in "a man with no glasses" the "no glasses", and not the "glasses". A phrase may have
    several spellings, as in "gray hair / grey hair": each is found, and the first is put in.
    """
    spellings = {spelling: phrase for phrase in phrases for spelling in split_spellings(phrase)}
    for spelling in sorted(spellings, key=len, reverse=True):
        pattern = re.compile(rf"\b(?:(a)n? )?{re.escape(spelling)}\b", re.IGNORECASE)
        if pattern.search(text):
            others = [split_spellings(other)[0] for other in phrases if other != spellings[spelling]]
            return [pattern.sub(partial(_exchanged, other), text) for other in others]
    return []


def split_spellings(phrase: str) -> list[str]:
    """``"gray hair / grey hair"`` -> ``["gray hair", "grey hair"]``."""
    return [spelling.strip() for spelling in phrase.split(" / ")]


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
        texts = [text.lower() for each in phrases if isinstance(each, str) for text in split_spellings(each)]
        if len(phrases) < 2 or len(texts) < len(phrases) or len(set(texts)) < len(texts) or "" in texts:
            raise InputError(
                f"contrasts: got {shorten(group)}, expected two or more different phrases that exclude each other"
            )
    return [list(group) for group in groups]
