"""Requests from files and tables: what stands in each row is checked, and an error names the file and the row."""

import codecs
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipward.datamodules.edits import Edits
from clipward.datamodules.loading import load_from_hub
from clipward.datamodules.requests import Request, check_columns, check_text
from clipward.editing import Edit
from clipward.errors import InputError, first_line, shorten

EXPECTED = "a .txt, .jsonl or .parquet file or the name of a data set on the hub"
EXAMPLE = '{"text": "a man", "seed": 1}'
MOST_BYTES = 2**20  # of a line in a file

Part = tuple[str, Sequence[int], Sequence[float], Sequence[Edit | None]]


class Product:
    """Every seed × edit × (unguided, then text × weight), numbered from ``first`` on."""

    def __init__(
        self,
        texts: Sequence[str],
        weights: Sequence[float],
        seeds: Sequence[int],
        unguided: bool,
        edits: Sequence[Edit | None] = (None,),
        first: int = 0,
    ) -> None:
        for text in texts:
            if not check_text(text).strip():
                raise InputError(f"text: got {shorten(text)}, expected a sentence; leave it out for unguided pictures")
        if not texts and any(edit is not None and edit.image_prompt is not None for edit in edits):
            texts = [""]  # the picture guides alone
        plain = [("", 0.0)] if unguided or not texts else []
        self.first, self.seeds, self._edits = first, seeds, edits
        self.cells = plain + [(sentence, weight) for sentence in texts for weight in weights]

    def __len__(self) -> int:
        return len(self.seeds) * len(self._edits) * len(self.cells)

    def __iter__(self) -> Iterator[Request]:
        cells = (
            (text, seed, weight, edit) for seed in self.seeds for edit in self._edits for text, weight in self.cells
        )
        return (Request(index, *cell) for index, cell in enumerate(cells, start=self.first))

    def edits(self) -> Iterator[Edit | None]:
        """Those of the requests."""
        return iter(self._edits)


class Rows:
    """The requests of rows that come one after another, as many as there are.

    Args:
        rows: mappings with ``text``, and ``seed``, ``guidance_weight`` and an edit where they have their own.
        weights: of a row that has none.
        seeds: likewise.
        edits: likewise.
        source: what the rows are, for an error.

    Raises:
        InputError: when it is iterated, for a row that is no request, by its number.
    """

    def __init__(
        self,
        rows: Iterable[Any],
        weights: Sequence[float],
        seeds: Sequence[int],
        edits: Edits,
        source: str = "the data set",
    ) -> None:
        self.rows, self.weights, self.seeds, self.source = rows, weights, seeds, source
        self._edits = edits

    def __iter__(self) -> Iterator[Request]:
        index = 0
        for text, seeds, weights, edits in self._parts():
            for seed in seeds:
                for edit in edits:
                    for weight in weights:
                        yield Request(index, text, seed, weight, edit)
                        index += 1

    def edits(self) -> Iterator[Edit | None]:
        """Those of the requests."""
        return (edit for *_, edits in self._parts() for edit in edits)

    def _parts(self) -> Iterator[Part]:
        """The text, the seeds, the weights and the edits of each row, checked."""
        number = 0
        for number, row in self._numbered():
            with _name_row(number, self.source):
                parts = self._read(row)
            yield parts
        if number == 0:
            raise InputError(f"prompts: got {self.source} without a row, expected one or more")

    def _numbered(self) -> Iterator[tuple[int, Any]]:
        return enumerate(self.rows, start=1)

    def _read(self, row: Any) -> Part:
        if not isinstance(row, Mapping):
            raise InputError(f"got {shorten(row)}, expected a row such as {EXAMPLE}")
        check_columns(row)
        seed, weight = row.get("seed"), row.get("guidance_weight")
        seeds = self.seeds if seed is None else [seed]
        weights = self.weights if weight is None else [weight]
        text, edits = row.get("text", "" if "image_prompt" in row else None), self._edits.of_row(row)
        for each in weights:
            Request(0, text, seeds[0], each, edits[0])
        return text, seeds, weights, edits


class Counted(Rows):
    """The requests of rows that can be read again: all are checked, and counted, before the first is needed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.count, kinds = 0, set()
        for _, seeds, weights, edits in self._parts():
            self.count += len(seeds) * len(weights) * len(edits)
            kinds |= {edit and edit.kind for edit in edits}
        self.kinds = len(kinds)  # of edits

    def __len__(self) -> int:
        return self.count


class JsonLines(Counted):
    """The requests of a file with an object a line."""

    def _numbered(self) -> Iterator[tuple[int, Any]]:
        return iter(self.rows)

    def _read(self, row: str) -> Part:
        return super()._read(_parse(row))


def read_prompts(
    name: str, weights: Sequence[float], seeds: Sequence[int], unguided: bool, edits: Edits
) -> Product | Rows:
    """The requests of a file, or of a data set on the hub."""
    suffix = Path(name).suffix.lower()
    source = shorten(name)
    if suffix not in (".txt", ".jsonl", ".parquet"):
        rows = load_from_hub(name, "prompts", EXPECTED, split="train", streaming=True)
        if rows.column_names is not None:
            with _name_row(None, source):
                check_columns(rows.column_names)
        return Rows(_Stream(rows, source), weights, seeds, edits, source)
    if not os.path.isfile(name):
        what = f"got {source}, which is no regular file" if os.path.exists(name) else f"there is no file {source}"
        raise InputError(f"prompts: {what}; expected {EXPECTED}")
    if suffix == ".parquet":
        return Counted(_Table(name), weights, seeds, edits.beside(name), source)
    if suffix == ".jsonl":
        return JsonLines(_Lines(name), weights, seeds, edits.beside(name), source)
    texts = []
    for number, line in _Lines(name):
        with _name_row(number, source):
            texts.append(check_text(line))
    if not texts:
        raise InputError(f"prompts: got {source} without a text, expected a sentence a line")
    return Product(texts, weights, seeds, unguided, edits.default)


def read_rows(rows: Any, weights: Sequence[float], seeds: Sequence[int], edits: Edits) -> Rows:
    """The requests of what Python code gives."""
    if not isinstance(rows, Iterable) or isinstance(rows, Iterator | Mapping | bytes):
        raise InputError(
            f"prompts: got {shorten(rows)}, expected what gives rows whenever it is iterated, as a list does"
        )
    return (Counted if isinstance(rows, Sized) else Rows)(rows, weights, seeds, edits)


@contextmanager
def _name_row(number: int | None, source: str) -> Iterator[None]:
    """Name the row in what is said of it."""
    try:
        yield
    except InputError as error:
        row = "" if number is None else f"row {number} of "
        raise InputError(f"prompts: {row}{source}: {error}") from error


def _parse(line: str) -> Any:
    """The value of a line of JSON."""
    try:
        return json.loads(line, object_pairs_hook=_refuse_duplicates)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"got {shorten(line)}, which is no JSON ({first_line(error)}); expected {EXAMPLE}") from error


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise InputError(f"got {shorten(name)} twice, expected each key once")
        found[name] = value
    return found


class _Lines:
    """The lines of a file that are not empty, with their numbers, read again by each iterator."""

    def __init__(self, path: str) -> None:
        self.path, self.source = path, shorten(path)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        for number, line in enumerate(self._bytes(), start=1):
            with _name_row(number, self.source):
                text = _decode(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
            if text:
                yield number, text

    def _bytes(self) -> Iterator[bytes]:
        try:
            with open(self.path, "rb") as file:
                while chunk := file.readline(MOST_BYTES):
                    yield from chunk.splitlines()  # also at the ends of lines of old Macs
        except OSError as error:
            raise InputError(f"prompts: {self.source} can't be read ({first_line(error)})") from error


def _decode(line: bytes) -> str:
    if len(line) == MOST_BYTES:
        raise InputError(f"got {MOST_BYTES} bytes or more, expected a sentence or an object a line")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"got {shorten(line)}, which is not UTF-8; save the file as UTF-8") from error


class _Table:
    """The rows of a parquet file, read again by each iterator."""

    def __init__(self, path: str) -> None:
        self.path, self.source = path, shorten(path)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        from pyarrow import parquet

        number = 0
        try:
            with parquet.ParquetFile(self.path, buffer_size=MOST_BYTES) as file:
                names = file.schema_arrow.names
                with _name_row(None, self.source):
                    _refuse_duplicates([(name, None) for name in names])
                    check_columns(names)
                for batch in file.iter_batches(batch_size=1000):
                    for row in batch.to_pylist():
                        number += 1
                        yield row
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"prompts: {self.source} is no parquet file, or damaged after row {number} ({first_line(error)})"
            ) from error


class _Stream:
    """The rows of a data set on the hub."""

    def __init__(self, rows: Iterable[dict[str, Any]], source: str) -> None:
        self.rows, self.source = rows, source

    def __iter__(self) -> Iterator[dict[str, Any]]:
        number = 0
        try:
            for row in self.rows:
                number += 1
                yield row
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"prompts: {self.source} can't be read after row {number} ({first_line(error)})"
            ) from error
