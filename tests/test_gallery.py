import fcntl
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import load_dataset
from PIL import Image
from pyarrow import parquet

from clipward.callbacks.gallery import COLUMNS, Gallery
from clipward.callbacks.prediction_writer import PACKAGES, PredictionWriter
from clipward.cli import main
from clipward.cli.again import KINDS
from clipward.datamodules.prompts import PromptDataModule
from clipward.datamodules.requests import FIELDS, Request
from clipward.editing import PICTURES
from clipward.errors import InputError
from clipward.files import atomic_folder, atomic_write, check_writable, remove_leftovers

FOUR = PromptDataModule(n_samples=4).requests


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
def test_shards_hold_the_pictures_of_all_processes_once(
    tmp_path: Path, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "x"
    first, second = filled(folder, output), filled(folder, output, rank=1)
    first.pack_staged(2)
    assert first.indices() == set(range(10))
    assert [row["index"] for row in first.staged] == [8]
    first.pack_left(4)
    first.merge()
    assert not capsys.readouterr().err  # no line of progress for each shard
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


@pytest.mark.parametrize("output", ["webdataset", "parquet"])
def test_a_field_that_begins_with_none_has_its_type(tmp_path: Path, output: str) -> None:
    gallery = Gallery(tmp_path / "x", output)
    gallery.path.mkdir()
    for index in range(8):
        found = {"clip_similarity": 0.5, "negative_text": "a beard", "class_label": 3} if index == 7 else {}
        gallery.add(row(index) | {"negative_text": None, "class_label": None} | found, picture(index))
    gallery.pack_left(6)
    loaded = load_dataset(output, data_dir=str(tmp_path / "x"), split="train", cache_dir=str(tmp_path / "cache"))
    rows = [each["json"] if output == "webdataset" else each for each in loaded]
    assert [each["seed"] for each in rows] == list(range(8))
    if output == "parquet":
        assert [rows[i][name] for i in (0, 7) for name in found] == [None] * 3 + [0.5, "a beard", "3"]


def test_parquet_has_a_column_for_each_field_of_metadata() -> None:
    of_requests = {field for field in FIELDS if field not in PICTURES} | {"index"}
    of_files = {name for field in PICTURES for name in (field, f"{field}_sha256")}
    of_settings = set(KINDS) - {"solver", "ddim", "accelerator"}
    assert of_requests | of_files | of_settings | set(PACKAGES) <= set(COLUMNS)


def test_a_field_that_a_person_has_added_is_a_column(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path, "parquet")
    for index in range(2):
        gallery.add(row(index) | ({"rating": 5} if index else {}), picture(index))
    gallery.pack_left(2)
    assert parquet.read_table(tmp_path / "000000000.parquet")["rating"].to_pylist() == [None, 5]


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


# what belongs to others

COMMAND, OTHER = "text: [a]\n", "text: [b]\n"


def taken(path: Path, output: str = "files", command: str = COMMAND) -> PredictionWriter:
    """A folder that a command has finished."""
    writer = PredictionWriter(str(path), command, output=output, shard_size=2)
    gallery = filled(path, output, count=2)
    (path / "config.predict.yaml").write_text(command)
    gallery.pack_left(2)
    writer.finish()
    return writer


def test_no_more_requests_are_read_than_pictures_are_there(tmp_path: Path) -> None:
    read = []

    def endless() -> Iterator[Request]:
        for index in itertools.count():
            read.append(index)
            yield Request(index, f"face {index}", index, 1.0)

    filled(tmp_path, "files", count=2)
    sampler: Any = SimpleNamespace(describe=lambda *_: {})
    assert PredictionWriter(str(tmp_path)).find_other_source(endless(), {}, sampler) == ""
    assert read == [0, 1, 2]


STRANGERS = {"holiday.png": b"x", "backup.tar": b"x", "2024/beach.png": b"x", "00001/mine.png": b"x", ".mine.1": b"x"}


@pytest.mark.parametrize("output", ["files", "webdataset", "parquet"])
def test_files_of_others_stay(tmp_path: Path, output: str) -> None:
    out = tmp_path / "x"
    writer = taken(out, output)
    for name, content in STRANGERS.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(content)
    assert writer.check(FOUR) == {0, 2}
    again = PredictionWriter(str(out), OTHER, overwrite=True, output="files")
    assert again.check(FOUR) == set()
    again.gallery.clear()
    again.gallery.merge()
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert left == {*STRANGERS, "config.predict.yaml", "metadata.jsonl"}


@pytest.mark.parametrize(
    ("output", "name", "content"),
    [
        ("files", "000003.png", b"mine"),
        ("files", "000001.png", b""),
        ("files", "grid.png", b"mine"),
        ("files", "gallery.html", b"<!doctype html>\n<html>"),
        ("parquet", "gallery.html", b""),
        ("files", "metadata.jsonl", b"mine\n"),
        ("files", "metadata.jsonl", b'{"file_name": "holiday.png"}\n'),
        ("webdataset", "000000003.tar", b"mine"),
        ("parquet", "000000001.parquet", b"mine"),
    ],
)
def test_a_name_that_another_file_has_is_refused(tmp_path: Path, output: str, name: str, content: bytes) -> None:
    out = tmp_path / "x"
    taken(out, output)
    (out / name).write_bytes(content)
    for command in (COMMAND, OTHER):
        writer = PredictionWriter(str(out), command, overwrite=True, output=output)
        with pytest.raises(InputError, match=f"save_dir: {out / name} is there and was not written by predict"):
            writer.check(FOUR)
    assert (out / name).read_bytes() == content


NAMES = ["metadata.jsonl", ".metadata.0.jsonl", ".metadata.3.jsonl", ".clipward.lock", "grid.png", "gallery.html"]
NAMES += ["000003.png", ".000003.png.12", "000000003.tar", ".staged", "progress", "00001", ".staged/000003.png"]


CASES = [(name, kind) for name in NAMES for kind in ("link", "dangling", "pipe", "other")]
CASES.remove(("progress", "other"))  # in nobody's way without --save_progress


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_leads_elsewhere_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    out, precious = tmp_path / "x", tmp_path / "precious"
    taken(out)
    path, is_folder = out / name, name in (".staged", "progress", "00001")
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "link":
        (precious.mkdir if is_folder else precious.touch)()
    if kind in ("link", "dangling"):
        path.symlink_to(precious)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        (path.touch if is_folder else path.mkdir)()
    for command in (COMMAND, OTHER):
        with pytest.raises(
            InputError, match=f"save_dir: {re.escape(str(path))} has a name that predict uses, and is no"
        ):
            PredictionWriter(str(out), command, overwrite=True).check(FOUR)
    assert os.path.lexists(path)


def test_a_name_that_is_not_needed_is_not_refused(tmp_path: Path) -> None:
    taken(tmp_path / "x").save_dir.joinpath("000009.png").write_bytes(b"mine")
    assert PredictionWriter(str(tmp_path / "x"), COMMAND).check(FOUR) == {0, 2}


def test_metadata_names_nothing_outside(tmp_path: Path) -> None:
    writer = taken(tmp_path / "x")
    precious = tmp_path / "precious.png"
    precious.write_bytes((tmp_path / "x/000000.png").read_bytes())
    lines = [{"index": 0, "file_name": name} for name in ("../precious.png", str(precious), "holiday.png", None, [])]
    lines += [{"index": 1, "file_name": "000000001.png", "shard": shard} for shard in ("../precious.png", 3, "x.tar")]
    lines += [{"index": index, "file_name": "000000.png"} for index in ("0", -1, True, None, 2.0)]
    with (tmp_path / "x/metadata.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in [*lines, [], 3, "x", {}])
    assert writer.check(FOUR) == {0, 2}
    writer.gallery.clear()
    assert precious.exists()


@pytest.mark.parametrize("harm", ["empty", "cut", "other"])
@pytest.mark.parametrize("output", ["files", "webdataset", "parquet"])
def test_a_damaged_file_is_made_again(tmp_path: Path, output: str, harm: str) -> None:
    out = tmp_path / "x"
    writer = taken(out, output)
    name = {"files": "000002.png", "webdataset": "000000000.tar", "parquet": "000000000.parquet"}[output]
    content = (out / name).read_bytes()
    (out / name).write_bytes({"empty": b"", "cut": content[:-20], "other": b"x" * len(content)}[harm])
    again = PredictionWriter(str(out), COMMAND, output=output)
    assert again.check(FOUR) == ({0} if output == "files" else set())
    again.gallery.merge()
    assert not (out / name).exists()
    assert writer.save_dir.joinpath("metadata.jsonl").exists()


@pytest.mark.parametrize("output", ["webdataset", "parquet"])
def test_a_shard_whose_first_line_is_lost_keeps_its_other_pictures(config: str, output: str, tmp_path: Path) -> None:
    command = ["predict", "-c", config, "--n_samples", "5", "--skip_steps", "2", "--output", output]
    command += ["--save_dir", str(tmp_path / "x")]
    main(command)
    before = {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    lines = before["metadata.jsonl"].splitlines(keepends=True)
    (tmp_path / "x/metadata.jsonl").write_bytes(b"".join(lines[1:]))
    main(command)
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()} == before


def test_a_picture_of_the_figure_that_cannot_be_opened_is_made_again(tmp_path: Path) -> None:
    path = taken(tmp_path / "x").save_dir / "000002.png"
    content = bytearray(path.read_bytes())
    place = content.index(b"IDAT")
    content[place + 6 : place + 10] = b"\xff" * 4
    path.write_bytes(content)
    assert PredictionWriter(str(tmp_path / "x"), COMMAND).check(FOUR) == {0}


def test_a_config_without_pictures_blocks_nothing(tmp_path: Path) -> None:
    (tmp_path / ".config.predict.yaml.123").write_text("")
    assert PredictionWriter(str(tmp_path), COMMAND).check(FOUR) == set()
    (tmp_path / "config.predict.yaml").write_text(OTHER)
    (tmp_path / "holiday.png").write_bytes(b"x")
    assert PredictionWriter(str(tmp_path), COMMAND).check(FOUR) == set()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: [", b"- a", b"3", b"\x00" * 9])
def test_a_config_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes) -> None:
    taken(tmp_path / "x").save_dir.joinpath("config.predict.yaml").write_bytes(content)
    with pytest.raises(InputError, match=r"save_dir: .*config\.predict\.yaml .*; use another folder$"):
        PredictionWriter(str(tmp_path / "x"), COMMAND, overwrite=True).check(FOUR)


def test_one_run_at_a_time_writes_to_a_folder(tmp_path: Path) -> None:
    writer = taken(tmp_path / "x")
    other = PredictionWriter(str(tmp_path / "x"), COMMAND)
    assert other.lock.acquire()
    with pytest.raises(InputError, match=r"save_dir: another run is writing to .*; wait for it or use another folder"):
        writer.finish()
    other.lock.release()
    writer.finish()
    assert not list((tmp_path / "x").glob(".*"))


@pytest.mark.parametrize("kind", ["a file", "below a file", "a link to nothing", "a long name", "a null byte"])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    names = {
        "a file": "file",
        "below a file": "file/x/y",
        "a link to nothing": "link/x",
        "a long name": "x/" + "y" * 300,
    }
    before = sorted(tmp_path.rglob("*"))
    path = tmp_path / names.get(kind, "x\0y")
    for place, folder in ((path, True), (path / "z", False)):
        with pytest.raises(InputError, match=r"save_dir: got .*, expected a f.* that can be written"):
            check_writable(place, "save_dir", folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_killed_writer_left_is_removed_but_not_what_is_in_use(tmp_path: Path) -> None:
    for name in (".a.png.1", ".a.png.2", ".b.png.1", ".a.png.x", "a.png"):
        (tmp_path / name).write_text("x")
    with (tmp_path / ".a.png.2").open() as used:
        fcntl.flock(used, fcntl.LOCK_EX)
        with atomic_write(tmp_path / "a.png") as aside:
            remove_leftovers(tmp_path, r"a\.png")
            aside.write_text("y")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.png.2", ".a.png.x", ".b.png.1", "a.png"]
    with atomic_folder(tmp_path / "a.png2") as aside:
        (aside / "x").write_text("x")
    assert (tmp_path / "a.png2/x").exists()
