"""How training pictures are served: in an order that depends on the seed and the epoch alone."""

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler


def training_loader(
    pictures: Dataset[dict], batch_size: int, num_workers: int, trainer: L.Trainer | None = None
) -> DataLoader:
    """Shuffled batches, all of one size, of this process's share; half of the pictures are mirrored."""
    rank, world, seed = 0, 1, torch.initial_seed()
    if trainer is not None:
        rank, world, seed = trainer.global_rank, trainer.world_size, trainer.strategy.broadcast(seed)
    return _TrainingLoader(
        _Mirrored(pictures),
        batch_size=batch_size,
        sampler=_Shuffled(pictures, world, rank, seed=seed, drop_last=True),
        drop_last=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )


class _Shuffled(DistributedSampler):
    """Yields (position, whether to mirror), a function of seed and epoch; skips what ``skip`` says."""

    skip = 0

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        generator = torch.Generator().manual_seed((self.seed + self.epoch) % 2**63)
        order = torch.randperm(len(self.dataset), generator=generator).tolist()
        mirrored = (torch.rand(len(order), generator=generator) < 0.5).tolist()
        drawn = list(zip(order, mirrored, strict=True))[: self.total_size]
        return iter(drawn[self.rank :: self.num_replicas][self.skip :])


class _Mirrored(Dataset[dict]):
    """Items of (position, whether to mirror)."""

    def __init__(self, pictures: Dataset[dict]) -> None:
        self.pictures = pictures

    def __getitem__(self, drawn: tuple[int, bool]) -> dict:
        position, mirror = drawn
        item = self.pictures[position]
        return item | {"image": item["image"].flip(-1)} if mirror else item


class _TrainingLoader(DataLoader):
    """Knows its place within an epoch, which Lightning keeps in checkpoints."""

    _given = _start = 0

    def __iter__(self) -> Iterator[Any]:
        self._given, self._start = self._start, 0
        self.sampler.skip = self._given * self.batch_size
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.sampler.seed, "batches": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.seed = state["seed"]
        self._start = state["batches"] % len(self)
