"""Distances between two sets of features, and their standard errors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _Features(nn.Module):
    """What torchmetrics takes for pictures are features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet(made: Tensor, reference: Tensor) -> float:
    """FID between two sets of features, (N, C) each (Heusel et al. 2017)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    # one process has gathered all
    return _distance(FrechetInceptionDistance(_Features(made.shape[1]), sync_on_compute=False), made, reference)


def kernel(made: Tensor, reference: Tensor) -> float:
    """KID between two sets of features, (N, C) each: the mean over 50 halves of the smaller (Bińkowski et al. 2018)."""
    from torchmetrics.image.kid import KernelInceptionDistance

    half = max(2, min(len(made), len(reference)) // 2)
    metric = KernelInceptionDistance(_Features(made.shape[1]), subsets=50, subset_size=half, sync_on_compute=False)
    return _distance(metric, made, reference)


def _distance(metric: Any, made: Tensor, reference: Tensor) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        metric.set_dtype(torch.float64)
        metric.update(reference.double(), real=True)
        metric.update(made.double(), real=False)
        found = metric.compute()
    return (found[0] if isinstance(found, tuple) else found).item()


def jackknife(statistic: Callable[[Tensor], float], values: Tensor, group: Sequence[int]) -> float | None:
    """The standard error of a statistic of (N, …) values, by leaving out one group of them at a time."""
    groups = list(dict.fromkeys(group))
    if len(groups) < 2:
        return None
    parts = [values[torch.tensor([each != left_out for each in group])] for left_out in groups]
    if min(map(len, parts)) < 2:
        return None
    found = torch.tensor([statistic(part) for part in parts], dtype=torch.float64)
    return ((len(groups) - 1) * found.var(correction=0)).sqrt().item()
