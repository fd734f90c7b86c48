import json
from pathlib import Path

import pytest
from datasets import load_dataset
from PIL import Image

from clipward.callbacks.gallery import Gallery


def row(index: int) -> dict:
    return {"index": index, "text": f"face {index}", "seed": index, "guidance_weight": 1.0, "clip_similarity": None}


def picture(index: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (index % 256, 7, 9))


def colour(image: Image.Image) -> int:
    return image.convert("RGB").getpixel((0, 0))[0]


def filled(path: Path, output: str, count: int = 5, rank: int = 0) -> Gallery:
    path.mkdir(exist_ok=True)
    gallery = Gallery(path, output, rank)
    for index in range(rank, 2 * count, 2):
        gallery.add(row(index), picture(index))
    return gallery


def test_each_ten_thousand_pictures_have_a_folder(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    for index in (0, 9_999, 10_000, 123_456):
        gallery.add(row(index), picture(index))
    names = ["000000.png", "009999.png", "00001/010000.png", "00012/123456.png"]
    assert [each["file_name"] for each in gallery.rows()] == names
    gallery.merge()
    rows = load_dataset("imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    assert sorted((r["seed"], colour(r["image"])) for r in rows) == [(i, i % 256) for i in (0, 9_999, 10_000, 123_456)]
    gallery.clear()
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("output", ["webdataset", "parquet"])
def test_shards_hold_the_pictures_of_all_processes_once(tmp_path: Path, output: str) -> None:
    folder = tmp_path / "x"
    first, second = filled(folder, output), filled(folder, output, rank=1)
    first.pack_staged(2)
    assert first.indices() == set(range(10))
    assert [row["index"] for row in first.staged] == [8]
    first.pack_left(4)
    first.merge()
    rows = list(Gallery(folder, output).rows())
    assert [row["index"] for row in rows] == list(range(10))
    assert [colour(second.open(row)) for row in rows] == list(range(10))
    suffix = "tar" if output == "webdataset" else "parquet"
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"{i:09d}.{suffix}" for i in (0, 1, 4, 8)),
        "metadata.jsonl",
    ]
    loaded = load_dataset(
        output, data_files=str(folder / f"*.{suffix}"), split="train", cache_dir=str(tmp_path / "cache")
    )
    pairs = [(r["json"]["seed"], r["png"]) if output == "webdataset" else (r["seed"], r["image"]) for r in loaded]
    assert sorted((seed, colour(image)) for seed, image in pairs) == [(i, i) for i in range(10)]


def test_a_line_that_was_cut_off_costs_one_picture(tmp_path: Path) -> None:
    gallery = filled(tmp_path, "files", count=3)
    lines = tmp_path / ".metadata.0.jsonl"
    lines.write_bytes(lines.read_bytes()[:-20])
    assert gallery.indices() == {0, 2}
    gallery.add(row(6), picture(6))
    gallery.add(row(4), picture(4))
    assert gallery.indices() == {0, 2, 4, 6}
    gallery.merge()
    assert [json.loads(text)["index"] for text in (tmp_path / "metadata.jsonl").read_text().splitlines()] == [
        0,
        2,
        4,
        6,
    ]


@pytest.mark.parametrize("stops_at", ["before the shard is there", "before the files are gone"])
def test_packing_can_stop_anywhere(tmp_path: Path, stops_at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = filled(tmp_path, "webdataset")
    stop = "replace" if stops_at == "before the shard is there" else "unlink"

    def killed(path: Path, *arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, stop, killed)
        with pytest.raises(KeyboardInterrupt):
            gallery.pack_staged(3)
    again = Gallery(tmp_path, "webdataset")
    assert again.indices() == {0, 2, 4, 6, 8}
    again.pack_left(3)
    again.merge()
    assert [colour(again.open(row)) for row in again.rows()] == [0, 2, 4, 6, 8]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[-1] == "metadata.jsonl"
    assert all(name.endswith(".tar") for name in names[:-1])


def test_a_picture_without_its_file_counts_as_missing(tmp_path: Path) -> None:
    gallery = filled(tmp_path, "files")
    (tmp_path / "000004.png").unlink()
    assert gallery.indices() == {0, 2, 6, 8}
