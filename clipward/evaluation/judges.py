"""Judges: networks that check whether a picture shows what its text names. They never guide."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from clipward.errors import InputError, shorten
from clipward.evaluation.cost import Cost
from clipward.evaluation.features import load_extractor
from clipward.evaluation.judgements import Judgement
from clipward.files import locate
from clipward.networks.classifier import Classifier, load_classifier
from clipward.networks.clip import CONFIG_FILE, Clip, text_cosines
from clipward.networks.vocabulary import (
    Prompts,
    Vocabulary,
    check_attributes,
    check_labels_of,
    find_allowed,
    find_labels,
    load_vocabulary,
)
from clipward.texts import split_text

JUDGE_FILE = "judge.json"  # in a CLIP's folder: {attribute: {value: {"prompt": a sentence, "words": [that name it]}}}


class Judge(Protocol):
    """A network that sees the attributes of a vocabulary in pictures."""

    vocabulary: Vocabulary

    def __call__(self, image: Tensor) -> Mapping[str, Tensor]:
        """(B, C, H, W) in [-1, 1] -> logits (B, values) of each attribute."""
        ...

    def features(self, image: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, features), by which sets of pictures are compared."""
        ...

    def to(self, device: torch.device) -> Any:
        """Move the weights."""
        ...


class ClipJudge:
    """A CLIP that says, for each attribute, which value's sentence a picture is nearest to.

    Args:
        clip: one that does not guide.
        prompts: a sentence for each value of each attribute.
        vocabulary: the words that name each value in a text.
    """

    def __init__(self, clip: Clip, prompts: Prompts, vocabulary: Vocabulary) -> None:
        self.clip, self.vocabulary = clip, vocabulary
        self._sentences = {name: clip.encode_text(list(values.values())) for name, values in prompts.items()}

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) in [-1, 1] -> the cosine of each picture and each value's sentence, (B, values)."""
        features = self.clip.to(image.device).encode_image(image)
        return {name: features @ sentences.to(image.device).T for name, sentences in self._sentences.items()}

    def features(self, image: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, D), with a root mean square of 1, for which the kernel of KID is made."""
        features = self.clip.encode_image(image)
        return features * features.shape[1] ** 0.5

    def to(self, device: torch.device) -> None:
        self.clip.to(device)


def load_judge(name: str | Path) -> Judge:
    """Load a judge from a classifier's safetensors, or from a CLIP's folder with a ``judge.json``.

    Args:
        name: a path, or ``clipward:`` and the name of a file or folder that ships.

    Raises:
        InputError: where it is neither.
    """
    path = locate(name)
    if not path.is_dir():
        classifier = load_classifier(name)
        if classifier.noise_aware:
            raise InputError(f"judge: got {path}, which looks at noisy pictures and guides; expected one of clean ones")
        return classifier
    missing = [file for file in (JUDGE_FILE, CONFIG_FILE) if not (path / file).is_file()]
    if missing:
        raise InputError(f"judge: got {path}, which has no {missing[0]}; expected a CLIP's folder with one")
    vocabulary, prompts = load_vocabulary(path / JUDGE_FILE, "judge")
    clip = Clip.load(str(name), "judge")
    try:
        return ClipJudge(clip, prompts, vocabulary)
    except InputError as error:  # a sentence that is too long
        raise InputError(f"judge: {shorten(path / JUDGE_FILE)} has a {error}") from error


class ScoresTexts(Protocol):
    """The CLIPs that guide; ``names`` is empty where there are none."""

    names: list[str]
    in_parts: bool  # whether processes share the image tower of one

    @property
    def clips(self) -> list[Clip]: ...

    def cosines(self, image: Tensor, text: Sequence[str]) -> Tensor:
        """(B, C, H, W) and T texts -> (B, T)."""
        ...


class Judges:
    """Several judges of the same pictures, and the features by which sets of pictures are compared.

    Args:
        paths: what :func:`load_judge` takes. The first judge decides prompt accuracy.
        texts: all texts that the pictures are drawn from. An unguided picture is judged by each of them.
        features: the network whose features FID, KID, precision and recall compare: ``judge``, the first classifier
            or, where there is none, the first CLIP; or what :func:`clipward.evaluation.features.load_extractor` takes.

    Raises:
        InputError: where there is no text, or a text names no attribute that a judge knows.
    """

    def __init__(self, paths: Sequence[str], texts: Iterable[str], features: str = "judge") -> None:
        self.judges = {path: load_judge(path) for path in paths}
        self.texts = list(dict.fromkeys(filter(None, texts)))
        if not self.texts:
            raise InputError("text: got none, expected a sentence that names what the judges look for")
        for text in self.texts:
            for judge in self.judges.values():
                check_attributes(judge.vocabulary, text, "judge")
        self.features_name = features
        self._extractor = None if features == "judge" else load_extractor(features)

    @property
    def vocabulary(self) -> Vocabulary:
        """The first judge's."""
        return next(iter(self.judges.values())).vocabulary

    @property
    def clip(self) -> Clip | None:
        """The first judge that is a CLIP."""
        return next((judge.clip for judge in self.judges.values() if isinstance(judge, ClipJudge)), None)

    def check_data(self, data: Any, setting: str) -> None:
        """Check that real pictures have the labels of the first judge, where they have any.

        Args:
            data: whose pictures generated ones are compared with.
            setting: which names the judges, for errors.

        Raises:
            InputError: where attributes or values are missing, or have another order.
        """
        if find_labels(data) is not None:
            check_labels_of(data, self.vocabulary, setting)

    def choose_clip(self, models: ScoresTexts | None) -> Clip | None:
        """Whose features CMMD compares: of the first judge that is a CLIP, else of the first CLIP that guides.

        A CLIP whose parts lie in several processes is left out, because one process alone compares.
        """
        if self.clip is not None or models is None or not models.names or models.in_parts:
            return self.clip
        return models.clips[0]

    def to(self, device: torch.device) -> None:
        """Move all networks."""
        for judge in self.judges.values():
            judge.to(device)
        if self._extractor is not None:
            self._extractor.to(device)

    def features(self, image: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, features), by which sets of pictures are compared."""
        if self._extractor is not None:
            return self._extractor(image)
        judges = list(self.judges.values())
        classifiers: list[Judge] = [judge for judge in judges if isinstance(judge, Classifier)]
        return (classifiers or judges)[0].features(image)

    @torch.no_grad()
    def judge_pictures(
        self, requests: Mapping[str, list], image: Tensor, cost: Cost, models: ScoresTexts
    ) -> list[Judgement]:
        """Judge a batch of pictures: each by its own text, an unguided one by every text.

        Args:
            requests: a list for each of ``index``, ``text``, ``seed``, ``guidance_weight`` and ``valid``. Pictures
                that are not valid are left out.
            image: (B, C, H, W) in [-1, 1].
            cost: what each of them costs.
            models: what guided them; its similarities are recorded beside the judges'.
        """
        image = image.float()
        self.to(image.device)
        predicted = {path: predict_attributes(judge, image) for path, judge in self.judges.items()}
        features = self.features(image).cpu()
        guiding = models.cosines(image, self.texts) if models.names else None
        clip, seeing = self.clip, self.choose_clip(models)
        clip_features = None if seeing is None else seeing.to(image.device).encode_image(image).cpu()
        held_out = None if clip is None else text_cosines(clip, image, [split_text(text) for text in self.texts])
        judgements = []
        for i in (i for i, valid in enumerate(requests["valid"]) if valid):
            for text in [requests["text"][i]] if requests["text"][i] else self.texts:
                column = self.texts.index(text)
                judgement = Judgement(
                    index=requests["index"][i],
                    text=text,
                    seed=requests["seed"][i],
                    guidance_weight=requests["guidance_weight"][i],
                    verdicts={
                        path: check_prompt(judge.vocabulary, predicted[path][i], text)
                        for path, judge in self.judges.items()
                    },
                    clip_similarity=None if guiding is None else guiding[i, column].item(),
                    held_out_similarity=None if held_out is None else held_out[i, column].item(),
                    features=features[i],
                    cost=cost,
                    clip_features=None if clip_features is None else clip_features[i],
                )
                judgements.append(judgement)
        return judgements


@torch.no_grad()
def predict_attributes(judge: Judge, image: Tensor) -> list[dict[str, str]]:
    """What a judge sees in each of (B, C, H, W) pictures in [-1, 1]: ``[{"gender": "man", "hair": "grey"}, …]``."""
    values = {name: list(words) for name, words in judge.vocabulary.items()}
    places = {name: logits.argmax(dim=1).tolist() for name, logits in judge(image.float()).items()}
    return [{name: values[name][found[i]] for name, found in places.items()} for i in range(len(image))]


def check_prompt(vocabulary: Vocabulary, predicted: Mapping[str, str], text: str) -> dict[str, bool]:
    """Whether a judge predicted what a text names, for each attribute: ``{"gender": True, "hair": False}``.

    Of what a negative part names, anything else is right.
    """
    return {name: predicted[name] in values for name, values in find_allowed(vocabulary, text).items()}
