"""Pictures of one's own: a folder, parquet, or a data set on the hub."""

import io
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2

from clipward.datamodules.loading import training_loader
from clipward.errors import InputError, first_line


class CelebAHQDataModule(L.LightningDataModule):
    """Pictures, resized with antialiasing, cropped at the centre and flipped half of the time.

    Args:
        path: a folder of pictures, a parquet file, or the name of a data set on the hub.
        size: height and width in pixels.
        batch_size: pictures a batch, on each device.
        num_workers: processes that read pictures; each keeps its own with ``cache``.
        split: of a data set on the hub.
        image_column: where the picture stands in parquet or a data set.
        caption_column: where its caption stands, if it has one.
        val_count: pictures kept for validation, the last ones; where 0, the training pictures serve.
        cache: keep the resized pictures in memory (3·size² bytes each).
        strict: refuse a file that is no picture; else it is named, counted and left out.
    """

    def __init__(
        self,
        path: str | None = None,
        size: int = 256,
        batch_size: int = 16,
        num_workers: int = 0,
        split: str = "train",
        image_column: str = "image",
        caption_column: str | None = None,
        val_count: int = 0,
        cache: bool = False,
        strict: bool = False,
    ) -> None:
        super().__init__()
        self.path, self.size, self.batch_size, self.num_workers = path, size, batch_size, num_workers
        self.split, self.image_column, self.caption_column = split, image_column, caption_column
        self.val_count, self.cache, self.strict = val_count, cache, strict

    def setup(self, stage: str) -> None:
        rows = self._rows()
        for column in filter(None, (self.image_column, self.caption_column)):
            if column not in rows.column_names:
                raise InputError(f"data: {self.path} has no column {column!r}; it has {', '.join(rows.column_names)}")
        good = self._pictures(rows)
        if len(good) <= self.val_count:
            raise InputError(f"val_count: {self.val_count} given; {self.path} has {len(good)} pictures")
        cut = len(good) - self.val_count
        pictures = Pictures(rows, self.size, self.image_column, self.caption_column, self.cache)
        self.train_set = Subset(pictures, good[:cut])
        self.val_set = Subset(pictures, good[cut:] or good)

    def _rows(self) -> Any:
        from datasets import Image as ImageFeature
        from datasets import load_dataset

        if self.path is None:
            raise InputError("data.path: none given; a folder of pictures, a parquet file or a data set would do")
        path = Path(self.path)
        if path.is_dir():
            files = sorted(str(f) for f in path.rglob("*") if f.suffix.lower() in Image.registered_extensions())
            if not files:
                raise InputError(f"data: {path} holds no pictures")
            from datasets import Dataset as Rows

            rows = Rows.from_dict({self.image_column: files})
        elif path.suffix == ".parquet":
            if not path.is_file():
                raise InputError(f"data: there is no file {path}")
            rows = load_dataset("parquet", data_files=str(path), split="train")
        else:
            try:
                rows = load_dataset(self.path, split=self.split)
            except Exception as error:
                raise InputError(
                    f"data: {self.path} is no folder or parquet file, and the hub gives no such data set "
                    f"({first_line(error)})"
                ) from error
        if self.image_column in rows.column_names:
            rows = rows.cast_column(self.image_column, ImageFeature(decode=False))
        return rows

    def _pictures(self, rows: Any) -> list[int]:
        """Positions of the rows that hold a picture, by their headers."""
        good, bad = [], []
        for i, row in enumerate(rows.select_columns(self.image_column)):
            try:
                _open(row[self.image_column])
                good.append(i)
            except (UnidentifiedImageError, OSError, TypeError):
                bad.append((row[self.image_column] or {}).get("path") or f"row {i}")
        if bad:
            message = f"{len(bad)} of {len(rows)} files are no pictures: {', '.join(bad[:5])}"
            if self.strict:
                raise InputError(f"data: {message}; strict: false would leave them out")
            warnings.warn(f"{message}{' …' if len(bad) > 5 else ''}; left out", stacklevel=2)
        return good

    def train_dataloader(self) -> DataLoader:
        if self.trainer is not None and len(self.train_set) < self.batch_size * self.trainer.world_size:
            raise InputError(
                f"batch_size: {self.batch_size} given; there are {len(self.train_set)} pictures to train on"
            )
        return training_loader(self.train_set, self.batch_size, self.num_workers, self.trainer)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, batch_size=self.batch_size, num_workers=self.num_workers)


class Pictures(Dataset[dict]):
    """Items are ``{"image": (3, size, size) in [-1, 1]}``, with a ``"caption"`` where there is a column of them."""

    def __init__(self, rows: Any, size: int, image_column: str, caption_column: str | None, cache: bool) -> None:
        self.rows, self.image_column, self.caption_column = rows, image_column, caption_column
        self.shape = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size), v2.PILToTensor()])
        self._kept: dict[int, Tensor] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        item: dict[str, Any] = {"image": self._pixels(index, row).float() / 127.5 - 1}
        if self.caption_column is not None:
            item["caption"] = row[self.caption_column]
        return item

    def _pixels(self, index: int, row: dict) -> Tensor:
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        source = row[self.image_column]
        try:
            pixels = self.shape(_open(source).convert("RGB"))
        except OSError as error:
            raise InputError(f"data: the picture {source.get('path') or index} is damaged ({error})") from error
        if self._kept is not None:
            self._kept[index] = pixels
        return pixels


def _open(source: dict[str, Any]) -> Image.Image:
    """What ``datasets`` gives for an undecoded picture: bytes, or a path."""
    return Image.open(io.BytesIO(source["bytes"]) if source["bytes"] is not None else source["path"])
