"""Who says whether a picture shows what its text names: a classifier, or another CLIP's zero-shot answers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from diffusion.classifier import Vocabulary, load_classifier, named
from diffusion.clip import CONFIG_FILE, Clip
from errors import InputError

JUDGE_FILE = "judge.json"  # in a CLIP's folder: {attribute: {value: {"prompt": a sentence, "words": [that name it]}}}


class Judge(Protocol):
    """Answers for each attribute of ``vocabulary`` by logits (B, values)."""

    vocabulary: Vocabulary

    def __call__(self, image: Tensor) -> Mapping[str, Tensor]: ...


class ClipJudge:
    """A CLIP that is asked which of an attribute's sentences a picture is nearest to.

    Args:
        clip: one that does not guide.
        sentences: ``{attribute: {value: sentence}}``.
        vocabulary: as of :class:`diffusion.classifier.Classifier`.
    """

    def __init__(self, clip: Clip, sentences: Mapping[str, Mapping[str, str]], vocabulary: Vocabulary) -> None:
        self.clip, self.vocabulary = clip, vocabulary
        self.answers = {name: clip.encode_text(list(values.values())) for name, values in sentences.items()}

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        features = self.clip.to(image.device).encode_image(image)
        return {name: features @ answers.to(image.device).T for name, answers in self.answers.items()}


def load_judge(path: Path) -> Judge:
    """A classifier's safetensors, or a CLIP's folder with ``judge.json``.

    Raises:
        InputError: where it is neither.
    """
    if not path.is_dir():
        return load_classifier(path)
    if not (path / JUDGE_FILE).is_file() or not (path / CONFIG_FILE).is_file():
        raise InputError(f"judge: {path} lacks {JUDGE_FILE} or {CONFIG_FILE}; a CLIP's folder with both would do")
    try:
        entries = json.loads((path / JUDGE_FILE).read_text())
        sentences = {name: {v: e["prompt"] for v, e in values.items()} for name, values in entries.items()}
        vocabulary = {name: {v: e["words"] for v, e in values.items()} for name, values in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"judge: {path / JUDGE_FILE} can't be read ({error!r}); "
            '{"gender": {"man": {"prompt": "a man", "words": ["man", "boy"]}, …}} would do'
        ) from error
    return ClipJudge(Clip.load(str(path)), sentences, vocabulary)


def seen(judge: Judge, image: Tensor) -> list[dict[str, str]]:
    """What a judge sees in each picture: ``[{"gender": "man", "hair": "grey"}, …]``."""
    values = {name: list(words) for name, words in judge.vocabulary.items()}
    with torch.no_grad():
        answers = {name: logits.argmax(dim=1).tolist() for name, logits in judge(image.float()).items()}
    return [{name: values[name][places[i]] for name, places in answers.items()} for i in range(len(image))]


def obeys(vocabulary: Vocabulary, saw: Mapping[str, str], text: str) -> dict[str, bool]:
    """For each attribute that a text names, whether it is what was seen: ``{"gender": True, "hair": False}``."""
    return {name: saw[name] == value for name, value in named(vocabulary, text).items()}
