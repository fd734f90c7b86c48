"""Real pictures to compare generated ones with: all of them, or those with matching attributes."""

import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipward.evaluation.judges import Judges, ScoresTexts
from clipward.networks.vocabulary import Vocabulary, find_allowed

LEAST_MATCHED = 0.95  # of the generated pictures


@dataclass(frozen=True, eq=False)
class Reference:
    """The features of real pictures, and their labels where they have any.

    Args:
        features: (N, C).
        labels: (N, attributes), for each attribute of the vocabulary the place of its value; −1 where it is not known.
        vocabulary: the attributes, their values and the words that name them.
        clip_features: (N, D), of unit length, where there is a CLIP.
    """

    features: Tensor
    labels: Tensor | None
    vocabulary: Vocabulary
    clip_features: Tensor | None = None

    @classmethod
    def from_batches(
        cls,
        batches: Iterable[Mapping[str, Any]],
        judges: Judges,
        device: torch.device,
        models: ScoresTexts | None = None,
    ) -> "Reference | None":
        """The features, by ``judges`` on ``device``, of batches of pictures.

        Args:
            batches: with an ``image``, (B, C, H, W) in [-1, 1], and ``labels``, (B, attributes) in the order of the
                first judge's vocabulary, where there are any; further ones are left out.
            judges: whose features to take.
            device: where to compute them.
            models: what guides, whose CLIP serves for CMMD where no judge is one.

        Returns:
            None, with a warning, where there are fewer than two pictures.
        """
        judges.to(device)
        clip = judges.choose_clip(models)
        features, clip_features, labels = [], [], []
        with torch.no_grad():
            for batch in batches:
                image = batch["image"].to(device)
                features.append(judges.features(image).cpu())
                if clip is not None:
                    clip_features.append(clip.to(device).encode_image(image).cpu())
                if "labels" in batch:
                    labels.append(batch["labels"][:, : len(judges.vocabulary)])
        count = sum(map(len, features))
        if count < 2:
            warnings.warn(
                f"data: got {count} pictures to compare with, expected two or more; FID is left out", stacklevel=2
            )
            return None
        return cls(
            torch.cat(features),
            torch.cat(labels) if labels else None,
            judges.vocabulary,
            torch.cat(clip_features) if clip_features else None,
        )

    def find_matching(self, texts: Sequence[str]) -> Tensor:
        """(M,): the places of pictures that the texts are true of.

        There are as many as possible in the proportions of the texts. Where there are no labels, or a text is true of
        fewer than two pictures, these are the places of all.
        """
        everything = torch.arange(len(self.features))
        if self.labels is None:
            return everything
        masks = {text: self._find(find_allowed(self.vocabulary, text), self.labels) for text in dict.fromkeys(texts)}
        found = self._take_in_proportion(masks, texts)
        return everything if found is None else found

    def matching_attributes(self, features: Tensor) -> tuple[Tensor, Tensor] | None:
        """Pictures with the same attributes as (N, C) generated ones, in the same proportions.

        Linear probes predict the attributes of the generated pictures, whether a text names them or not, and those of
        the real ones that are not known. Generated ones whose attributes fewer than two real ones have together are
        left out, up to a twentieth of all.

        Returns:
            the generated ones that are left, (≤ N, C), and their matches, (M, C). None where there are no labels, too
            few pictures to fit the probes, or too few that match.
        """
        if self.labels is None or self._probes is None:
            return None
        shown = [tuple(row) for row in predict_labels(self._probes, features).tolist()]
        labels = torch.where(self.labels >= 0, self.labels, predict_labels(self._probes, self.features))
        masks = {row: (labels == torch.tensor(row)).all(dim=1) for row in dict.fromkeys(shown)}
        kept = [i for i, row in enumerate(shown) if masks[row].sum() >= 2]
        if len(kept) < LEAST_MATCHED * len(shown):
            return None
        rows = [shown[i] for i in kept]
        found = self._take_in_proportion({row: masks[row] for row in dict.fromkeys(rows)}, rows)
        return None if found is None else (features[kept], self.features[found])

    @cached_property
    def _probes(self) -> list[Tensor] | None:
        if self.labels is None or (self.labels >= 0).sum(dim=0).min() <= self.features.shape[1]:
            return None
        return fit_probes(self.features, self.labels, [len(values) for values in self.vocabulary.values()])

    def _find(self, allowed: Mapping[str, set[str]], labels: Tensor) -> Tensor:
        """(N,): whether each picture has one of the values of each attribute."""
        mask = torch.ones(len(labels), dtype=torch.bool)
        for name, values in allowed.items():
            column, places = list(self.vocabulary).index(name), list(self.vocabulary[name])
            mask &= torch.isin(labels[:, column], torch.tensor([places.index(value) for value in values]))
        return mask

    def _take_in_proportion(self, masks: Mapping[Any, Tensor], keys: Sequence[Hashable]) -> Tensor | None:
        """(M,): places of as many pictures as there are in the proportions of ``keys``.

        None where a mask has fewer than two.
        """
        if min(mask.sum() for mask in masks.values()) < 2:
            return None
        count = Counter(keys)
        times = min(mask.sum().item() / count[key] for key, mask in masks.items())
        return torch.cat([mask.nonzero()[:, 0][: round(times * count[key])] for key, mask in masks.items()])


def fit_probes(features: Tensor, labels: Tensor, values: Sequence[int]) -> list[Tensor]:
    """Fit a linear classifier of the features for each attribute, by least squares on one-hot labels.

    Args:
        features: (N, C).
        labels: (N, attributes); a picture whose label is −1 has no part in that attribute's classifier.
        values: how many values each attribute has.

    Returns:
        (C + 1, values) for each attribute, in float64; the last row is the bias.
    """
    padded = _append_one(features)
    return [
        torch.linalg.lstsq(padded[column >= 0], F.one_hot(column[column >= 0], count).double()).solution
        for column, count in zip(labels.T, values, strict=True)
    ]


def predict_labels(probes: Sequence[Tensor], features: Tensor) -> Tensor:
    """(N, C) features -> (N, attributes), the most likely value of each attribute."""
    padded = _append_one(features)
    return torch.stack([(padded @ probe).argmax(dim=1) for probe in probes], dim=1)


def _append_one(features: Tensor) -> Tensor:
    """(N, C) -> (N, C + 1) in float64, with a 1 for the bias."""
    return F.pad(features.double(), (0, 1), value=1)
