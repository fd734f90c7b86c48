"""Requests from files and tables: what stands in each row is checked, and an error names the file and the row."""

import codecs
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

from clipward.datamodules.edits import Edits
from clipward.datamodules.loading import load_from_hub
from clipward.datamodules.requests import Request, check_columns, check_request
from clipward.editing import Edit, has_picture
from clipward.errors import InputError, first_line, shorten
from clipward.texts import FAULTY, MARKS, check_text
from clipward.values import ClassLabel, check_label

EXPECTED = "a .txt, .jsonl or .parquet file or the name of a data set on the hub"
EXAMPLE = '{"text": "a man", "seed": 1}'
MOST_BYTES = 2**20  # of a line in a file

Part = tuple[str, Sequence[int], Sequence[float], Sequence[Edit | None], ClassLabel]


class Product:
    """Every seed × edit × (unguided, then text × weight).

    Args:
        texts: what can be iterated again and has a length; each is checked here, unless they come from a file, which
            checks its own.
        weights: of each text.
        seeds: outermost.
        unguided: whether each seed comes without a text too.
        edits: of each seed.
        first: the index of the first request.
    """

    def __init__(
        self,
        texts: Collection[str],
        weights: Sequence[float],
        seeds: Sequence[int],
        unguided: bool,
        edits: Sequence[Edit | None] = (None,),
        first: int = 0,
    ) -> None:
        for text in [] if isinstance(texts, _Texts) else texts:
            if not check_text(text).strip():
                raise InputError(f"text: got {shorten(text)}, expected a sentence; leave it out for unguided pictures")
        if not texts and any(map(has_picture, edits)):
            texts = [""]  # the picture guides alone
        self.texts, self.weights, self.seeds, self._edits, self.first = texts, weights, seeds, edits, first
        self.kinds = 1  # of edits, which differ in their picture alone
        self.plain = unguided or not texts

    def __len__(self) -> int:
        return len(self.seeds) * len(self._edits) * (self.plain + len(self.texts) * len(self.weights))

    def __iter__(self) -> Iterator[Request]:
        cells = (
            (text, seed, weight, edit) for seed in self.seeds for edit in self._edits for text, weight in self._cells()
        )
        return (Request(index, *cell) for index, cell in enumerate(cells, start=self.first))

    def _cells(self) -> Iterator[tuple[str, float]]:
        if self.plain:
            yield "", 0.0
        for text in self.texts:
            for weight in self.weights:
                yield text, weight

    def guiding_texts(self) -> Iterator[str]:
        """The texts of all requests that are guided, each at least once."""
        return iter(self.texts if any(self.weights) else ())

    def all_texts(self) -> Iterator[str]:
        """The texts of all requests, each at least once, whatever their weight."""
        return iter(self.texts)

    def has_texts(self) -> bool:
        """Whether a picture is compared with a text, or with a picture in its place."""
        return bool(self.texts)

    def edits(self) -> Iterator[Edit | None]:
        """Those of the requests."""
        return iter(self._edits)

    def labels(self) -> Iterator[ClassLabel]:
        """The class labels of the requests, each at least once."""
        return iter([None])


class Rows:
    """The requests of rows that come one after another, as many as there are.

    Args:
        rows: mappings with ``text``, and ``seed``, ``guidance_weight``, ``class_label`` and an edit where they have
            their own.
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
        self.first, self.kinds = 0, 1  # kinds of edits that are known

    def __iter__(self) -> Iterator[Request]:
        index = 0
        for text, seeds, weights, edits, label in self._parts():
            for seed in seeds:
                for edit in edits:
                    for weight in weights:
                        yield Request(index, text, seed, weight, edit, label)
                        index += 1

    def guiding_texts(self) -> Iterator[str]:
        """The texts of all requests that are guided, each at least once."""
        return (text for text, _, weights, *_ in self._parts() if any(weights))

    def all_texts(self) -> Iterator[str]:
        """The texts of all requests, each at least once, whatever their weight."""
        return (text for text, *_ in self._parts())

    def has_texts(self) -> bool:
        """Whether a picture is compared with a text, or with a picture in its place."""
        return any(text or any(map(has_picture, edits)) for text, _, _, edits, _ in self._parts())

    def edits(self) -> Iterator[Edit | None]:
        """Those of the requests."""
        return (edit for *_, edits, _ in self._parts() for edit in edits)

    def labels(self) -> Iterator[ClassLabel]:
        """The class labels of the requests, each at least once."""
        return (label for *_, label in self._parts())

    def _parts(self) -> Iterator[Part]:
        """The text, the seeds, the weights, the edits and the class label of each row, checked."""
        number = 0
        for number, row in self._numbered():
            try:
                parts = self._read(row)
            except InputError as error:
                raise _name_row(error, self.source, number) from error
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
            check_request(text, seeds[0], each, edits[0])
        return text, seeds, weights, edits, check_label(row.get("class_label"))


class Counted(Rows):
    """The requests of rows that can be read again: all are checked, and counted, before the first is needed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.count, kinds = 0, set()
        self._labels: set[ClassLabel] = set()
        for _, seeds, weights, edits, label in self._parts():
            self.count += len(seeds) * len(weights) * len(edits)
            kinds |= {edit and edit.kind for edit in edits}
            self._labels.add(label)
        self.kinds = len(kinds)  # of edits

    def __len__(self) -> int:
        return self.count

    def labels(self) -> Iterator[ClassLabel]:
        return iter(self._labels)


Requests = Product | Rows


class JsonLines(Counted):
    """The requests of a file with an object a line."""

    def _numbered(self) -> Iterator[tuple[int, Any]]:
        return iter(self.rows)

    def _read(self, row: str) -> Part:
        return super()._read(_parse(row))


def read_prompts(name: str, weights: Sequence[float], seeds: Sequence[int], unguided: bool, edits: Edits) -> Requests:
    """The requests of a file, or of a data set on the hub."""
    suffix = Path(name).suffix.lower()
    source = shorten(name)
    if suffix not in (".txt", ".jsonl", ".parquet"):
        rows = load_from_hub(name, "prompts", EXPECTED, split="train", streaming=True)
        if rows.column_names is not None:
            try:
                check_columns(rows.column_names)
            except InputError as error:
                raise _name_row(error, source) from error
        return Rows(_Stream(rows, source), weights, seeds, edits, source)
    if not os.path.isfile(name):
        what = f"got {source}, which is no regular file" if os.path.exists(name) else f"there is no file {source}"
        raise InputError(f"prompts: {what}; expected {EXPECTED}")
    if suffix == ".parquet":
        return Counted(_Table(name), weights, seeds, edits.beside(name), source)
    if suffix == ".jsonl":
        return JsonLines(_Lines(name), weights, seeds, edits.beside(name), source)
    texts = _Texts(name)
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


def _name_row(error: InputError, source: str, number: int | None = None) -> InputError:
    """The error with the row in its message."""
    row = "" if number is None else f"row {number} of "
    return InputError(f"prompts: {row}{source}: {error}")


def _parse(line: str) -> Any:
    """The value of a line of JSON."""
    try:
        return DECODER.decode(line)
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


DECODER = json.JSONDecoder(object_pairs_hook=_refuse_duplicates)  # json.loads makes one a line


class _Lines:
    """The lines of a file that are not empty, with their numbers, read again by each iterator."""

    def __init__(self, path: str) -> None:
        self.path, self.source = path, shorten(path)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        for number, line in enumerate(self._bytes(), start=1):
            try:
                text = _decode(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
            except InputError as error:
                raise _name_row(error, self.source, number) from error
            if text:
                yield number, text

    def _bytes(self) -> Iterator[bytes]:
        try:
            with open(self.path, "rb") as file:
                while chunk := file.readline(MOST_BYTES):
                    yield from chunk.splitlines()  # also at the ends of lines of old Macs
        except OSError as error:
            raise InputError(f"prompts: {self.source} can't be read ({first_line(error)})") from error


class _Texts:
    """The texts of a file with one a line: checked and counted at once, and read again by each iterator."""

    def __init__(self, path: str) -> None:
        self.lines = _Lines(path)
        count = self._count_quickly()
        self.count = sum(1 for _ in self._checked()) if count is None else count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[str]:
        return (text for _, text in self.lines)

    def __contains__(self, text: object) -> bool:
        return any(text == each for each in self)

    def _checked(self) -> Iterator[str]:
        for number, line in self.lines:
            try:
                yield check_text(line)
            except InputError as error:
                raise _name_row(error, self.lines.source, number) from error

    def _count_quickly(self) -> int | None:
        """Count the texts a block at a time; None where a block has anything that must be looked at line by line."""
        count = 0
        try:
            with open(self.lines.path, "rb") as file:
                while block := file.read(MOST_BYTES):
                    block += file.readline(MOST_BYTES)
                    if not block.endswith(b"\n") and file.read(1):
                        return None
                    text = block.decode()
                    lines = text.replace("\r", "\n").split("\n")
                    if FAULTY.search(text) or len(max(lines, key=len)) > MOST_BYTES // 4:
                        return None
                    for line in filter(MARKS.search, lines) if MARKS.search(text) else ():
                        check_text(line.strip())
                    count += sum(map(bool, map(str.strip, lines)))
        except (OSError, UnicodeDecodeError, InputError):
            return None
        return count


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
                try:
                    _refuse_duplicates([(name, None) for name in names])
                    check_columns(names)
                except InputError as error:
                    raise _name_row(error, self.source) from error
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
