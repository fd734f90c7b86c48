"""What guides: one or more CLIPs, a noise-aware CLIP, a noise-aware classifier; each loaded when it is needed."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from clipward.errors import InputError
from clipward.files import state_hash
from clipward.guidance.methods import Kind, Method
from clipward.guidance.objectives import ClassifierAnswer, ClipAnswer, ClipSimilarity, Critic, Ensemble, Named, Scaled
from clipward.networks.classifier import Classifier, load_classifier
from clipward.networks.clip import Clip
from clipward.networks.sharding import shard

LARGE = 200_000_000  # parameters of an image tower that is worth sharding: ViT-L and larger


class Critics:
    """Frozen networks that are no part of a module's parameters, checkpoint or optimiser.

    Args:
        clip: names of CLIPs.
        weights: of each in their average.
        noisy_clip: the name of a noise-aware CLIP.
        opposites: groups of phrases that exclude each other.
        neutral: what is true of any picture.
        classifier: the path of a noise-aware classifier.
        checkpointing: CLIPs compute what a backward pass needs anew, in place of keeping it.
    """

    def __init__(
        self,
        clip: list[str],
        weights: list[float] | None = None,
        noisy_clip: str | None = None,
        opposites: list[list[str]] | None = None,
        neutral: str | None = None,
        classifier: str | None = None,
        checkpointing: bool = False,
    ) -> None:
        self.names, self.weights = clip, [1.0] * len(clip) if weights is None else weights
        if len(self.weights) != len(clip) or not all(weight > 0 for weight in self.weights):
            raise InputError(f"clip_weights: {self.weights} given; a number above 0 for each clip would do")
        self.noisy_name, self.classifier_path = noisy_clip, classifier
        self.opposites, self.neutral = opposites or [], neutral
        for group in self.opposites:
            if len({phrase.lower() for phrase in group if phrase.strip()}) < max(2, len(group)):
                raise InputError(f"opposites: {group} given; two or more phrases that exclude each other would do")
        self.checkpointing = checkpointing

    @cached_property
    def clips(self) -> list[Clip]:
        if not self.names:
            raise InputError("clip: none given; an open_clip folder or name would do, for there is a text to obey")
        return [self._load(name) for name in self.names]

    @cached_property
    def noisy_clip(self) -> Clip:
        wanted = "one that configs/faces_noisy_clip.yaml makes would do"
        if self.noisy_name is None:
            raise InputError(f"noisy_clip: none given, for a method that looks at noisy pictures; {wanted}")
        clip = self._load(self.noisy_name)
        if not clip.noise_aware:
            raise InputError(f"noisy_clip: {self.noisy_name} knows no noise; {wanted}")
        return clip

    @cached_property
    def classifier(self) -> Classifier:
        wanted = "one that configs/faces_classifier.yaml makes would do"
        if self.classifier_path is None:
            raise InputError(f"classifier: none given, for classifier guidance; {wanted}")
        classifier = load_classifier(Path(self.classifier_path), "classifier")
        if not classifier.noise_aware:
            raise InputError(f"classifier: {self.classifier_path} knows no noise; {wanted}")
        return classifier

    def _load(self, name: str) -> Clip:
        clip = Clip.load(name)
        clip.checkpointing = self.checkpointing
        return clip

    def load(self, kind: Kind | None) -> None:
        """Load what a method of this kind asks, if there is one, and the CLIPs that pictures are scored by."""
        _ = kind == "noisy clip" and self.noisy_clip
        _ = kind == "classifier" and self.classifier
        _ = (kind == "clip" or self.names) and self.clips

    def shard(self, mesh: DeviceMesh) -> None:
        """Spread the image towers of large CLIPs over the processes; texts are encoded by each process alone."""
        for clip in self.loaded():
            visual = clip.model.visual
            if sum(p.numel() for p in visual.parameters()) >= LARGE:
                _ = clip.hash  # of the whole
                shard(visual, getattr(getattr(visual, "transformer", None), "resblocks", []), mesh)

    def loaded(self) -> list[Clip]:
        """All CLIPs that are loaded."""
        found = vars(self)
        return found.get("clips", []) + ([self.noisy_clip] if "noisy_clip" in found else [])

    def cosines(self, image: Tensor, text: Sequence[str]) -> Tensor:
        """(B, T): the cosine of each picture and each text, averaged over the CLIPs."""
        clips = [clip.to(image.device) for clip in self.clips]
        found = [clip.encode_image(image) @ clip.encode_text(text).T for clip in clips]
        return sum(weight * each for weight, each in zip(self.weights, found, strict=True)) / sum(self.weights)

    def critic(self, method: Method, text: Sequence[str], noise: Named, device: torch.device) -> Critic:
        """What a method asks whether a picture obeys."""
        texts = spared(text)
        if method.critic == "classifier":
            return Critic(None, ClassifierAnswer(self.classifier.to(device), texts), noise)
        noisy = method.critic == "noisy clip"
        clips, weights = ([self.noisy_clip], [1.0]) if noisy else (self.clips, self.weights)
        clips = [clip.to(device) for clip in clips]
        cosine = Ensemble([ClipSimilarity(clip, texts, noisy) for clip in clips], weights)
        if not method.contrast:
            return Critic(cosine, Scaled(cosine, cosine.logit_scale), noise)
        answers = [ClipAnswer(clip, texts, self.opposites, self.neutral, noisy) for clip in clips]
        return Critic(cosine, Ensemble(answers, weights), noise)

    def provenance(self, method: Method) -> dict[str, Any]:
        """Names and hashes of what has a part in a picture."""
        found = vars(self)
        hashes = [clip.hash for clip in found.get("clips", [])]
        row = {"clip": self._joined(self.names), "clip_hash": self._joined(hashes)}
        if method.critic == "noisy clip":
            row["noisy_clip"] = self.noisy_name
            row["noisy_clip_hash"] = self.noisy_clip.hash if "noisy_clip" in found else None
        if method.critic == "classifier":
            row["classifier"] = self.classifier_path
            row["classifier_hash"] = state_hash(self.classifier.state_dict()) if "classifier" in found else None
        return row | ({"opposites": self.opposites, "neutral": self.neutral} if method.contrast else {})

    def _joined(self, names: list[str]) -> str | None:
        if len(names) < 2:
            return next(iter(names), None)
        return " + ".join(f"{weight:g}·{name}" for weight, name in zip(self.weights, names, strict=True))


def spared(text: Sequence[str]) -> list[str]:
    """Where a text is empty, another stands in: no one looks at what it scores."""
    spare = next(filter(None, text), "a picture")
    return [sentence or spare for sentence in text]
