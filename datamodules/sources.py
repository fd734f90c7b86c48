"""Where pictures stand: the files of a folder, the rows of a parquet file, a data set on the hub."""

import glob
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clipward.datamodules.loading import load_from_hub
from clipward.errors import InputError, first_line, list_names, shorten
from clipward.pictures import SUFFIXES

METADATA = "metadata.jsonl"
STREAMED = "parquet files, such as shards/*.parquet, or the name of a data set on the hub"
EXPECTED = "a folder of pictures, a parquet file or the name of a data set on the hub"


def open_rows(path: str | None, split: str, image_column: str) -> Any:
    """Open the rows that have the pictures, undecoded: a ``datasets.Dataset``, or a :class:`Folder`.

    Args:
        path: a folder, a parquet file, or the name of a data set on the hub.
        split: of a data set on the hub.
        image_column: the column of the pictures.

    Raises:
        InputError: where there are no rows, or no such column of pictures.
    """
    if not path:
        raise InputError(f"data.path: got none, expected {EXPECTED}")
    if os.path.isdir(path):
        return Folder(Path(path), image_column)
    if Path(path).suffix.lower() == ".parquet":
        rows = _read_parquet(Path(path))
    else:
        rows = load_from_hub(path, "data.path", EXPECTED, split=split)
    return _keep_undecoded(rows, image_column)


def open_stream(path: str | None, split: str, image_column: str) -> Any:
    """Open the rows that have the pictures, undecoded, as a ``datasets.IterableDataset``.

    Args:
        path: a parquet file, a pattern of them, or the name of a data set on the hub.
        split: of a data set on the hub.
        image_column: the column of the pictures.

    Raises:
        InputError: where there are no rows, or no such column of pictures.
    """
    if not path:
        raise InputError(f"data.path: got none, expected {STREAMED}")
    if path.lower().endswith(".parquet"):
        from datasets import load_dataset

        files = sorted(glob.glob(path, recursive=True))
        if not files:
            raise InputError(f"data.path: there is no file {shorten(path)}")
        try:
            names = [glob.escape(file) for file in files]
            rows = load_dataset("parquet", data_files=names, split="train", streaming=True)
        except Exception as error:
            raise InputError(
                f"data.path: got {shorten(path)}, a damaged parquet file ({first_line(error)}); expected {STREAMED}"
            ) from error
    else:
        rows = load_from_hub(path, "data.path", STREAMED, split=split, streaming=True)
    return _keep_undecoded(rows, image_column)


def _keep_undecoded(rows: Any, image_column: str) -> Any:
    """The rows with their pictures as paths or bytes.

    Raises:
        InputError: where there is no such column, or it has no pictures.
    """
    kind = find_column(rows, "image_column", image_column)
    from datasets import Image

    try:
        return rows.cast_column(image_column, Image(decode=False))
    except Exception as error:
        raise InputError(
            f"data.image_column: got {shorten(image_column)}, a column of {shorten(kind)}, expected pictures"
        ) from error


def find_column(rows: Any, field: str, column: str) -> str:
    """The type of a column that ``field`` of the data module names.

    Raises:
        InputError: where the rows have no such column.
    """
    if isinstance(rows, Folder):
        raise InputError(f"data.{field}: got {shorten(column)}, expected none, since a folder has pictures alone")
    if column not in rows.column_names:
        known = list_names(rows.column_names)
        raise InputError(f"data.{field}: got {shorten(column)}, expected a column of the data: {known}")
    return str(getattr(rows.features[column], "dtype", rows.features[column]))


def take_rows(rows: Any, first: int, count: int | None) -> Any:
    """The ``count`` rows from ``first`` on, or all of them.

    Raises:
        InputError: where there are fewer.
    """
    left = len(rows) - first
    if left < 1:
        raise InputError(f"data.first: got {first}, expected less than the {len(rows)} rows there are")
    if count is not None and count > left:
        raise InputError(f"data.count: got {count}, expected {left} or less, the rows that there are from {first} on")
    return rows.select(range(first, first + (left if count is None else count)))


class Folder:
    """The picture files of a folder and of those below it, by name, as rows of one column.

    Args:
        path: the folder.
        column: what the column is called.
        names: of the files, below ``path``; by default those that its ``metadata.jsonl`` names, or without one all that
            have a picture's suffix.
        field: the setting that names it, for errors.

    Raises:
        InputError: where there are none.
    """

    def __init__(self, path: Path, column: str, names: Sequence[str] | None = None, field: str = "data.path") -> None:
        self.path, self.column, self.field = path, column, field
        self.names = self._scan() if names is None else names
        if not self.names:
            expected = EXPECTED if field == "data.path" else "a picture or a folder of them"
            raise InputError(f"{field}: got {shorten(path)}, which holds no pictures; expected {expected}")

    def _scan(self) -> list[str]:
        if (self.path / METADATA).is_file():
            return self._listed()
        found = (file for file in self.path.rglob("*") if file.suffix.lower() in SUFFIXES and not os.path.isdir(file))
        return sorted(str(file.relative_to(self.path)) for file in found)

    def _listed(self) -> list[str]:
        """The files that ``metadata.jsonl`` names, as ``predict`` and imagefolders have it: not a grid beside them."""
        try:
            lines = (self.path / METADATA).read_text(encoding="utf-8").split("\n")  # a text may have other breaks
            names = [str(json.loads(line)["file_name"]) for line in lines if line.strip()]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            message = f"{self.field}: got {shorten(self.path)}, whose {METADATA} can't be read ({first_line(error)})"
            raise InputError(message) from error
        outside = next((name for name in names if os.path.isabs(name) or ".." in Path(name).parts), None)
        if outside is not None:
            reason = f"whose {METADATA} names {shorten(outside)}; expected files in it"
            raise InputError(f"{self.field}: got {shorten(self.path)}, {reason}")
        return sorted(set(names))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, dict[str, Any]]:
        return {self.column: {"bytes": None, "path": str(self.path / self.names[index])}}

    def select(self, indices: range) -> "Folder":
        return Folder(self.path, self.column, self.names[indices.start : indices.stop])


def check_captions(rows: Any, column: str) -> None:
    """Raise :class:`InputError` where rows have no such column of texts."""
    kind = find_column(rows, "caption_column", column)
    if kind not in ("string", "large_string", "null"):
        raise InputError(f"data.caption_column: got {shorten(column)}, a column of {shorten(kind)}, expected texts")


class Sources:
    """The pictures of rows, undecoded: the path of a file, or its bytes.

    Args:
        rows: with what ``datasets`` has for an undecoded picture.
        column: of the pictures.
        first: the number of the first row, for names.
    """

    def __init__(self, rows: Any, column: str, first: int = 0) -> None:
        self.rows = rows if isinstance(rows, Folder) else rows.select_columns(column)
        self.column, self.first = column, first

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str | bytes:
        return to_source(self.rows[index][self.column])

    def __iter__(self) -> Iterator[str | bytes]:
        return (to_source(row[self.column]) for row in self.rows)

    def name(self, index: int) -> str:
        """What a message calls a picture: its file or its row, in at most 40 characters."""
        if isinstance(self.rows, Folder):
            return list_names([self.rows.names[index]])
        path = (self.rows[index][self.column] or {}).get("path")
        return f"row {self.first + index}" + (f", {list_names([path])}" if path else "")


def to_source(cell: dict[str, Any] | None) -> str | bytes:
    """What ``datasets`` has for an undecoded picture: bytes, or else a path."""
    if cell is None:
        return b""
    return (cell["path"] or b"") if cell["bytes"] is None else cell["bytes"]


def _read_parquet(path: Path) -> Any:
    if not os.path.isfile(path):  # also where the name is too long for one
        raise InputError(f"data.path: there is no file {shorten(path)}")
    from datasets import load_dataset
    from datasets.utils import logging
    from pyarrow import parquet

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it would print a line of its own
    try:
        parquet.read_metadata(path)
        return load_dataset("parquet", data_files=glob.escape(str(path)), split="train")
    except Exception as error:
        reason = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        raise InputError(
            f"data.path: got {shorten(path)}, a damaged parquet file ({reason}); expected {EXPECTED}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
