"""A folder of pictures on disk: one file each, or packed in shards, with a line of metadata for each."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from clipward.files import whole

Output = Literal["files", "webdataset", "parquet"]
SUFFIX = {"webdataset": "tar", "parquet": "parquet"}
METADATA = "metadata.jsonl"
A_FOLDER = 10_000  # pictures; more go to folders beside it
STAGED = ".staged"


class Gallery:
    """What has been written, and where.

    A picture exists from when its line of metadata does. Each process has a file of lines of its own until
    :meth:`merge`. A shard is written from pictures that have been written as files, so that a run which is stopped
    loses none of them.

    Args:
        path: the folder.
        output: ``files`` for a PNG each, or the format of the shards.
        rank: which process writes.
    """

    def __init__(self, path: Path, output: Output = "files", rank: int = 0) -> None:
        self.path, self.output, self.rank = path, output, rank
        self.staged: list[dict[str, Any]] = []  # what this process has not packed yet

    def add(self, row: dict[str, Any], picture: Image.Image) -> None:
        """Write a picture, and then its line. ``row`` has its ``index``."""
        index = row["index"]
        folder = STAGED if self.output != "files" else "" if index < A_FOLDER else f"{index // A_FOLDER:05d}"
        row = {"file_name": str(Path(folder) / f"{index:06d}.png"), **row}
        save_png(self.path / row["file_name"], picture, line(row))
        self._append([row])
        if self.output != "files":
            self.staged.append(row)

    def pack(self, rows: list[dict[str, Any]]) -> None:
        """Move pictures from their files into a shard, which is named after the first of them."""
        shard = f"{rows[0]['index']:09d}.{SUFFIX[self.output]}"
        packed = [row | {"file_name": f"{row['index']:09d}.png", "shard": shard} for row in rows]
        # The lines come first: until the shard is there, they count for nothing.
        self._append(packed)
        pictures = [(self.path / row["file_name"]).read_bytes() for row in rows]
        with whole(self.path / shard) as aside:
            (_to_tar if self.output == "webdataset" else _to_parquet)(aside, packed, pictures)
        for row in rows:
            (self.path / row["file_name"]).unlink()

    def pack_staged(self, count: int) -> None:
        """Pack what this process wrote, ``count`` pictures a shard, where there are as many."""
        while len(self.staged) >= count:
            self.pack(self.staged[:count])
            del self.staged[:count]

    def pack_left(self, count: int) -> None:
        """Pack what any process has left, when no other writes."""
        if self.output == "files":
            return
        self.staged = [row for row in self.rows() if "shard" not in row]
        self.pack_staged(count)
        if self.staged:
            self.pack_staged(len(self.staged))

    def rows(self) -> Iterator[dict[str, Any]]:
        """The metadata of the pictures that exist, by index, read as they are asked for."""
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
        """Of the pictures that exist."""
        return set(self._places())

    def _places(self) -> dict[int, tuple[Path, int]]:
        """For each picture that exists, the file and the byte of its line."""
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
        """The picture of one of :meth:`rows`."""
        if "shard" not in row:
            picture = Image.open(self.path / row["file_name"])
        elif self.output == "webdataset":
            with tarfile.open(self.path / row["shard"]) as shard:
                picture = Image.open(io.BytesIO(shard.extractfile(row["file_name"]).read()))
        else:
            from datasets import load_dataset

            rows = load_dataset("parquet", data_files=str(self.path / row["shard"]), split="train", streaming=True)
            picture = next(each["image"] for each in rows if each["index"] == row["index"])
        return picture.convert("RGB")

    def merge(self) -> None:
        """One file of lines for all processes, by index; what stopped runs left is cleared away."""
        with whole(self.path / METADATA) as aside, aside.open("w", encoding="utf-8") as metadata:
            metadata.writelines(line(row) + "\n" for row in self.rows())
        leftovers = [
            ".metadata.*.jsonl",
            ".*.png.*",
            "*/.*.png.*",
            f"{STAGED}/*",
            *(f".*.{s}.*" for s in SUFFIX.values()),
        ]
        for leftover in (path for pattern in leftovers for path in self.path.glob(pattern)):
            leftover.unlink()
        if (self.path / STAGED).is_dir():
            (self.path / STAGED).rmdir()

    def clear(self) -> None:
        """Begin anew."""
        patterns = ["*.png", "[0-9]*/*.png", f"*{METADATA}", ".metadata.*.jsonl", f"{STAGED}/*.png"]
        patterns += [f"*.{suffix}" for suffix in SUFFIX.values()]
        for stale in (path for pattern in patterns for path in self.path.glob(pattern)):
            stale.unlink()

    def _append(self, rows: list[dict[str, Any]]) -> None:
        with (self.path / f".metadata.{self.rank}.jsonl").open("a+b") as file:
            if file.tell() > 0:
                file.seek(-1, io.SEEK_END)
                if file.read(1) != b"\n":  # a run was killed while it wrote a line
                    file.write(b"\n")
            file.write("".join(line(row) + "\n" for row in rows).encode())


def line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False)


def save_png(path: Path, picture: Image.Image, made: str) -> None:
    """Write a PNG that says how it was made, whole or not at all."""
    info = PngInfo()
    info.add_itxt("clipward", made)
    with whole(path) as aside:
        picture.save(aside, "png", pnginfo=info)


def _to_tar(path: Path, rows: list[dict[str, Any]], pictures: list[bytes]) -> None:
    """A WebDataset shard: ``000000012.png`` and ``000000012.json`` for each picture."""
    with tarfile.open(path, "w") as shard:
        for row, picture in zip(rows, pictures, strict=True):
            member = Path(row["file_name"])
            for name, content in ((member.name, picture), (f"{member.stem}.json", line(row).encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))


def _to_parquet(path: Path, rows: list[dict[str, Any]], pictures: list[bytes]) -> None:
    """A column ``image`` and one for each field of a row."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    table = Dataset.from_list(rows)
    table = table.cast(Features({**table.features, "clip_similarity": Value("float64")}))  # also where none has any
    images = [{"bytes": picture, "path": row["file_name"]} for row, picture in zip(rows, pictures, strict=True)]
    table.add_column("image", images).cast_column("image", ImageFeature()).to_parquet(path)
