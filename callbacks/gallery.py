"""A folder of pictures and their metadata: a PNG for each picture, or shards of many."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from clipward.files import atomic_write

Output = Literal["files", "webdataset", "parquet"]
SUFFIX = {"webdataset": "tar", "parquet": "parquet"}
METADATA = "metadata.jsonl"
PICTURES_PER_FOLDER = 10_000  # the first lie in the folder itself, the others in numbered ones within it
STAGING = ".staged"


class Gallery:
    """Writes pictures to a folder, and knows which are there.

    A picture counts as written when its line of metadata is. Each process writes the lines to a file of its own until
    :meth:`merge`. A shard is packed from PNGs that are on the disk already, so that a run which is stopped loses none.

    Args:
        path: the folder.
        output: ``files`` for a PNG for each picture, or the format of the shards.
        rank: the rank of this process.
    """

    def __init__(self, path: Path, output: Output = "files", rank: int = 0) -> None:
        self.path, self.output, self.rank = path, output, rank
        self.staged: list[dict[str, Any]] = []  # the rows of this process that are not packed yet

    def add(self, row: dict[str, Any], picture: Image.Image) -> None:
        """Write a picture, and then its line of metadata: ``row``, which has the picture's ``index``."""
        index = row["index"]
        folder = STAGING
        if self.output == "files":
            folder = "" if index < PICTURES_PER_FOLDER else f"{index // PICTURES_PER_FOLDER:05d}"
        row = {"file_name": str(Path(folder) / f"{index:06d}.png"), **row}
        save_png(self.path / row["file_name"], picture, to_line(row))
        self._append([row])
        if self.output != "files":
            self.staged.append(row)

    def pack(self, rows: list[dict[str, Any]]) -> None:
        """Move pictures from their PNGs into a shard, which has the number of the first of them."""
        shard = f"{rows[0]['index']:09d}.{SUFFIX[self.output]}"
        packed = [row | {"file_name": f"{row['index']:09d}.png", "shard": shard} for row in rows]
        # The lines come first: they do not count until the shard is there.
        self._append(packed)
        pictures = [(self.path / row["file_name"]).read_bytes() for row in rows]
        with atomic_write(self.path / shard) as aside:
            write = _write_tar if self.output == "webdataset" else _write_parquet
            write(aside, packed, pictures)
        for row in rows:
            (self.path / row["file_name"]).unlink()

    def pack_staged(self, count: int) -> None:
        """Pack full shards of ``count`` pictures from those that this process wrote."""
        while len(self.staged) >= count:
            self.pack(self.staged[:count])
            del self.staged[:count]

    def pack_left(self, count: int) -> None:
        """Pack the pictures that any process left, ``count`` a shard. No other process may write meanwhile."""
        if self.output == "files":
            return
        self.staged = [row for row in self.rows() if "shard" not in row]
        self.pack_staged(count)
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
        shards = {path.name for suffix in SUFFIX.values() for path in self.path.glob(f"*.{suffix}")}
        for path in [self.path / METADATA, *sorted(self.path.glob(".metadata.*.jsonl"))]:
            if not path.is_file():
                continue
            place = 0
            with path.open("rb") as file:
                for text in file:
                    try:
                        row = json.loads(text)
                    except ValueError:  # a run was killed while it wrote this line
                        row = None
                    if row and (row["shard"] in shards if "shard" in row else (self.path / row["file_name"]).is_file()):
                        places[row["index"]] = path, place
                    place += len(text)
        return places

    def open(self, row: dict[str, Any]) -> Image.Image:
        """Open the picture of one of :meth:`rows`."""
        if "shard" not in row:
            picture = Image.open(self.path / row["file_name"])
        elif self.output == "webdataset":
            with tarfile.open(self.path / row["shard"]) as shard:
                member = shard.extractfile(row["file_name"])
                if member is None:
                    raise FileNotFoundError(f"{row['shard']} has no file {row['file_name']}")
                picture = Image.open(io.BytesIO(member.read()))
        else:
            from datasets import load_dataset

            rows = load_dataset("parquet", data_files=str(self.path / row["shard"]), split="train", streaming=True)
            picture = next(each["image"] for each in rows if each["index"] == row["index"])
        return picture.convert("RGB")

    def merge(self) -> None:
        """Merge the lines of all processes into one file, by index, and delete what stopped runs left."""
        with atomic_write(self.path / METADATA) as aside, aside.open("w", encoding="utf-8") as metadata:
            metadata.writelines(to_line(row) + "\n" for row in self.rows())
        self._delete(".metadata.*.jsonl", ".*.png.*", "*/.*.png.*", f"{STAGING}/*")
        self._delete(*(f".*.{suffix}.*" for suffix in SUFFIX.values()))
        if (self.path / STAGING).is_dir():
            (self.path / STAGING).rmdir()

    def clear(self) -> None:
        """Delete all pictures and their metadata."""
        self._delete("*.png", "[0-9]*/*.png", f"*{METADATA}", ".metadata.*.jsonl", f"{STAGING}/*.png")
        self._delete(*(f"*.{suffix}" for suffix in SUFFIX.values()))

    def _delete(self, *patterns: str) -> None:
        for path in {path for pattern in patterns for path in self.path.glob(pattern)}:
            path.unlink()

    def _append(self, rows: list[dict[str, Any]]) -> None:
        with (self.path / f".metadata.{self.rank}.jsonl").open("a+b") as file:
            if file.tell() > 0:
                file.seek(-1, io.SEEK_END)
                if file.read(1) != b"\n":  # a run was killed while it wrote a line
                    file.write(b"\n")
            file.write("".join(to_line(row) + "\n" for row in rows).encode())


def to_line(row: dict[str, Any]) -> str:
    """A row of metadata as JSON on one line."""
    return json.dumps(row, ensure_ascii=False)


def save_png(path: Path, picture: Image.Image, provenance: str) -> None:
    """Write a PNG, atomically, with how it was made in its text field ``clipward``."""
    info = PngInfo()
    info.add_itxt("clipward", provenance)
    with atomic_write(path) as aside:
        picture.save(aside, "png", pnginfo=info)


def _write_tar(path: Path, rows: list[dict[str, Any]], pictures: list[bytes]) -> None:
    """Write a WebDataset shard, with ``000000012.png`` and ``000000012.json`` for each picture."""
    with tarfile.open(path, "w") as shard:
        for row, picture in zip(rows, pictures, strict=True):
            member = Path(row["file_name"])
            for name, content in ((member.name, picture), (f"{member.stem}.json", to_line(row).encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))


def _write_parquet(path: Path, rows: list[dict[str, Any]], pictures: list[bytes]) -> None:
    """Write a parquet shard, with a column ``image`` and one for each field of a row."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    table = Dataset.from_list(rows)
    table = table.cast(Features({**table.features, "clip_similarity": Value("float64")}))  # also where all are None
    images = [{"bytes": picture, "path": row["file_name"]} for row, picture in zip(rows, pictures, strict=True)]
    table.add_column("image", images).cast_column("image", ImageFeature()).to_parquet(path)
