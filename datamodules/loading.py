"""How pictures are served: in an order that depends on the seed and the epoch alone, and never none at all."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from clipward.errors import InputError, first_line, shorten

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
Size = int | Sequence[int]  # height and width, or both in that order
MOST_PIXELS, MOST_PICTURES, MOST_WORKERS = 2**14, 2**40, 2**10


class PictureDataModule(L.LightningDataModule):
    """Data of pictures that may have captions and labels; what trains and judges asks it which there are.

    Attributes:
        caption_column: where the captions stand, None without any.
        labels: attributes of the pictures, their values and the columns of these, None without any.
    """

    caption_column: str | None = None
    labels: dict[str, dict[str, str | None]] | None = None

    @property
    def attributes(self) -> dict[str, list[str]] | None:
        """The values of each attribute of the labels, in their order."""
        return None if self.labels is None else {name: list(values) for name, values in self.labels.items()}

    @property
    def has_captions(self) -> bool:
        return self.caption_column is not None

    def prepare_data(self) -> None:
        """Look at the data before a logger writes. Where there are several processes, all look, in ``setup``."""
        if self.trainer is not None and self.trainer.world_size == 1:
            self.setup(self.trainer.state.fn)


def check_whole(least: int, most: int, **values: Any) -> None:
    """Check settings of a data module, by name: whole numbers from ``least`` to ``most``.

    Raises:
        InputError: for the first that is not.
    """
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise InputError(f"data.{name}: got {shorten(value)}, expected a whole number from {least} to {most}")


def check_loading(size: Size, batch_size: int, num_workers: int) -> None:
    """Check what every data module of pictures has: see :func:`check_whole`."""
    to_pair(size)
    check_whole(1, MOST_PICTURES, batch_size=batch_size)
    check_whole(0, MOST_WORKERS, num_workers=num_workers)


def to_pair(size: Size) -> tuple[int, int]:
    """Height and width, where ``data.size`` is both or a pair of them.

    Raises:
        InputError: where it is neither, or out of range.
    """
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, Sequence) or len(pair) != 2:
        raise InputError(f"data.size: got {shorten(size)}, expected a whole number or a height and a width")
    for each in pair:
        check_whole(1, MOST_PIXELS, size=each)
    return pair[0], pair[1]


def check_channels(channels: int, known: Sequence[int]) -> None:
    """Raise :class:`InputError` where ``data.channels`` is not one of ``known``."""
    if channels not in known or isinstance(channels, bool):
        raise InputError(f"data.channels: got {shorten(channels)}, expected {' or '.join(map(str, known))}")


def check_training(count: int, batch_size: int, trainer: L.Trainer | None = None) -> None:
    """Check that ``count`` pictures make at least one batch on every process.

    Raises:
        InputError: where training would do nothing.
    """
    world = 1 if trainer is None else trainer.world_size
    share = count // world
    if share == 0:
        raise InputError(f"data: got {count} pictures to train on, expected {world} or more, one for each process")
    if batch_size > share:
        there = f"{count} pictures to train on" + (f" in {world} processes" if world > 1 else "")
        raise InputError(f"data.batch_size: got {batch_size}, expected {share} or less, since there are {there}")
    limit = 1.0 if trainer is None else trainer.limit_train_batches
    batches = share // batch_size
    if (limit if isinstance(limit, int) else int(batches * limit)) == 0:
        raise InputError(f"trainer.limit_train_batches: got {limit}, expected one or more of {batches} batches")


def load_from_hub(name: str, field: str, expected: str, **options: Any) -> Any:
    """``datasets.load_dataset`` for a name that can be one of a data set on the hub.

    Args:
        name: of the data set.
        field: the setting that holds it, for errors.
        expected: what the setting may be, for errors.
        options: for ``load_dataset``.

    Raises:
        InputError: where it is a file or a folder, no possible name (then no connection is tried), or not there.
    """
    refusal = f"{field}: got {shorten(name)}, expected {expected}"
    if os.path.lexists(name) or not HUB_NAME.fullmatch(name):
        raise InputError(refusal)
    from datasets import load_dataset

    try:
        return load_dataset(name, **options)
    except Exception as error:
        raise InputError(f"{refusal}; the hub gives no such data set ({first_line(error)})") from error


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
        collate_fn=_collate,
    )


def validation_loader(pictures: Dataset[dict], batch_size: int, num_workers: int) -> DataLoader:
    """Batches of all pictures in their order; the last may be smaller."""
    return _Loader(_Served(pictures), batch_size=batch_size, num_workers=num_workers, collate_fn=_collate)


@dataclass(frozen=True)
class _Fault:
    """What a worker says in place of a picture: an error that it raised would come with its traceback in the line."""

    message: str


class _Served(Dataset[dict]):
    """Items of a data set, or what is wrong with them."""

    def __init__(self, pictures: Dataset[dict]) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, position: int) -> dict | _Fault:
        try:
            return self.pictures[position]
        except InputError as error:
            return _Fault(str(error))


class _Mirrored(_Served):
    """Items of (position, whether to mirror), or of a position alone."""

    def __getitem__(self, drawn: tuple[int, bool] | int) -> dict | _Fault:
        position, mirror = drawn if isinstance(drawn, tuple) else (drawn, False)
        item = super().__getitem__(position)
        return item | {"image": item["image"].flip(-1)} if mirror and isinstance(item, dict) else item


def _collate(items: list[dict | _Fault]) -> Any:
    faults = [item for item in items if isinstance(item, _Fault)]
    return faults[0] if faults else default_collate(items)


class _Loader(DataLoader):
    """Raises in this process what is wrong with a picture."""

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            if isinstance(batch, _Fault):
                raise InputError(batch.message)
            yield batch


class _Shuffled(DistributedSampler):
    """Yields (position, whether to mirror), a function of seed and epoch; skips what ``skip`` says."""

    skip = 0

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        generator = torch.Generator().manual_seed((self.seed + self.epoch) % 2**63)
        order = torch.randperm(len(self.dataset), generator=generator).tolist()
        mirrored = (torch.rand(len(order), generator=generator) < 0.5).tolist()
        drawn = list(zip(order, mirrored, strict=True))[: self.total_size]
        return iter(drawn[self.rank :: self.num_replicas][self.skip :])


class _TrainingLoader(_Loader):
    """Knows its place within an epoch, which Lightning keeps in checkpoints.

    With ``overfit_batches`` Lightning puts another sampler in: then every epoch starts at the beginning.
    """

    _given = _start = 0

    def __iter__(self) -> Iterator[Any]:
        self._given, self._start = self._start, 0
        if isinstance(self.sampler, _Shuffled):
            self.sampler.skip = self._given * self.batch_size
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.sampler.seed, "batches": self._given} if isinstance(self.sampler, _Shuffled) else {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if isinstance(self.sampler, _Shuffled) and state:
            self.sampler.seed = state["seed"]
            self._start = state["batches"] % len(self)
