"""Contrast captions: what a text says with one of its phrases exchanged for another that excludes it."""

import re
from collections.abc import Sequence
from functools import partial


def opposed(text: str, phrases: Sequence[str]) -> list[str]:
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
