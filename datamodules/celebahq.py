"""Pictures of one's own: a folder, parquet, or a data set on the hub."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from clipward.datamodules.labels import check_classes, check_labels, read_labels
from clipward.datamodules.loading import (
    MOST_PICTURES,
    PictureDataModule,
    check_channels,
    check_loading,
    check_training,
    check_whole,
    to_pair,
    training_loader,
    validation_loader,
)
from clipward.datamodules.sources import EXPECTED, Sources, check_captions, open_rows, take_rows
from clipward.errors import InputError, shorten
from clipward.pictures import CONVERTERS, UnreadablePicture, check_picture, read_picture

VAL_SHARE, VAL_MOST = 0.02, 512


class CelebAHQDataModule(PictureDataModule):
    """Pictures, resized with antialiasing, cropped at the centre and flipped half of the time.

    PNG, JPEG, WebP, BMP, GIF and TIFF are read, turned upright by their EXIF; transparent parts become white, unless
    there are four channels.

    Args:
        path: a folder of pictures, a parquet file, or the name of a data set on the hub.
        size: height and width in pixels, or a pair of them. Of a picture with other proportions the middle is taken.
        batch_size: pictures a batch, on each device.
        num_workers: processes that read pictures; each keeps its own with ``cache``.
        split: of a data set on the hub.
        image_column: where the picture stands in parquet or a data set.
        caption_column: where its caption stands, if it has one. A row without a text in it is left out.
        labels: attributes of the pictures and their values, each with a column that is true of it, of booleans or
            numbers: ``{gender: {woman: not male, man: male}, hair: {black: black_hair, red: null}}``. Batches then have
            ``labels``: the position of a picture's value in this order, −1 where none or several are true.
        classes: the attribute of ``labels`` whose values are the classes of ``unet.num_classes``; a picture without one
            of them trains the null class.
        first: the first row to use, in the order of the data set, or of the names in a folder.
        count: how many rows to use; all that follow by default.
        val_count: pictures kept for validation, the last ones. By default a fiftieth, from 1 to 512, where that leaves
            a batch to train on. Where 0, the training pictures serve.
        cache: keep the resized pictures in memory (a byte for each pixel and channel).
        strict: refuse a file that can't be read and a row without a caption; else they are named, counted and left out.
        channels: 1 for grey, 3 for RGB or 4 for RGBA, as ``unet.image_channels`` of the model.

    Raises:
        InputError: for a number out of range, and in ``setup`` for data that can't be read or trained on.
    """

    def __init__(
        self,
        path: str | None = None,
        size: int | tuple[int, int] = 256,
        batch_size: int = 16,
        num_workers: int = 0,
        split: str = "train",
        image_column: str = "image",
        caption_column: str | None = None,
        labels: dict[str, dict[str, str | None]] | None = None,
        first: int = 0,
        count: int | None = None,
        val_count: int | None = None,
        cache: bool = False,
        strict: bool = False,
        channels: int = 3,
        classes: str | None = None,
    ) -> None:
        super().__init__()
        self.classes, self.class_names = classes, check_classes(classes, labels)
        check_loading(size, batch_size, num_workers)
        check_channels(channels, sorted(CONVERTERS))
        check_whole(1, MOST_PICTURES, count=1 if count is None else count)
        check_whole(0, MOST_PICTURES, first=first, val_count=0 if val_count is None else val_count)
        if labels is not None:
            check_labels(labels)
        self.path, self.size, self.batch_size, self.num_workers = path, size, batch_size, num_workers
        self.split, self.image_column, self.caption_column = split, image_column, caption_column
        self.labels, self.first, self.count, self.val_count = labels, first, count, val_count
        self.cache, self.strict, self.channels = cache, strict, channels
        self.train_set: Subset | None = None

    def setup(self, stage: str) -> None:
        if self.train_set is None:
            self._read()
        if stage == "fit":
            check_training(len(self.train_set), self.batch_size, self.trainer)

    def _read(self) -> None:
        rows = take_rows(open_rows(self.path, self.split, self.image_column), self.first, self.count)
        if self.caption_column is not None:
            check_captions(rows, self.caption_column)
        captions = None if self.caption_column is None else rows[self.caption_column]
        labels = None if self.labels is None else read_labels(rows, self.labels)
        sources = Sources(rows, self.image_column, self.first)
        good = self._choose(sources, captions)
        held_out = self.count_held_out(len(good))
        pictures = Pictures(sources, to_pair(self.size), captions, labels, self.cache, self.channels)
        pictures.class_column = None if self.classes is None else list(self.labels or {}).index(self.classes)
        self.train_set = Subset(pictures, good[: len(good) - held_out])
        self.val_set = Subset(pictures, good[len(good) - held_out :] or good)

    def _choose(self, sources: Sources, captions: Sequence[str | None] | None) -> list[int]:
        """Positions of the rows that can be trained on: by the headers of their pictures, and their captions."""
        captioned = [True] * len(sources) if captions is None else [bool(text and text.strip()) for text in captions]
        good, unreadable, silent = [], [], []
        for i, source in enumerate(sources):
            try:
                check_picture(source)
            except UnreadablePicture as error:
                unreadable.append(f"{sources.name(i)} ({error})")
                continue
            if captioned[i]:
                good.append(i)
            else:
                silent.append(sources.name(i))
        self._leave_out(unreadable, len(sources), "can't be read as pictures")
        self._leave_out(silent, len(sources), "have no caption")
        if not good:
            raise InputError(f"data.path: got {shorten(self.path)} without a picture to use; expected {EXPECTED}")
        return good

    def _leave_out(self, names: list[str], count: int, fault: str) -> None:
        if not names:
            return
        message = f"{len(names)} of {count} {fault}: {'; '.join(names[:3])}{'; …' if len(names) > 3 else ''}"
        if self.strict:
            raise InputError(f"data.path: {message}; use data.strict false to leave them out")
        rank_zero_warn(f"data.path: {message}; left out")

    def count_held_out(self, count: int) -> int:
        """How many of ``count`` pictures are kept for validation."""
        if self.val_count is None:
            share = max(1, min(VAL_MOST, int(VAL_SHARE * count)))
            return share if count - share >= self.batch_size else 0
        if self.val_count >= count:
            raise InputError(f"data.val_count: got {self.val_count}, expected less than the {count} pictures there are")
        return self.val_count

    def train_dataloader(self) -> DataLoader:
        return training_loader(self.train_set, self.batch_size, self.num_workers, self.trainer)

    def val_dataloader(self) -> DataLoader:
        return validation_loader(self.val_set, self.batch_size, self.num_workers)


class Pictures(Dataset[dict]):
    """Items are ``{"image": (C, H, W) in [-1, 1]}``, with a ``"caption"`` and ``"labels"`` where there are any.

    Args:
        sources: the pictures.
        size: height and width in pixels.
        captions: one for each, if there are any.
        labels: (N, attributes) in int64, likewise.
        cache: keep the resized pictures in memory.
        channels: C, as in :func:`clipward.pictures.read_picture`.
    """

    def __init__(
        self,
        sources: Sources,
        size: tuple[int, int],
        captions: Sequence[str | None] | None = None,
        labels: Tensor | None = None,
        cache: bool = False,
        channels: int = 3,
    ) -> None:
        self.sources, self.size, self.captions, self.labels = sources, size, captions, labels
        self.channels = channels
        self.class_column: int | None = None  # of the labels, which holds the class
        self._kept: dict[int, Tensor] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> dict:
        item: dict[str, Any] = {"image": self._pixels(index).float() / 127.5 - 1}
        if self.captions is not None:
            item["caption"] = self.captions[index]
        if self.labels is not None:
            item["labels"] = self.labels[index]
            if self.class_column is not None:
                item["class_label"] = self.labels[index, self.class_column]
        return item

    def _pixels(self, index: int) -> Tensor:
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        try:
            pixels = read_picture(self.sources[index], self.size, self.channels)
        except UnreadablePicture as error:
            raise InputError(
                f"data: got a damaged picture, {self.sources.name(index)} ({error}); remove it or mend it"
            ) from error
        if self._kept is not None:
            self._kept[index] = pixels
        return pixels
