"""Pictures from a data set that is read as it comes: shards of parquet, or a data set on the hub."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from clipward.datamodules.labels import (
    check_classes,
    check_label_columns,
    check_labels,
    choose_labels,
    list_label_columns,
)
from clipward.datamodules.loading import (
    MOST_PICTURES,
    PictureDataModule,
    check_channels,
    check_loading,
    check_whole,
    to_pair,
)
from clipward.datamodules.sources import check_captions, open_stream, to_source
from clipward.errors import InputError, shorten
from clipward.pictures import CONVERTERS, UnreadablePicture, read_picture

BATCH = 64  # rows that are read at once


class StreamDataModule(PictureDataModule):
    """Pictures of a data set that is read row by row and never as a whole, so that it may be of any size.

    The shards are shuffled again for each pass, and dealt to the processes and their workers; where there are fewer
    shards than workers, each worker takes every n-th row of all. Rows are shuffled within blocks of ``shuffle_buffer``.
    The stream has no end: ``trainer.max_steps`` is the length of the only epoch.

    A run that is continued goes on with the batch that would have come next, exactly, with the same numbers of
    processes and workers. For that, each worker reads the rows of its pass again up to there, undecoded.

    Args:
        path: a parquet file, a pattern of them such as ``shards/*.parquet``, or the name of a data set on the hub.
        size: height and width in pixels, or a pair of them.
        batch_size: pictures a batch, on each device.
        num_workers: processes that read.
        split: of a data set on the hub.
        image_column: where the picture stands.
        caption_column: where its caption stands, if it has one. A row without a text in it is left out.
        labels: attributes of the pictures, their values and the columns of these, as in
            :class:`clipward.datamodules.celebahq.CelebAHQDataModule`.
        classes: the attribute of ``labels`` whose values are the classes of ``unet.num_classes``.
        shuffle_buffer: rows of a block, undecoded, in the memory of each worker.
        val_count: pictures to validate on, the first of the first shard, which are not trained on.
        channels: 1 for grey, 3 for RGB or 4 for RGBA.

    Raises:
        InputError: for a number out of range, and in ``setup`` for data that can't be read.
    """

    def __init__(
        self,
        path: str | None = None,
        size: int | tuple[int, int] = 256,
        batch_size: int = 16,
        num_workers: int = 0,
        split: str = "train",
        image_column: str = "image",
        shuffle_buffer: int = 1000,
        val_count: int = 64,
        channels: int = 3,
        caption_column: str | None = None,
        labels: dict[str, dict[str, str | None]] | None = None,
        classes: str | None = None,
    ) -> None:
        super().__init__()
        self.class_names = check_classes(classes, labels)
        check_loading(size, batch_size, num_workers)
        check_whole(1, MOST_PICTURES, shuffle_buffer=shuffle_buffer, val_count=val_count)
        check_channels(channels, sorted(CONVERTERS))
        self.path, self.size, self.batch_size, self.num_workers = path, size, batch_size, num_workers
        self.split, self.image_column, self.shuffle_buffer = split, image_column, shuffle_buffer
        self.val_count, self.channels = val_count, channels
        if labels is not None:
            check_labels(labels)
        self.caption_column, self.labels, self.classes = caption_column, labels, classes
        self.rows: Any = None

    def setup(self, stage: str) -> None:
        if self.rows is None:
            rows = open_stream(self.path, self.split, self.image_column)
            columns = [self.image_column]
            if self.caption_column is not None:
                check_captions(rows, self.caption_column)
                columns.append(self.caption_column)
            if self.labels is not None:
                check_label_columns(rows, self.labels)
                columns += list_label_columns(self.labels)
            self.rows = rows.select_columns(list(dict.fromkeys(columns)))
        if stage == "fit" and self.trainer is not None and self.trainer.max_steps < 1:
            raise InputError(
                f"trainer.max_steps: got {self.trainer.max_steps}, expected 1 or more, since a stream has no end"
            )

    def train_dataloader(self) -> DataLoader:
        rank, world, seed = 0, 1, torch.initial_seed()
        if self.trainer is not None:
            rank, world = self.trainer.global_rank, self.trainer.world_size
            seed = self.trainer.strategy.broadcast(seed)
        stream = _Stream(self, rank, world, seed)
        steps = 1 if self.trainer is None else self.trainer.max_steps * self.trainer.accumulate_grad_batches
        return _StreamLoader(stream, steps, self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """Batches of the first pictures, read again each time."""
        columns = next(self.rows.shard(self.rows.num_shards, 0).iter(self.val_count), {self.image_column: []})
        items = [item for item in map(self.read, to_rows(columns)) if item is not None]
        if not items:
            raise InputError(f"data.path: got {shorten(self.path)} without a picture to validate on")
        return DataLoader(items, batch_size=self.batch_size)  # type: ignore[arg-type]  # a list is a data set

    def read(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """The picture of a row, (C, H, W) in [-1, 1], its caption, labels and class, where there are any.

        It is None, with a warning, for what is no picture or has no caption.
        """
        caption = None if self.caption_column is None else row[self.caption_column]
        if self.caption_column is not None and not (caption and caption.strip()):
            rank_zero_warn(f"data.path: a row of {shorten(self.path)} has no caption; left out")
            return None
        try:
            source = to_source(row[self.image_column])
            item: dict[str, Any] = {
                "image": read_picture(source, to_pair(self.size), self.channels).float() / 127.5 - 1
            }
        except UnreadablePicture as error:
            rank_zero_warn(f"data.path: a row of {shorten(self.path)} can't be read as a picture ({error}); left out")
            return None
        if caption is not None:
            item["caption"] = caption
        if self.labels is not None:
            item["labels"] = choose_labels({name: [value] for name, value in row.items()}, self.labels, 1)[0]
            if self.classes is not None:
                item["class_label"] = item["labels"][list(self.labels).index(self.classes)]
        return item


class _Stream(IterableDataset):
    """Batches of one worker, without end, each with the worker's number and the place behind it.

    A place is (pass, block of the pass, pictures of the block that were given). Blocks are counted, and not rows, so
    that going on needs no more than to skip the rows of the blocks before, which are not decoded.
    """

    def __init__(self, data: StreamDataModule, rank: int, world: int, seed: int) -> None:
        self.data, self.rank, self.world, self.seed = data, rank, world, seed
        self.places: dict[int, tuple[int, int, int]] = {}  # where each worker goes on
        self.first = 0  # the worker whose turn it is

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        number, workers = (0, 1) if info is None else (info.id, info.num_workers)
        own = (number + self.first) % workers  # a loader begins with its worker 0, whoever's turn it is
        batch: list[dict[str, Any]] = []
        for item, place in self._items(own, workers, *self.places.get(own, (0, 0, 0))):
            batch.append(item)
            if len(batch) == self.data.batch_size:
                yield default_collate(batch) | {"worker": own, "place": place}
                batch = []

    def _items(
        self, own: int, workers: int, epoch: int, block: int, given: int
    ) -> Iterator[tuple[dict[str, Any], tuple[int, int, int]]]:
        while True:
            whole, found = (block, given) == (0, 0), False
            for number, rows in self._blocks(epoch, block, self.rank * workers + own, self.world * workers):
                generator = torch.Generator().manual_seed((self.seed + 1000003 * epoch + 7919 * number) % 2**63)
                order = torch.randperm(len(rows), generator=generator).tolist()
                mirrored = (torch.rand(len(rows), generator=generator) < 0.5).tolist()
                for at in range(given, len(rows)):
                    item = self.data.read(rows[order[at]])
                    if item is not None:
                        found = True
                        if mirrored[at]:
                            item["image"] = item["image"].flip(-1)
                        yield item, (epoch, number, at + 1)
                given = 0
            if whole and not found:
                raise InputError(
                    f"data.val_count: got {self.data.val_count}, expected fewer, so that each worker has pictures left"
                )
            epoch, block, given = epoch + 1, 0, 0

    def _blocks(self, epoch: int, first: int, consumer: int, consumers: int) -> Iterator[tuple[int, list[Any]]]:
        block: list[Any] = []
        number = 0
        for row in self._rows(epoch, consumer, consumers):
            block.append(row)
            if len(block) == self.data.shuffle_buffer:
                if number >= first:
                    yield number, block
                number, block = number + 1, []
        if block and number >= first:
            yield number, block

    def _rows(self, epoch: int, consumer: int, consumers: int) -> Iterator[dict[str, Any]]:
        """The rows of one consumer in one pass, undecoded."""
        rows, count = self.data.rows, self.data.rows.num_shards
        generator = torch.Generator().manual_seed((self.seed + epoch) % 2**63)
        order = torch.randperm(count, generator=generator).tolist()
        whole = count >= consumers
        at = 0
        for shard in order[consumer::consumers] if whole else order:
            place = 0
            for part in rows.shard(count, shard).iter(BATCH):  # which knows nothing of workers, as its rows would
                for row in to_rows(part):
                    place += 1
                    if shard == 0 and place <= self.data.val_count:
                        continue
                    at += 1
                    if whole or at % consumers == consumer:
                        yield row


def to_rows(columns: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """The rows of a table that is given by its columns."""
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


class _StreamLoader(DataLoader):
    """Knows the place of each worker, which Lightning keeps in checkpoints.

    Args:
        stream: the batches.
        length: what it says of its length, since Lightning reads ahead where it knows none.
        num_workers: processes that read.
    """

    def __init__(self, stream: _Stream, length: int, num_workers: int) -> None:
        super().__init__(stream, batch_size=None, num_workers=num_workers)
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        stream: Any = self.dataset
        workers = max(1, self.num_workers)
        for batch in super().__iter__():
            own = batch.pop("worker")
            stream.places[own], stream.first = batch.pop("place"), (own + 1) % workers
            yield batch

    def state_dict(self) -> dict[str, Any]:
        stream: Any = self.dataset
        return {"places": dict(stream.places), "first": stream.first, "seed": stream.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        stream: Any = self.dataset
        stream.places, stream.first, stream.seed = dict(state["places"]), state["first"], state["seed"]
