"""Averages over judged pictures: accuracy, fidelity and cost for each guidance weight."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clipward.evaluation.cost import Cost, average_costs
from clipward.evaluation.judgements import Judgement
from clipward.evaluation.metrics import cmmd, fid, jackknife, kid, precision_recall
from clipward.evaluation.reference import Reference

FOLDS = 16  # of the jackknife
NEIGHBOURS = 3  # of precision and recall


@dataclass(frozen=True)
class Scores:
    """Averages over the pictures of one guidance weight. What is not known is None.

    Args:
        guidance_weight: None for pictures that are not sampled with a weight.
        pictures: how many there are.
        prompt_accuracy: the share of pictures in which the first judge sees all that the text names.
        prompt_accuracy_std: its standard deviation over seeds.
        prompt_accuracy_error: its standard error over seeds.
        attribute_accuracy: the share of named attributes that the first judge sees.
        attributes: the same share by attribute.
        judges: prompt accuracy by each judge.
        clip_similarity: the mean cosine of picture and text, by the CLIPs that guide.
        held_out_similarity: the same by the CLIP that judges.
        cost: of a picture, and the highest peak of memory.
        passes_per_success: passes through the U-Net, forward and backward, for each correct picture.
        fid: from real pictures that the texts are true of; of unguided pictures from all real ones.
        fid_error: the standard error of ``fid``. It needs more pictures than features.
        kid: from the same pictures as ``fid``.
        precision: the share of the pictures that lie among those real ones (Kynkäänniemi et al. 2019).
        recall: the share of those real pictures that lie among the pictures.
        cmmd: from those real pictures, by a CLIP's features (Jayasumana et al. 2024).
        reference: how many real pictures these are.
        attribute_matched_fid: from real pictures with the same attributes, whether a text names them or not. ``fid``
            exceeds it where the pictures share attributes that their texts do not ask for. Up to a twentieth of the
            pictures, whose attributes fewer than two real ones have together, are left out.
        twin_distance: the mean distance in features from the unguided picture of the same seed.
    """

    guidance_weight: float | None
    pictures: int
    prompt_accuracy: float
    prompt_accuracy_std: float | None
    prompt_accuracy_error: float | None
    attribute_accuracy: float
    attributes: dict[str, float]
    judges: dict[str, float]
    clip_similarity: float | None
    held_out_similarity: float | None
    cost: Cost
    passes_per_success: float | None
    fid: float | None = None
    fid_error: float | None = None
    kid: float | None = None
    reference: int | None = None
    attribute_matched_fid: float | None = None
    twin_distance: float | None = None
    precision: float | None = None
    recall: float | None = None
    cmmd: float | None = None


def summarise(
    judgements: Sequence[Judgement], reference: Reference | None = None, unguided: Sequence[Judgement] = ()
) -> list[Scores]:
    """Average over the pictures of each guidance weight, by rising weight.

    Args:
        judgements: of guided and unguided pictures.
        reference: real pictures to compare with; without them, fidelity is left out.
        unguided: further unguided pictures, which are only compared with guided ones of the same seed.
    """
    twins = {each.seed: each.features for each in (*judgements, *unguided) if each.guidance_weight == 0}
    table = []
    for weight in sorted({each.guidance_weight for each in judgements}):
        group = [each for each in judgements if each.guidance_weight == weight]
        pictures = list({each.index: each for each in group}.values())  # an unguided one has a judgement for each text
        scores = _score(group, pictures)
        if reference is not None and len(pictures) > 1:
            everything = torch.arange(len(reference.features))
            places = reference.find_matching([each.text for each in group]) if weight else everything
            scores = _add_fidelity(scores, pictures, places, reference)
        if weight:
            scores = replace(scores, twin_distance=_measure_twin_distance(pictures, twins))
        table.append(scores)
    return table


def _score(group: Sequence[Judgement], pictures: Sequence[Judgement]) -> Scores:
    """Accuracy and cost of pictures that share a weight; ``group`` has all judgements of them."""
    correct = [each.is_correct() for each in group]
    accuracy = _mean(correct)
    by_seed = [
        _mean([right for right, each in zip(correct, group, strict=True) if each.seed == seed])
        for seed in dict.fromkeys(each.seed for each in group)
    ]
    std = torch.tensor(by_seed).std().item() if len(by_seed) > 1 else None
    judges = group[0].judges
    verdicts = [verdict for each in group for verdict in each.verdicts[judges[0]].items()]
    cost = average_costs([each.cost for each in pictures])
    return Scores(
        guidance_weight=group[0].guidance_weight,
        pictures=len(pictures),
        prompt_accuracy=accuracy,
        prompt_accuracy_std=std,
        prompt_accuracy_error=None if std is None else std / len(by_seed) ** 0.5,
        attribute_accuracy=_mean([right for _, right in verdicts]),
        attributes={
            name: _mean([right for each, right in verdicts if each == name])
            for name in dict.fromkeys(name for name, _ in verdicts)
        },
        judges={judge: _mean([each.is_correct(judge) for each in group]) for judge in judges},
        clip_similarity=_mean_if_known([each.clip_similarity for each in group]),
        held_out_similarity=_mean_if_known([each.held_out_similarity for each in group]),
        cost=cost,
        passes_per_success=cost.network_passes / accuracy if accuracy else None,
    )


def _add_fidelity(scores: Scores, pictures: Sequence[Judgement], places: Tensor, reference: Reference) -> Scores:
    """Compare pictures with real ones at (M,) places of the reference, and with those that match in attributes."""
    made, real = torch.stack([each.features for each in pictures]), reference.features[places]
    matched = reference.matching_attributes(made)
    error = None
    if len(made) > made.shape[1]:  # with fewer, the covariance of a part has no full rank
        error = jackknife(lambda part: fid(part, real), made, [each.seed % FOLDS for each in pictures])
    enough = min(len(made), len(real)) > NEIGHBOURS
    precision, recall = precision_recall(made, real, NEIGHBOURS) if enough else (None, None)
    seen = [each.clip_features for each in pictures if each.clip_features is not None]
    known = reference.clip_features if len(seen) == len(pictures) else None
    return replace(
        scores,
        precision=precision,
        recall=recall,
        cmmd=None if known is None else cmmd(torch.stack(seen), known[places]),
        fid=fid(made, real),
        fid_error=error,
        kid=kid(made, real),
        reference=len(real),
        attribute_matched_fid=None if matched is None else fid(*matched),
    )


def _measure_twin_distance(pictures: Sequence[Judgement], twins: Mapping[int, Tensor]) -> float | None:
    """The mean distance from the unguided picture of the same seed, over the pictures that have one."""
    paired = [each for each in pictures if each.seed in twins]
    if not paired:
        return None
    made = torch.stack([each.features for each in paired])
    return (made - torch.stack([twins[each.seed] for each in paired])).norm(dim=1).mean().item()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_if_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if len(known) == len(values) else None
