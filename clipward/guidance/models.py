"""The models that guide: CLIPs, a noise-aware CLIP, a noise-aware classifier. Each is loaded when it is needed."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from clipward.editing import Edit, has_picture
from clipward.errors import InputError, shorten
from clipward.files import state_hash
from clipward.guidance.contrasts import load_contrasts
from clipward.guidance.methods import AUTO, GuidedBy, Method
from clipward.guidance.objectives import (
    ClassifierLogLikelihood,
    ClipDistance,
    ClipSimilarity,
    ContrastiveLogLikelihood,
    Ensemble,
    NamedNoise,
    Objective,
    Objectives,
    PictureDistance,
    PictureSimilarity,
    Scaled,
    SeveralTexts,
)
from clipward.networks.classifier import Classifier, load_classifier
from clipward.networks.clip import Clip, text_cosines
from clipward.networks.sharding import shard
from clipward.networks.vocabulary import check_attributes
from clipward.texts import FAULTY, Part, is_one_sentence, split_negative, split_text
from clipward.values import check_types, is_number

LARGE = 200_000_000  # parameters of an image tower that is worth sharding: ViT-L and larger


@dataclass(frozen=True)
class GuidanceConfig:
    """Which models guide, and what a text is compared with.

    Args:
        clip: one or several CLIPs, by the names that :meth:`clipward.networks.clip.Clip.load` takes.
        clip_weights: of each CLIP in their average, relative to the others; equal by default.
        noisy_clip: a noise-aware CLIP, for the methods that look at x_t.
        classifier: a noise-aware classifier, for classifier guidance.
        contrasts: groups of phrases that exclude each other, such as ``[[old, young], [man, woman]]``, a YAML file of
            them, or the name of a set that ships: ``faces`` or ``photographs``. The method ``contrastive`` compares a
            text with the captions that exchange one of its phrases for another of the group.
        neutral: a text that is true of any picture, such as ``a person``. ``contrastive`` compares with it too, so
            that words which are in no group guide as well. A text with neither guides by CLIP's logit.
        negative_text: what no picture should show, such as ``a beard | glasses:2``; a part of every text, with the
            weights' signs changed, as :func:`clipward.texts.split_text` reads them.
    """

    clip: str | list[str] | None = None
    clip_weights: list[float] | None = None
    noisy_clip: str | None = None
    classifier: str | None = None
    contrasts: str | list[list[str]] | None = None
    neutral: str | None = None
    negative_text: str | None = None

    def __post_init__(self) -> None:
        check_types(self, "guidance")
        split_negative(self.negative_text)
        if self.neutral is not None and (not self.neutral.strip() or FAULTY.search(self.neutral)):
            raise InputError(f"neutral: got {shorten(self.neutral)}, expected a sentence that is true of any picture")
        weights, names = self.clip_weights, self.clips
        if weights is not None and not (
            len(weights) == len(names) and all(is_number(weight) and weight > 0 for weight in weights)
        ):
            raise InputError(f"clip_weights: got {weights}, expected a number above 0 for each of {len(names)} CLIPs")

    @property
    def clips(self) -> list[str]:
        """The names of the CLIPs, also of a single one."""
        return [self.clip] if isinstance(self.clip, str) else list(self.clip or [])

    def split(self, text: str) -> list[Part]:
        """The parts of a text and of the negative text; none of an empty text."""
        parts = split_text(text)
        return parts and parts + split_negative(self.negative_text)


def choose_method(name: str, config: GuidanceConfig) -> str:
    """The name of a method: ``name`` itself, or for ``auto`` what the models allow.

    That is ``contrastive`` with a noise-aware CLIP, ``contrastive_denoised`` with CLIPs of clean pictures, and
    ``classifier_guidance`` with a classifier alone.
    """
    if name != AUTO:
        return name
    if config.noisy_clip is not None:
        return "contrastive"
    return "classifier_guidance" if config.classifier is not None and not config.clips else "contrastive_denoised"


REASONS = {  # why auto took a method, and what would be better
    "contrastive": "by the noise-aware CLIP",
    "contrastive_denoised": "as no noise-aware CLIP is given; `clipward fit -c noisy_clip` makes one, at half the cost",
    "classifier_guidance": "by the noise-aware classifier",
}


class GuidanceModels:
    """Frozen networks that are no part of a module's parameters, checkpoint or optimiser.

    Args:
        config: which, and what a text is compared with.
        checkpointing: CLIPs recompute activations in the backward pass instead of keeping them.
        compiled: image towers run by ``torch.compile``.
    """

    def __init__(self, config: GuidanceConfig, checkpointing: bool = False, compiled: bool = False) -> None:
        self.config, self.checkpointing, self.compiled = config, checkpointing, compiled
        self.names = config.clips
        self.weights = config.clip_weights or [1.0] * len(self.names)
        self.contrasts = load_contrasts(config.contrasts or [])
        self._clips: dict[str, Clip] = {}  # those that are loaded
        self.in_parts = False  # whether processes share the image tower of one
        self._classifier: Classifier | None = None

    @property
    def clips(self) -> list[Clip]:
        if not self.names:
            raise InputError("clip: got none, expected the name of a CLIP, since there is a text")
        return [self._load(name) for name in self.names]

    @property
    def noisy_clip(self) -> Clip:
        name, wanted = self.config.noisy_clip, "expected one that configs/faces_noisy_clip.yaml makes"
        if name is None:
            raise InputError(f"noisy_clip: got none, {wanted}; the method looks at noisy pictures")
        clip = self._load(name, "noisy_clip")
        if not clip.noise_aware:
            raise InputError(f"noisy_clip: got {name}, which has no noise level; {wanted}")
        return clip

    @property
    def classifier(self) -> Classifier:
        path, wanted = self.config.classifier, "expected one that configs/faces_classifier.yaml makes"
        if path is None:
            raise InputError(f"classifier: got none, {wanted}")
        if self._classifier is None:
            classifier = load_classifier(path, "classifier")
            if not classifier.noise_aware:
                raise InputError(f"classifier: got {path}, which has no noise level; {wanted}")
            self._classifier = classifier
        return self._classifier

    def _load(self, name: str, field: str = "clip") -> Clip:
        if name not in self._clips:
            clip = Clip.load(name, field)
            clip.checkpointing = self.checkpointing
            if self.compiled:
                clip.model.visual.compile()
            self._clips[name] = clip
        return self._clips[name]

    def load(self, guided_by: GuidedBy | None) -> None:
        """Load the kind of model that a method asks for, if any, and the CLIPs that score pictures."""
        wanted = list(self.names)
        if guided_by == "clip":
            wanted = [clip.name for clip in self.clips]
        elif guided_by == "noisy clip":
            wanted.append(self.noisy_clip.name)
        elif guided_by == "classifier":
            self._classifier = self.classifier
        for name in wanted:
            self._load(name)

    def loaded(self) -> list[Clip]:
        """All CLIPs that are loaded."""
        return list(self._clips.values())

    def shard(self, mesh: DeviceMesh) -> None:
        """Spread the image towers of large CLIPs over the processes; each process encodes texts alone."""
        for clip in self.loaded():
            visual = clip.model.visual
            if sum(p.numel() for p in visual.parameters()) >= LARGE:
                self.in_parts = True
                clip.keep_hash()  # of the whole model, before it is in parts
                shard(visual, getattr(getattr(visual, "transformer", None), "resblocks", []), mesh)

    def check_texts(self, texts: Iterable[str], method: Method | None, scored: bool = True) -> None:
        """Check that the CLIPs of a method can read all texts and their contrast captions, before any is encoded.

        Args:
            texts: as people write them.
            method: None where no text guides, and the CLIPs only score.
            scored: whether the CLIPs score pictures; if not, those that don't guide are not loaded.

        Raises:
            InputError: where a part of one is empty or too long; a classifier must know something that each part names.
        """
        clips = self._reading(method, scored)
        safe = min((clip.context_length for clip in clips), default=0) - self._longest_phrase()
        checked: set[str] = set()
        for text in texts:
            # a million texts are checked fast: a part that has so few bytes fits, and so do its contrast captions
            fits = bool(checked) and len(text.encode()) <= safe and text.strip() and is_one_sentence(text)
            if fits or text in checked:
                continue
            checked.add(text)
            parts = self.config.split(text)
            for number, part in enumerate(parts, start=1):
                try:
                    self._check_sentence(part.text, method, clips)
                except InputError as error:
                    if number > len(split_text(text)):
                        raise InputError(f"negative_{error}") from error
                    where = f"; it is part {number} of {shorten(text)}" if len(parts) > 1 else ""
                    raise InputError(f"{error}{where}") from error

    def _reading(self, method: Method | None, scored: bool) -> list[Clip]:
        """The CLIPs that encode the texts of a method."""
        guided_by = None if method is None else method.guided_by
        if guided_by == "classifier":
            return []
        clips = self.clips if self.names and (scored or guided_by == "clip") else []
        return [*clips, self.noisy_clip] if guided_by == "noisy clip" else clips

    def _longest_phrase(self) -> int:
        """By how many bytes a contrast caption may be longer than its text."""
        return max((len(phrase.encode()) for group in self.contrasts for phrase in group), default=0) + 4

    def _check_sentence(self, text: str, method: Method | None, clips: Sequence[Clip]) -> None:
        if method is not None and method.guided_by == "classifier":
            check_attributes(self.classifier.vocabulary, text, "classifier")
        longest = self._longest_phrase() if method is not None and method.contrast else 0
        for clip in clips:
            clip.check_length(text)
            if longest and len(text.encode()) + longest > clip.context_length:
                ContrastiveLogLikelihood(clip, [text], self.contrasts, self.config.neutral)

    def cosines(self, image: Tensor, text: Sequence[str]) -> Tensor:
        """(B, T): the cosine of each picture and each text, averaged over the CLIPs; see :func:`text_cosines`."""
        texts = [self.config.split(each) for each in text]
        return self._average(lambda clip: text_cosines(clip, image, texts), image.device)

    def similarities(self, image: Tensor, text: Sequence[str]) -> Tensor:
        """(B,): the cosine of each picture and its own text, as :meth:`cosines` has it, whatever its neighbours are."""
        total = image.new_zeros(len(image), dtype=torch.float32)
        prompts = [self.config.split(each) for each in text]
        for clip, weight in zip(self.clips, self.weights, strict=True):
            features = clip.to(image.device).encode_image(image)
            for i, parts in enumerate(prompts):
                signs = torch.tensor([part.weight for part in parts], device=image.device)
                cosines = (features[i] * clip.encode_text([part.text for part in parts])).sum(dim=-1)
                total[i] += weight / sum(self.weights) * (signs / signs.abs().sum() * cosines).sum()
        return total

    def picture_cosines(self, image: Tensor, edits: Sequence[Edit | None]) -> list[float]:
        """The cosine of each picture and its image prompt, averaged over the CLIPs."""

        def cosines(clip: Clip) -> Tensor:
            prompts = clip.encode_image(read_prompts(clip, edits, image.device))
            return (clip.encode_image(image) * prompts).sum(dim=1)

        return self._average(cosines, image.device).tolist()

    def _average(self, measure: Callable[[Clip], Tensor], device: torch.device) -> Tensor:
        """The mean over the CLIPs, by their weights, of what each of them measures."""
        found = [weight * measure(clip.to(device)) for clip, weight in zip(self.clips, self.weights, strict=True)]
        return torch.stack(found).sum(dim=0) / sum(self.weights)

    def objectives(
        self,
        method: Method,
        text: Sequence[str],
        noise: NamedNoise,
        device: torch.device,
        edits: Sequence[Edit | None] | None = None,
    ) -> Objectives:
        """What a method may raise for a batch: one text for each image, of one or more parts.

        An image prompt, which all images have or none, is a further part of weight 1. Beside an empty text, it and the
        negative text guide alone.
        """
        filled = fill_empty_texts(text)
        prompts = [self.config.split(each) for each in filled]
        pictured = edits is not None and has_picture(edits[0])
        for i, parts in enumerate(prompts):
            if pictured and not text[i]:
                own = len(split_text(filled[i]))
                parts[:own] = [replace(part, weight=0.0) for part in parts[:own]]
        count = max(map(len, prompts))
        # an image with fewer texts than others has one of its own again, with the weight 0
        padded = [parts + [replace(parts[0], weight=0.0)] * (count - len(parts)) for parts in prompts]
        columns = [[parts[k].text for parts in padded] for k in range(count)]  # K lists of B texts
        unwanted = [[parts[k].weight < 0 for parts in padded] for k in range(count)]
        weights = torch.tensor([[part.weight for part in parts] for parts in padded], device=device)  # (B, K)
        if pictured:
            weights = torch.cat([weights, torch.ones_like(weights[:, :1])], dim=1)
        plain = weights.shape[1] == 1 and bool((weights == 1).all())

        def join(parts: list[Any]) -> Any:
            return parts[0] if plain else SeveralTexts(parts)

        text_weights = None if plain else weights
        if method.guided_by == "classifier":
            classifier = self.classifier.to(device)
            both = zip(columns, unwanted, strict=True)
            log_p = join([ClassifierLogLikelihood(classifier, texts, below) for texts, below in both])
            return Objectives(log_p, noise, text_weights=text_weights)
        noisy = method.guided_by == "noisy clip"
        clips, clip_weights = ([self.noisy_clip], [1.0]) if noisy else (self.clips, self.weights)
        clips = [clip.to(device) for clip in clips]
        pictures = [read_prompts(clip, edits or (), device) if pictured else None for clip in clips]

        def average(of_texts: Callable[..., Any], of_pictures: Callable[..., Any]) -> Ensemble:
            """The mean over the CLIPs of what each makes of its texts, and of the pictures if there are any."""
            found = []
            for clip, picture in zip(clips, pictures, strict=True):
                parts = [of_texts(clip, texts, below) for texts, below in zip(columns, unwanted, strict=True)]
                found.append(join(parts if picture is None else [*parts, of_pictures(clip, picture)]))
            return Ensemble(found, clip_weights)

        def similarity_to_pictures(clip: Clip, picture: Tensor) -> PictureSimilarity:
            return PictureSimilarity(clip, picture, noisy)

        def contrast(clip: Clip, texts: list[str], below: list[bool]) -> ContrastiveLogLikelihood:
            return ContrastiveLogLikelihood(clip, texts, self.contrasts, self.config.neutral, noisy, below)

        cosine = average(lambda clip, texts, _: ClipSimilarity(clip, texts, noisy), similarity_to_pictures)
        log_likelihood: Objective = Scaled(cosine, cosine.logit_scale)
        if method.contrast:
            log_likelihood = average(contrast, similarity_to_pictures)
        distance = average(lambda clip, texts, _: ClipDistance(clip, texts), PictureDistance)
        return Objectives(log_likelihood, noise, cosine, distance, text_weights)

    def provenance(self, method: Method) -> dict[str, Any]:
        """Names and hashes of what has a part in a picture; a model that is not loaded has no hash."""
        loaded = {name: clip.hash for name, clip in self._clips.items()}
        row: dict[str, Any] = {
            "clip": self._join(self.names),
            "clip_hash": self._join([loaded[name] for name in self.names if name in loaded]),
        }
        if len(self.names) > 1:
            row |= {"clips": self.names, "clip_weights": self.weights}
        if method.guided_by == "noisy clip":
            row["noisy_clip"] = self.config.noisy_clip
            row["noisy_clip_hash"] = loaded.get(self.config.noisy_clip or "")
        if method.guided_by == "classifier":
            row["classifier"] = self.config.classifier
            row["classifier_hash"] = None if self._classifier is None else state_hash(self._classifier.state_dict())
        if self.config.negative_text:
            row["negative_text"] = self.config.negative_text
        return row | ({"contrasts": self.contrasts, "neutral": self.config.neutral} if method.contrast else {})

    def _join(self, names: list[str]) -> str | None:
        if len(names) < 2:
            return next(iter(names), None)
        return " + ".join(f"{weight:g}·{name}" for weight, name in zip(self.weights, names, strict=True))


def read_prompts(clip: Clip, edits: Sequence[Edit | None], device: torch.device) -> Tensor:
    """(B, 3, H, W) in [-1, 1], of the size that a CLIP sees: the image prompts, which all of ``edits`` have."""
    size = clip.preprocess["size"]
    shape = (size, size) if isinstance(size, int) else tuple(size)
    return torch.stack([edit.read_prompt(shape) for edit in edits if edit is not None]).to(device)


def fill_empty_texts(text: Sequence[str]) -> list[str]:
    """Replace an empty text, whose score no one reads, by another of the batch."""
    filler = next(filter(None, text), "a picture")
    return [sentence or filler for sentence in text]
