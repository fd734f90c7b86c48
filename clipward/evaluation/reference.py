"""Pictures to compare with."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipward.evaluation.judges import Judges
from clipward.networks.classifier import named


class Reference:
    """Features of pictures to compare with, and which of them a text is true of.

    Args:
        batches: with ``image``, and ``labels`` in the order of the judges' attributes where there are any.
        judges: whose features.
        device: on which they look.
    """

    def __init__(self, batches: Iterable[dict[str, Any]], judges: Judges, device: torch.device) -> None:
        judges.to(device)
        features, labels = [], []
        with torch.no_grad():
            for batch in batches:
                features.append(judges.features(batch["image"].to(device)).cpu())
                labels.append(batch.get("labels"))
        self.features, self.vocabulary = torch.cat(features), judges.vocabulary
        self.labels = None if labels[0] is None else torch.cat(labels)  # (N, attributes)

    def of(self, texts: list[str]) -> Tensor:
        """(M, C): pictures that the texts are true of, as many as there are in the shares that the texts have.

        All pictures, where there are no labels or a text is true of fewer than two.
        """
        if self.labels is None:
            return self.features
        true = {}
        for text in dict.fromkeys(texts):
            true[text] = torch.ones(len(self.labels), dtype=torch.bool)
            for name, value in named(self.vocabulary, text).items():
                column = list(self.vocabulary).index(name)
                true[text] &= self.labels[:, column] == list(self.vocabulary[name]).index(value)
        found = self._in_shares(true, texts)
        return self.features if found is None else found

    def alike(self, features: Tensor) -> Tensor | None:
        """(M, C): pictures with the same attributes as those of ``features``, in the same shares, named or not.

        None, where there are no labels or too few pictures.
        """
        if self.labels is None or len(self.labels) <= self.features.shape[1]:
            return None
        shown = [tuple(row) for row in self._shown(features).tolist()]
        true = {each: (self.labels == torch.tensor(each)).all(dim=1) for each in dict.fromkeys(shown)}
        return self._in_shares(true, shown)

    def _shown(self, features: Tensor) -> Tensor:
        """(N, attributes): what linear probes of the features see."""
        padded = F.pad(features.double(), (0, 1), value=1)
        return torch.stack([(padded @ probe).argmax(dim=1) for probe in self._probes], dim=1)

    @cached_property
    def _probes(self) -> list[Tensor]:
        """(C + 1, values) for each attribute, fitted to these pictures by least squares."""
        padded = F.pad(self.features.double(), (0, 1), value=1)
        return [
            torch.linalg.lstsq(padded, F.one_hot(column, len(values)).double()).solution
            for column, values in zip(self.labels.T, self.vocabulary.values(), strict=True)
        ]

    def _in_shares(self, true: Mapping[Any, Tensor], asked: Sequence[Any]) -> Tensor | None:
        """As many pictures as there are in the shares of what is asked; None where one is true of fewer than two."""
        if min(mask.sum() for mask in true.values()) < 2:
            return None
        count = Counter(asked)
        times = min(mask.sum().item() / count[each] for each, mask in true.items())
        return torch.cat([self.features[mask][: round(times * count[each])] for each, mask in true.items()])
