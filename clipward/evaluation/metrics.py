"""Distances between two sets of features, and the standard error of a statistic."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


class _Identity(nn.Module):
    """Stands in torchmetrics for the network that extracts features, since its input has them already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(made: Tensor, reference: Tensor) -> float:
    """The FID between two sets of features, (N, C) and (M, C): 0 or more, 0 for equal sets (Heusel et al. 2017)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    # the caller has gathered the features of all processes
    return _compute(FrechetInceptionDistance(_Identity(made.shape[1]), sync_on_compute=False), made, reference)


def kid(made: Tensor, reference: Tensor) -> float:
    """The KID between two sets of features, (N, C) and (M, C) (Bińkowski et al. 2018).

    It is the mean over 50 random subsets, each half as large as the smaller set. It is unbiased, so that it may lie
    below 0.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    half = max(2, min(len(made), len(reference)) // 2)
    metric = KernelInceptionDistance(_Identity(made.shape[1]), subsets=50, subset_size=half, sync_on_compute=False)
    return _compute(metric, made, reference)


def _compute(metric: Any, made: Tensor, reference: Tensor) -> float:
    """A metric of torchmetrics in float64, with the same random subsets every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        metric.set_dtype(torch.float64)
        metric.update(reference.double(), real=True)
        metric.update(made.double(), real=False)
        found = metric.compute()
    return (found[0] if isinstance(found, tuple) else found).item()


def jackknife(statistic: Callable[[Tensor], float], values: Tensor, group: Sequence[int]) -> float | None:
    """The standard error of a statistic, estimated by leaving out one group of values at a time.

    Args:
        statistic: a number for (M, …) values.
        values: (N, …).
        group: the group of each of the N values.

    Returns:
        None where there are fewer than two groups, or fewer than two values without one of them.
    """
    groups = list(dict.fromkeys(group))
    if len(groups) < 2:
        return None
    parts = [values[torch.tensor([each != left_out for each in group])] for left_out in groups]
    if min(map(len, parts)) < 2:
        return None
    found = torch.tensor([statistic(part) for part in parts], dtype=torch.float64)
    return ((len(groups) - 1) * found.var(correction=0)).sqrt().item()


def precision_recall(made: Tensor, reference: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """How faithful and how varied generated pictures are (Kynkäänniemi et al. 2019, eq. 1 and 2).

    A set covers a point that is no further from one of its members than that member's k-th nearest neighbour in the
    set.

    Args:
        made: (N, C) features of generated pictures, more than ``neighbours``.
        reference: (M, C) of real ones, likewise.
        neighbours: k.

    Returns:
        precision, the share of ``made`` that ``reference`` covers, and recall, the share of ``reference`` that
        ``made`` covers; both in [0, 1].
    """
    made, reference = made.double(), reference.double()
    return _share_covered(made, reference, neighbours), _share_covered(reference, made, neighbours)


def _share_covered(points: Tensor, members: Tensor, neighbours: int) -> float:
    # a member is its own nearest neighbour; no matrix products, which would round small distances
    exact = "donot_use_mm_for_euclid_dist"
    radii = [torch.cdist(part, members, compute_mode=exact).kthvalue(neighbours + 1).values for part in _parts(members)]
    radius = torch.cat(radii)
    covered = [(torch.cdist(part, members, compute_mode=exact) <= radius).any(dim=1) for part in _parts(points)]
    return torch.cat(covered).double().mean().item()


def _parts(rows: Tensor) -> Sequence[Tensor]:
    return rows.split(1000)


def cmmd(made: Tensor, reference: Tensor) -> float:
    """CMMD (Jayasumana et al. 2024): 1000·MMD² by the kernel exp(−‖x − y‖²/(2·10²)); lower is better.

    The means include each point with itself, as in the authors' code, so that it is 0 or more, and 0 for equal sets.

    Args:
        made: (N, D), CLIP's features of generated pictures, of unit length.
        reference: (M, D), of real ones.
    """
    made, reference = made.double(), reference.double()

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        sums = [torch.exp(-torch.cdist(part, b).square() / (2 * CMMD_SIGMA**2)).sum() for part in _parts(a)]
        return torch.stack(sums).sum() / (len(a) * len(b))

    squared = mean_kernel(made, made) + mean_kernel(reference, reference) - 2 * mean_kernel(made, reference)
    return CMMD_SCALE * squared.item()
