"""A folder of pictures and their metadata: a PNG for each picture, or shards of many."""

import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from clipward.errors import InputError
from clipward.files import atomic_write, hide_bars, remove_leftovers

Output = Literal["files", "webdataset", "parquet"]
SUFFIX = {"webdataset": "tar", "parquet": "parquet"}
METADATA = "metadata.jsonl"
CONFIG_FILE = "config.predict.yaml"
GRID = "grid.png"
PAGE = "gallery.html"
LOCK = ".clipward.lock"
PROGRESS = "progress"  # the folder of filmstrips and animations
PICTURES_PER_FOLDER = 10_000  # the first lie in the folder itself, the others in numbered ones within it
STAGING = ".staged"
MARK = "clipward"  # the text field of our PNGs
PAGE_MARK = b"<!doctype html>\n<!-- clipward gallery -->\n"  # how our page begins
# fields of metadata that differ from picture to picture
PER_PICTURE = ("file_name", "index", "clip_similarity", "float32_retries", "shard", "filmstrip", "animation")
# all fields of metadata and their types in parquet, where the shards of a data set must have the same columns
TEXT, WHOLE, NUMBER, YES = "string", "int64", "float64", "bool"
COLUMNS: dict[str, str | list[Any]] = {
    "file_name": TEXT,
    "index": WHOLE,
    "text": TEXT,
    "seed": WHOLE,
    "guidance_weight": NUMBER,
    "class_label": TEXT,  # also the number of a class without a name
    "class_weight": NUMBER,
    "clip_similarity": NUMBER,
    "init_image": TEXT,
    "init_image_sha256": TEXT,
    "strength": NUMBER,
    "mask": TEXT,
    "mask_sha256": TEXT,
    "outpaint": [NUMBER],
    "invert": YES,
    "round_trip_error": NUMBER,
    "image_prompt": TEXT,
    "image_prompt_sha256": TEXT,
    "method": TEXT,
    "steps": WHOLE,
    "skip_type": TEXT,
    "sampler": TEXT,
    "ddim_eta": NUMBER,
    "by_weights": [TEXT],
    "repeats": WHOLE,
    "candidates": WHOLE,
    "interval": [NUMBER],
    "weight_schedule": TEXT,
    "batch_multiple": WHOLE,
    "var_type": TEXT,
    "clip_denoised": YES,
    "dynamic_thresholding_ratio": NUMBER,
    "sample_max_value": NUMBER,
    "float32_retries": WHOLE,
    "weights": TEXT,
    "weights_hash": TEXT,
    "use_ema": YES,
    "clip": TEXT,
    "clip_hash": TEXT,
    "clips": [TEXT],
    "clip_weights": [NUMBER],
    "noisy_clip": TEXT,
    "noisy_clip_hash": TEXT,
    "classifier": TEXT,
    "classifier_hash": TEXT,
    "contrasts": [[TEXT]],
    "neutral": TEXT,
    "negative_text": TEXT,
    "compile": YES,
    "precision": TEXT,
    "device": TEXT,
    "threads": WHOLE,
    "clipward": TEXT,
    "torch": TEXT,
    "lightning": TEXT,
    "open_clip_torch": TEXT,
    "shard": TEXT,
}

PNG_NAME = r"[0-9]{6,}\.png"
WEBP_NAME = r"[0-9]{6,}\.webp"
SHARD_NAME = r"[0-9]{9,}\.(?:tar|parquet)"
LINES_NAME = r"\.metadata\.[0-9]+\.jsonl"
TEMPORARY = "|".join([PNG_NAME, WEBP_NAME, SHARD_NAME, *map(re.escape, (METADATA, CONFIG_FILE, GRID, PAGE))])
HIDDEN = re.compile(rf"\.(?:{TEMPORARY})\.[0-9]+|{LINES_NAME}|{re.escape(LOCK)}")
FILE_NAME = re.compile(rf"{TEMPORARY}|{HIDDEN.pattern}")
FOLDER_NAME = re.compile(rf"{re.escape(STAGING)}|{PROGRESS}|[0-9]{{5}}")


class Gallery:
    """Writes pictures to a folder, and knows which are there.

    A picture counts as written when its line of metadata and a whole file of it are there. Each process writes the
    lines to a file of its own until :meth:`merge`, and a line before the file that it names: so all files of ours are
    named, and no other file is ever removed or replaced. A shard is packed from PNGs that are on the disk already, so
    that a run which is stopped loses none.

    Args:
        path: the folder.
        output: ``files`` for a PNG for each picture, or the format of the shards.
        rank: the rank of this process.
        progress: whether pictures on their way are written too.
    """

    def __init__(self, path: Path, output: Output = "files", rank: int = 0, progress: bool = False) -> None:
        self.path, self.output, self.rank, self.progress = path, output, rank, progress
        self.staged: list[dict[str, Any]] = []  # the rows of this process that are not packed yet
        self._whole: dict[str, tuple[int, int]] = {}  # size and time of the files that were found whole
        self._opened: dict[str, tuple[int, int]] = {}  # and of those whose pictures were opened
        self._damaged: set[str] = set()
        self._table: tuple[Path, Any] | None = None  # the parquet shard that was read last

    def add(self, row: dict[str, Any], picture: Image.Image, frames: Sequence[Image.Image] = ()) -> None:
        """Write the line of metadata, which is ``row`` with the picture's ``index``, and then the picture.

        Args:
            row: the metadata.
            picture: its pixels.
            frames: what it looked like on its way; they become a filmstrip and an animation in the folder ``progress``.
        """
        row = {"file_name": picture_name(row["index"], self.output == "files"), **row}
        names = progress_names(row["index"]) if frames else {}
        self._append([row | names])
        if frames:  # before the picture, which says that all of them are there
            save_png(self.path / names["filmstrip"], draw_filmstrip(frames), to_line(row), clear=False)
            save_animation(self.path / names["animation"], frames, to_line(row))
        # without the names, so that a picture is the same to the byte whether its way is kept or not
        save_png(self.path / row["file_name"], picture, to_line(row), clear=False)
        if self.output != "files":
            self.staged.append(row)

    def pack(self, rows: list[dict[str, Any]]) -> None:
        """Move pictures from their PNGs into a shard, which has the number of the first of them.

        A shard of that name that is there, where a person has changed the metadata, keeps its other pictures.
        """
        shard = f"{rows[0]['index']:09d}.{SUFFIX[self.output]}"
        packed = [row | {"file_name": f"{row['index']:09d}.png", "shard": shard} for row in rows]
        pictures = {row["index"]: (self.path / row["file_name"]).read_bytes() for row in rows}
        there = self.rows() if (self.path / shard).exists() else ()
        kept = [row for row in there if row.get("shard") == shard and row["index"] not in pictures]
        pictures |= {row["index"]: self._member(self.path / shard, row).getvalue() for row in kept}
        self._append(packed)
        contents = sorted([*kept, *packed], key=lambda row: row["index"])
        with atomic_write(self.path / shard, clear=False) as aside:
            write = _write_tar if self.output == "webdataset" else _write_parquet
            write(aside, contents, [pictures[row["index"]] for row in contents])
        self._table = None
        for row in rows:
            (self.path / row["file_name"]).unlink()

    def pack_staged(self, count: int) -> None:
        """Pack full shards of ``count`` pictures from those that this process wrote."""
        while len(self.staged) >= count:
            self.pack(self.staged[:count])
            del self.staged[:count]

    def take_staged(self, count: int) -> None:
        """Pack full shards of what any process left; the rest is this process's. No other may write meanwhile."""
        if self.output != "files":
            self.staged = [row for row in self.rows() if "shard" not in row]
            self.pack_staged(count)

    def pack_left(self, count: int) -> None:
        """Pack all that any process left, at most ``count`` a shard. No other process may write meanwhile."""
        self.take_staged(count)
        if self.staged:
            self.pack_staged(len(self.staged))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the metadata of the pictures that are there, by index, and read each row when it is needed."""
        places = self._places()
        files = {path: path.open("rb") for path in {path for path, _ in places.values()}}
        try:
            for index in sorted(places):
                path, place = places[index]
                files[path].seek(place)
                yield json.loads(files[path].readline())
        finally:
            for file in files.values():
                file.close()

    def indices(self) -> set[int]:
        """The indices of the pictures that are there."""
        return set(self._places())

    def _places(self) -> dict[int, tuple[Path, int]]:
        """For each picture that is there, the file and the byte at which its line begins."""
        places: dict[int, tuple[Path, int]] = {}
        shards: dict[str, bool] = {}  # each of which is looked at once
        for path, place, row in self._lines():
            name = str(file_of(row))
            if "shard" in row and name not in shards:
                shards[name] = self._is_there(name)
            there = shards[name] if "shard" in row else all(map(self._is_there, [name, *progress_of(row)]))
            if there:
                places[row["index"]] = path, place
        return places

    def _is_there(self, name: str) -> bool:
        """Whether a file is there and whole; it is read only where it has changed."""
        state = _state(self.path / name)
        if state is None or name in self._damaged:
            return False
        if self._whole.get(name) != state:
            if not is_whole(self.path / name):
                return False
            self._whole[name] = state
        return True

    def _lines(self) -> Iterator[tuple[Path, int, dict[str, Any]]]:
        """Yield each line that this class wrote, of pictures that are there or not: its file, its place and its row."""
        for path in self._metadata():
            place = 0
            with path.open("rb") as file:
                for text in file:
                    row = None
                    with suppress(ValueError, RecursionError):  # such as a line that a killed run did not finish
                        row = json.loads(text)
                    if row is not None and file_of(row) is not None:
                        yield path, place, row
                    place += len(text)

    def _metadata(self) -> list[Path]:
        hidden = sorted(path for path in self.path.glob(".metadata.*.jsonl") if re.fullmatch(LINES_NAME, path.name))
        return [path for path in (self.path / METADATA, *hidden) if path.is_file() and not path.is_symlink()]

    def names(self) -> set[str]:
        """The files of pictures that lines of metadata name, whether they are there or not."""
        return {name for _, _, row in self._lines() for name in (file_of(row), *progress_of(row)) if name is not None}

    def find_irregular(self) -> str | None:
        """Find what has a name of ours and is no file or folder of its own, such as a link or a pipe."""
        folders = [self.path]
        for folder in folders:
            if not folder.is_dir():
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    is_folder = folder == self.path and FOLDER_NAME.fullmatch(entry.name) is not None
                    regular = entry.is_dir if is_folder else entry.is_file
                    if (is_folder or FILE_NAME.fullmatch(entry.name)) and not regular(follow_symlinks=False):
                        if entry.name == PROGRESS and entry.is_file(follow_symlinks=False):
                            continue  # a stranger's, in the way only where pictures on their way are written
                        return str(Path(entry.path).relative_to(self.path))
                    if is_folder:
                        folders.append(Path(entry.path))
        return None

    def find_stranger(self, done: Set[int], count: int | None, first: int = 0) -> str | None:
        """Find a file that has a name which will be written, and that is not of this class.

        Args:
            done: the indices of pictures that will not be written.
            count: the index after the last; None where that is not known.
            first: the index of the first picture.
        """

        def is_expected(index: int) -> bool:
            return index >= first and index not in done and (count is None or index < count)

        ours = self.names()
        for name, index in self._taken():
            if is_expected(index) and name not in ours and read_mark(self.path / name).get("file_name") != name:
                return name
        if self.progress and os.path.lexists(self.path / PROGRESS):
            if not (self.path / PROGRESS).is_dir() or (self.path / PROGRESS).is_symlink():
                return PROGRESS
            for path in (self.path / PROGRESS).rglob("*"):
                name, index = str(path.relative_to(self.path)), int(path.stem) if path.stem.isdecimal() else -1
                if is_expected(index) and name in progress_names(index).values() and name not in ours:
                    return name
        if os.path.lexists(self.path / GRID) and not read_mark(self.path / GRID):
            return GRID
        if os.path.lexists(self.path / PAGE) and not is_page(self.path / PAGE):
            return PAGE
        metadata = self.path / METADATA
        if os.path.lexists(metadata):
            if not metadata.is_file() or metadata.is_symlink():
                return METADATA
            if metadata.stat().st_size and all(path != metadata for path, _, _ in self._lines()):
                return METADATA
        return None

    def _taken(self) -> Iterator[tuple[str, int]]:
        """Yield the names that are there and that pictures of this output may have, with the index of the first."""
        pattern = re.compile(r"([0-9]{6,})\.png" if self.output == "files" else r"([0-9]{9,})\.(?:tar|parquet)")
        folders = [self.path]
        if self.output == "files":
            folders += [path for path in self.path.glob("[0-9]*") if path.name.isdigit() and path.is_dir()]
        for folder in folders:
            for path in folder.iterdir():
                name = str(path.relative_to(self.path))
                found = pattern.fullmatch(path.name)
                if found is None:
                    continue
                index = int(found[1])
                if self.output == "files":
                    if name == picture_name(index):
                        yield name, index
                elif path.suffix == f".{SUFFIX[self.output]}" and path.name == f"{index:09d}{path.suffix}":
                    yield name, index

    def open(self, row: dict[str, Any]) -> Image.Image:
        """Open the picture of one of :meth:`rows`, in grey (L), RGB or RGBA.

        Raises:
            InputError: where it is damaged.
        """
        path = self.path / str(file_of(row))
        try:
            with Image.open(path if path.suffix == ".png" else self._member(path, row), formats=["PNG"]) as picture:
                picture.load()
                return picture.copy()
        except MemoryError:
            raise
        except Exception as error:  # the libraries raise many kinds
            raise InputError(f"save_dir: {path} is damaged; use the same command to make it again") from error

    def _member(self, path: Path, row: dict[str, Any]) -> io.BytesIO:
        """The PNG of a picture in a shard."""
        if path.suffix == ".tar":
            return io.BytesIO(_read_tar(path, row["file_name"]))
        if self._table is None or self._table[0] != path:
            from pyarrow import parquet

            self._table = path, parquet.read_table(path, columns=["index", "image"])
        table = self._table[1]
        return io.BytesIO(table["image"][table["index"].to_pylist().index(row["index"])].as_py()["bytes"])

    def drop_damaged(self, rows: Iterable[dict[str, Any]]) -> None:
        """Open the pictures of some rows; a file that can't be opened no longer counts as written."""
        for row in rows:
            name = str(file_of(row))
            state = _state(self.path / name)
            if state is None or ("shard" not in row and self._opened.get(name) == state):
                continue
            try:
                self.open(row)
                self._opened[name] = state
            except InputError:
                self._damaged.add(name)

    def merge(self) -> None:
        """Merge the lines of all processes into one file, by index, and remove what stopped runs left.

        No other process may write meanwhile.
        """
        self._remove_leftovers()
        with atomic_write(self.path / METADATA) as aside, aside.open("w", encoding="utf-8") as metadata:
            metadata.writelines(to_line(row) + "\n" for row in self.rows())
            metadata.flush()
            os.fsync(metadata.fileno())
        for path in self._metadata():
            if path.name != METADATA:
                path.unlink()

    def _remove_leftovers(self) -> None:
        """Remove hidden temporary files, PNGs that are in a shard by now, and pictures and shards that are damaged."""
        waiting = set() if self.output == "files" else {row["index"] for row in self.rows() if "shard" not in row}
        folders = {self.path, self.path / STAGING}
        for name in self.names():
            path = self.path / name
            folders.add(path.parent)  # also of pictures on their way
            packed = path.parent.name == STAGING and int(path.stem) not in waiting
            if packed or not self._is_there(name):
                path.unlink(missing_ok=True)
                self._damaged.discard(name)
        for folder in folders:
            if folder.is_dir():
                remove_leftovers(folder, TEMPORARY)
        with suppress(OSError):  # others' files may be in it
            (self.path / STAGING).rmdir()

    def clear(self) -> None:
        """Remove all pictures that lines of metadata name, the lines, the figure and the page."""
        self._remove_leftovers()
        names = self.names()
        for name in names:
            (self.path / name).unlink(missing_ok=True)
        for folder in {Path(name).parent for name in names} - {Path()}:
            with suppress(OSError):  # others' files may be in it
                (self.path / folder).rmdir()
        if read_mark(self.path / GRID):
            (self.path / GRID).unlink()
        if is_page(self.path / PAGE):
            (self.path / PAGE).unlink()
        for path in self._metadata():
            path.unlink()

    def _append(self, rows: list[dict[str, Any]]) -> None:
        with (self.path / f".metadata.{self.rank}.jsonl").open("a+b") as file:
            if file.tell() > 0:
                file.seek(-1, io.SEEK_END)
                if file.read(1) != b"\n":  # a run was killed while it wrote a line
                    file.write(b"\n")
            file.write("".join(to_line(row) + "\n" for row in rows).encode())


def picture_name(index: int, own_file: bool = True) -> str:
    """The path of a PNG in the folder; that of one which waits to be packed, where it has no file of its own."""
    folder = ("" if index < PICTURES_PER_FOLDER else f"{index // PICTURES_PER_FOLDER:05d}") if own_file else STAGING
    return str(Path(folder) / f"{index:06d}.png")


def file_of(row: Any) -> str | None:
    """The file that a line of metadata names; None where this module would not have written it so."""
    index = row.get("index") if isinstance(row, dict) else None
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        return None
    name, shard = row.get("file_name"), row.get("shard")
    if "shard" in row:
        known = isinstance(shard, str) and re.fullmatch(SHARD_NAME, shard) and name == f"{index:09d}.png"
        return shard if known else None
    return name if name in (picture_name(index), picture_name(index, own_file=False)) else None


def progress_names(index: int) -> dict[str, str]:
    """The files of a picture on its way, by their fields of metadata."""
    strip = Path(PROGRESS) / picture_name(index)
    return {"filmstrip": str(strip), "animation": str(strip.with_suffix(".webp"))}


def progress_of(row: dict[str, Any]) -> list[str]:
    """The files of a picture on its way that a line of metadata names, as this module would have written it."""
    return [name for field, name in progress_names(row["index"]).items() if row.get(field) == name]


def is_hidden_of_ours(path: Path) -> bool:
    """Whether it is a hidden file or folder that this module writes, to judge by its name."""
    return path.name == STAGING or HIDDEN.fullmatch(path.name) is not None


def is_whole(path: Path) -> bool:
    """Whether a picture or a shard was written to its end; its content is not looked at."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            file.seek(max(0, size - 1024))
            tail = file.read()
    except OSError:
        return False
    if path.suffix == ".png":
        return head == b"\x89PNG\r\n\x1a\n" and tail.endswith(b"\0\0\0\0IEND\xaeB`\x82")
    if path.suffix == ".webp":
        return head[:4] == b"RIFF" and int.from_bytes(head[4:], "little") + 8 == size
    if path.suffix == ".tar":
        return size > 1024 and size % tarfile.RECORDSIZE == 0 and any(head) and not any(tail)
    footer = int.from_bytes(tail[-8:-4], "little")
    return head[:4] == tail[-4:] == b"PAR1" and 0 < footer <= size - 12


def _state(path: Path) -> tuple[int, int] | None:
    """The size and the time of the last change; None where there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def read_mark(path: Path) -> dict[str, Any]:
    """What the text field of a PNG of ours says, before its pixels; ``{}`` where it is none of ours."""
    with suppress(OSError, ValueError, RecursionError, zlib.error), path.open("rb") as file:
        if path.is_symlink() or file.read(8) != b"\x89PNG\r\n\x1a\n":
            return {}
        while len(head := file.read(8)) == 8 and head[4:] not in (b"IDAT", b"IEND"):
            length = int.from_bytes(head[:4], "big")
            if head[4:] in (b"iTXt", b"tEXt") and length < 2**20:
                keyword, _, rest = file.read(length).partition(b"\0")
                if keyword == MARK.encode():
                    mark = json.loads(rest[2:].split(b"\0", 2)[2] if head[4:] == b"iTXt" else rest)
                    return mark if isinstance(mark, dict) else {}
                file.seek(4, io.SEEK_CUR)
            else:
                file.seek(length + 4, io.SEEK_CUR)
    return {}


def is_page(path: Path) -> bool:
    """Whether a file is a page that :mod:`clipward.callbacks.gallery_page` wrote, to judge by its first lines."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(PAGE_MARK)) == PAGE_MARK


def to_line(row: dict[str, Any]) -> str:
    """A row of metadata as JSON on one line."""
    return json.dumps(row, ensure_ascii=False)


def save_png(path: Path, picture: Image.Image, provenance: str, clear: bool = True) -> None:
    """Write a PNG, atomically, with how it was made in its text field ``clipward``.

    Args:
        path: the file.
        picture: its pixels.
        provenance: how it was made.
        clear: as in :func:`clipward.files.atomic_write`.
    """
    info = PngInfo()
    info.add_itxt(MARK, provenance)
    with atomic_write(path, clear) as aside:
        # run lengths take a third of the time of zlib's default, for about the same size
        picture.save(aside, "png", pnginfo=info, compress_type=zlib.Z_RLE)


def draw_filmstrip(frames: Sequence[Image.Image], gap: int = 2) -> Image.Image:
    """Pictures of one size, side by side."""
    width, height = frames[0].size
    strip = Image.new(frames[0].mode, (len(frames) * (width + gap) - gap, height), "white")
    for i, frame in enumerate(frames):
        strip.paste(frame, (i * (width + gap), 0))
    return strip


def save_animation(path: Path, frames: Sequence[Image.Image], provenance: str) -> None:
    """Write an animated WebP, atomically, which stays on its last frame, with how it was made in its XMP field."""
    first, *others = frames
    duration = [150] * len(others) + [1500]  # milliseconds
    with atomic_write(path, clear=False) as aside:
        first.save(aside, "webp", save_all=True, append_images=others, duration=duration, loop=0, quality=85,
                   xmp=provenance.encode())  # fmt: skip


def _write_tar(path: Path, rows: list[dict[str, Any]], pictures: list[bytes]) -> None:
    """Write a WebDataset shard, with ``000000012.png`` and ``000000012.json`` for each picture.

    The JSON leaves out what is None, from which ``datasets`` would learn that a field never is anything else.
    """
    with tarfile.open(path, "w") as shard:
        for row, picture in zip(rows, pictures, strict=True):
            member, known = Path(row["file_name"]), {name: value for name, value in row.items() if value is not None}
            for name, content in ((member.name, picture), (f"{member.stem}.json", to_line(known).encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))


def _read_tar(path: Path, name: str) -> bytes:
    with tarfile.open(path, "r:") as shard:
        member = shard.extractfile(name)
        if member is None:
            raise FileNotFoundError(f"{path} has no file {name}")
        return member.read()


def _write_parquet(path: Path, rows: list[dict[str, Any]], pictures: list[bytes]) -> None:
    """Write a parquet shard, with ``COLUMNS``, those that a person has added to the metadata, and ``image``."""
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    added = dict.fromkeys(name for row in rows for name in row if name not in COLUMNS)
    images = [{"bytes": picture, "path": row["file_name"]} for row, picture in zip(rows, pictures, strict=True)]
    with hide_bars():
        guessed = Dataset.from_list([{name: row.get(name) for name in added} for row in rows]).features
        features = Features({**{name: _to_feature(kind) for name, kind in COLUMNS.items()}, **guessed})
        table = Dataset.from_list([{name: row.get(name) for name in features} for row in rows], features)
        table.add_column("image", images).cast_column("image", ImageFeature()).to_parquet(path)


def _to_feature(kind: str | list[Any]) -> Any:
    from datasets import List, Value

    return List(_to_feature(kind[0])) if isinstance(kind, list) else Value(kind)
