"""What judges say of pictures: whether they obey, whether they are still pictures, and what they cost."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clipward.errors import InputError
from clipward.evaluation.features import Inception
from clipward.networks.classifier import Classifier, Vocabulary, check_named, load_classifier, named
from clipward.networks.clip import CONFIG_FILE, Clip

Row = dict[str, Any]


class Critics(Protocol):
    """The CLIPs that guide, where there are ``names`` of any."""

    names: list[str]

    def cosines(self, image: Tensor, text: Sequence[str]) -> Tensor:
        """(B, C, H, W) and T texts -> (B, T)."""


class Judges:
    """Judges that look at the same pictures, none of which may guide.

    A picture obeys where a judge sees every attribute that its text names. An unguided picture, which has no text, is
    asked for all of them.

    Args:
        paths: a classifier's safetensors, or a CLIP's folder with ``judge.json``. The first one's verdict is the
            table's.
        texts: all that will be asked for.
        features: what measures fidelity: ``judge``, the classifier's features or, where there is none, the CLIP's;
            ``inception``, those of FID's own network, downloaded on first use; or a file with its weights.

    Raises:
        InputError: where a judge knows nothing of a text, or there is none.
    """

    def __init__(self, paths: Sequence[str], texts: Iterable[str], features: str = "judge") -> None:
        self.judges = {path: load_judge(Path(path)) for path in paths}
        self.texts = list(dict.fromkeys(filter(None, texts)))
        if not self.texts:
            raise InputError("text: none given; a sentence that the judge can look for would do")
        for text in self.texts:
            for judge in self.judges.values():
                check_named(judge.vocabulary, text, "judge")

        self._inception = None if features == "judge" else Inception(features)

    @property
    def clip(self) -> Clip | None:
        return next((judge.clip for judge in self.judges.values() if isinstance(judge, ClipJudge)), None)

    @property
    def vocabulary(self) -> Vocabulary:
        """The first judge's."""
        return next(iter(self.judges.values())).vocabulary

    def to(self, device: torch.device) -> None:
        for network in (*self.judges.values(), self.clip, self._inception):
            if isinstance(network, nn.Module | Clip):
                network.to(device)

    def features(self, image: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, features), by which sets of pictures are compared."""
        if self._inception is not None:
            return self._inception(image)
        for judge in self.judges.values():
            if isinstance(judge, Classifier):
                return judge.features(image)
        features = self.clip.encode_image(image)
        return features * features.shape[1] ** 0.5  # about 1 each, as KID's kernel takes them to be

    @torch.no_grad()
    def rows(
        self, requests: Mapping[str, list], image: Tensor, cost: Mapping[str, float], critics: Critics
    ) -> list[Row]:
        """What is to be said of a batch: a row for each picture and text.

        Args:
            requests: a list for each of ``index``, ``text``, ``seed``, ``guidance_weight``, ``valid``; all that is not
                valid is left out.
            image: (B, C, H, W) in [-1, 1].
            cost: what one of them cost.
            critics: what guided, whose opinion is asked too.
        """
        image = image.float()
        self.to(image.device)
        saw = {path: seen(judge, image) for path, judge in self.judges.items()}
        features = self.features(image).cpu()
        guiding = critics.cosines(image, self.texts) if critics.names else None
        clip = self.clip
        held_out = None if clip is None else clip.encode_image(image) @ clip.encode_text(self.texts).T
        rows = []
        for i in (i for i, valid in enumerate(requests["valid"]) if valid):
            request = {name: values[i] for name, values in requests.items()}
            for text in [request["text"]] if request["text"] else self.texts:
                column = self.texts.index(text)
                verdicts = {p: obeys(judge.vocabulary, saw[p][i], text) for p, judge in self.judges.items()}
                rows.append(
                    {
                        **request,
                        "text": text,
                        "seen": verdicts,
                        "clip_similarity": None if guiding is None else guiding[i, column].item(),
                        "held_out_similarity": None if held_out is None else held_out[i, column].item(),
                        "features": features[i],
                        "cost": cost,
                    }
                )
        return rows


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
        vocabulary: as of :class:`clipward.networks.classifier.Classifier`.
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
