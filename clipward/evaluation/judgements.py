"""What the judges say of each picture, in memory and as a parquet file."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipward.evaluation.cost import Cost
from clipward.files import atomic_write, hide_bars


@dataclass(frozen=True, eq=False)
class Judgement:
    """What the judges say of one picture and one text.

    Args:
        index: the number of the picture. An unguided picture has a judgement for each text.
        text: what the judges look for.
        seed: the seed of the picture's noise.
        guidance_weight: 0 for an unguided picture.
        verdicts: ``{judge: {attribute: whether the judge sees what the text names}}``, for the attributes that the
            text names. The first judge's verdict counts as prompt accuracy.
        clip_similarity: the cosine of picture and text by the CLIPs that guide, in [-1, 1]; None without any.
        held_out_similarity: the same cosine by the CLIP that judges; None without one.
        features: (C,), by which sets of pictures are compared.
        cost: what the picture costs.
        clip_features: (D,), of unit length, by which CMMD compares sets of pictures; None without a CLIP.
    """

    index: int
    text: str
    seed: int
    guidance_weight: float
    verdicts: dict[str, dict[str, bool]]
    clip_similarity: float | None
    held_out_similarity: float | None
    features: Tensor
    cost: Cost
    clip_features: Tensor | None = None

    @property
    def judges(self) -> list[str]:
        """The names of the judges, the one that counts as prompt accuracy first."""
        return list(self.verdicts)

    def is_correct(self, judge: str | None = None) -> bool:
        """Whether a judge, the first by default, sees all that the text names."""
        return all(self.verdicts[judge or self.judges[0]].values())


def save_judgements(path: Path, judgements: Sequence[Judgement]) -> None:
    """Write a parquet file, atomically, with a row for each judgement."""
    from datasets import Dataset

    rows = [asdict(each) | {"features": each.features.tolist(), "clip_features": _list(each)} for each in judgements]
    with atomic_write(path) as aside, hide_bars():
        Dataset.from_list(rows).to_parquet(aside)


def load_judgements(path: Path) -> list[Judgement]:
    """Read what :func:`save_judgements` wrote."""
    from datasets import load_dataset

    judgements = []
    for row in load_dataset("parquet", data_files=str(path), split="train", streaming=True):
        # a parquet row has every attribute, with None for those that its text does not name
        verdicts = {
            judge: {attribute: right for attribute, right in verdict.items() if right is not None}
            for judge, verdict in row["verdicts"].items()
        }
        parsed: dict[str, Any] = {
            "verdicts": verdicts,
            "features": torch.tensor(row["features"]),
            "cost": Cost(**row["cost"]),
        }
        if row.get("clip_features") is not None:  # earlier versions had none
            parsed["clip_features"] = torch.tensor(row["clip_features"])
        judgements.append(Judgement(**(row | parsed)))
    return judgements


def _list(judgement: Judgement) -> list[float] | None:
    return None if judgement.clip_features is None else judgement.clip_features.tolist()
