import io
import os
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from conftest import mutate, tiny_module, tiny_trainer
from datasets import Dataset, Image
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image as Pillow
from pyarrow import parquet
from torch import Tensor

from clipward.datamodules.celebahq import CelebAHQDataModule
from clipward.errors import InputError
from clipward.pictures import UnreadablePicture, check_picture, read_picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures of different shapes, in a folder and one below it."""
    rng = random.Random(0)
    (tmp_path / "pictures/more").mkdir(parents=True)
    for i in range(6):
        colour = tuple(rng.randrange(256) for _ in range(3))
        picture = Pillow.new("RGB", (40 + 8 * i, 64), colour)
        picture.save(tmp_path / "pictures" / ("more" if i > 3 else "") / f"{i}.{'png' if i % 2 else 'jpg'}")
    return tmp_path / "pictures"


def loaded(path: Path | str, **kwargs) -> CelebAHQDataModule:
    data = CelebAHQDataModule(str(path), **{"size": 32, "batch_size": 2, **kwargs})
    data.setup("fit")
    return data


def table(path: Path, count: int, **columns: list) -> Path:
    """Parquet with ``count`` pictures; the first channel of picture i is i."""
    images = [{"bytes": png(Pillow.new("RGB", (8, 8), (i, 0, 0))), "path": None} for i in range(count)]
    Dataset.from_dict({"image": images, **columns}).cast_column("image", Image()).to_parquet(str(path))
    return path


def png(picture: Pillow.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "png", **options)
    return file.getvalue()


def numbers(pictures: Any) -> list[int]:
    """Which pictures of :func:`table` these are."""
    return [round((item["image"][0, 0, 0].item() + 1) * 127.5) for item in (pictures[i] for i in range(len(pictures)))]


def check_line(error: InputError) -> None:
    assert str(error).isprintable()
    assert len(str(error)) < 400


def test_a_folder_of_pictures(folder: Path) -> None:
    data = loaded(folder)
    assert (len(data.train_set), len(data.val_set)) == (5, 1)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 32, 32)
    assert batch["image"].abs().max() <= 1
    assert batch.keys() == {"image"}


def test_a_folder_needs_no_name_that_is_utf8(tmp_path: Path) -> None:
    for name in (b"\xff\xfe.png", "Mädchen.PNG".encode(), b"a\nb.png"):
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_bytes(png(Pillow.new("RGB", (8, 8))))
    assert len(list(loaded(tmp_path, val_count=0).val_dataloader())) == 2
    Path(os.fsdecode(bytes(tmp_path) + b"/\xfe.png")).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"1 of 4 can't be read as pictures: \\udcfe\.png"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("val_count", "pictures", "batch_size", "expected"),
    [
        (2, 6, 2, (4, 2)),
        (0, 6, 2, (6, 6)),
        (None, 6, 2, (5, 1)),
        (None, 149, 2, (147, 2)),
        (None, 1, 1, (1, 1)),  # nothing can be kept back
        (None, 4, 4, (4, 4)),  # nor from the only batch
        (None, 5, 4, (4, 1)),
    ],
)
def test_validation_pictures_are_kept_apart(
    tmp_path: Path, val_count: int | None, pictures: int, batch_size: int, expected: tuple[int, int]
) -> None:
    data = loaded(table(tmp_path / "x.parquet", pictures), val_count=val_count, batch_size=batch_size)
    assert (len(data.train_set), len(data.val_set)) == expected
    assert numbers(data.val_set) == list(range(pictures))[-expected[1] :]
    again = loaded(tmp_path / "x.parquet", val_count=val_count, batch_size=batch_size)
    assert numbers(again.train_set) == numbers(data.train_set)


def test_at_most_512_are_kept_for_validation() -> None:
    data = CelebAHQDataModule("nowhere")
    assert [data.count_held_out(count) for count in (50, 100, 9000, 26_000, 10**6)] == [1, 2, 180, 512, 512]


def test_a_part_of_the_rows(tmp_path: Path) -> None:
    file = table(tmp_path / "x.parquet", 10)
    first, second = loaded(file, count=6, val_count=1), loaded(file, first=6, val_count=1)
    assert numbers(first.train_set) + numbers(first.val_set) == [*range(6)]
    assert numbers(second.train_set) + numbers(second.val_set) == [*range(6, 10)]
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(Pillow.new("RGB", (8, 8), (i, 0, 0))))
    assert numbers(loaded(tmp_path, first=1, count=2, val_count=0).train_set) == [1, 2]


def test_pictures_are_antialiased_and_cropped_at_the_centre(tmp_path: Path) -> None:
    stripes = Pillow.new("L", (256, 128))
    stripes.putdata([255 * (x % 2) if 64 <= x < 192 else 0 for y in range(128) for x in range(256)])
    stripes.save(tmp_path / "stripes.png")
    image = loaded(tmp_path, batch_size=1).val_set[0]["image"]
    assert image[:, :, 2:-2].abs().max() < 0.15  # finest stripes become grey, and the black sides are cut off


def corners(picture: Tensor) -> list[tuple[int, ...]]:
    """(3, H, W) -> the colours in the corners: top left, top right, bottom left, bottom right."""
    return [tuple(picture[:, y, x].tolist()) for y in (0, -1) for x in (0, -1)]


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.mark.parametrize("strict", [True, False])
def test_a_picture_that_metadata_names_and_that_is_not_there_is_named(tmp_path: Path, strict: bool) -> None:
    Pillow.new("RGB", (8, 8)).save(tmp_path / "0.png")
    lines = "".join(f'{{"file_name": "{name}.png"}}\n' for name in ("0", "gone", "0"))
    (tmp_path / "metadata.jsonl").write_text(lines)
    data = CelebAHQDataModule(str(tmp_path), size=16, batch_size=1, strict=strict)
    message = r"data.path: 1 of 2 can't be read as pictures: gone.png \(there is no such file"
    if strict:
        with pytest.raises(InputError, match=message):
            data.setup("fit")
    else:
        with pytest.warns(UserWarning, match=message):
            data.setup("fit")
        assert len(data.train_set) == 1


QUARTERS = Pillow.fromarray(np.array([[RED, GREEN], [BLUE, WHITE]], dtype=np.uint8)).resize((16, 16), 0)
TURNED = {  # how a camera stored the upright picture, by its EXIF orientation
    1: None,
    2: Pillow.Transpose.FLIP_LEFT_RIGHT,
    3: Pillow.Transpose.ROTATE_180,
    4: Pillow.Transpose.FLIP_TOP_BOTTOM,
    5: Pillow.Transpose.TRANSPOSE,
    6: Pillow.Transpose.ROTATE_90,
    7: Pillow.Transpose.TRANSVERSE,
    8: Pillow.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["png", "tiff", "webp", "jpeg"])
def test_pictures_are_turned_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    turn, exif = TURNED[orientation], Pillow.Exif()
    exif[0x0112] = orientation
    stored = QUARTERS if turn is None else QUARTERS.transpose(turn)
    options = {"webp": {"lossless": True}, "jpeg": {"quality": 100, "subsampling": 0}}.get(kind, {})
    stored.save(tmp_path / f"x.{kind}", exif=exif, **options)
    seen = read_picture(str(tmp_path / f"x.{kind}"), 16)
    assert [tuple(round(value / 255) * 255 for value in colour) for colour in corners(seen)] == [
        RED,
        GREEN,
        BLUE,
        WHITE,
    ]


def test_faulty_exif_is_no_fault_of_the_picture() -> None:
    exif = b"Exif\0\0II*\0\xff\xff\xff\x7f"
    assert corners(read_picture(png(QUARTERS, exif=exif), 16)) == [RED, GREEN, BLUE, WHITE]


GREY16 = np.array([[0, 128 * 257], [256, 65535]], dtype=np.uint16)


@pytest.mark.parametrize("kind", ["png", "tiff", "big-endian tiff", "white is zero", "12 bits"])
def test_16_bit_grey_is_scaled(kind: str) -> None:
    file = io.BytesIO()
    values = GREY16
    if kind == "png":
        Pillow.fromarray(GREY16).save(file, "png")
    elif kind == "12 bits":
        file.write(tiff(bits=12, data=bytes([0x00, 0x08, 0x08, 0x01, 0x0F, 0xFF])))
    else:
        order = ">" if kind.startswith("big") else "<"
        white = kind == "white is zero"
        data = (65535 - values if white else values).astype(f"{order}u2").tobytes()
        file.write(tiff(bits=16, data=data, order=order, photometric=0 if white else 1))
    seen = read_picture(file.getvalue(), 2)
    assert seen[0].tolist() == [[0, 128], [1, 255]]
    assert (seen == seen[:1]).all()


def tiff(bits: int, data: bytes, order: str = "<", photometric: int = 1, sample: int = 1) -> bytes:
    """A grey TIFF of 2×2 pixels, not compressed."""
    tags = [(256, 3, 2), (257, 3, 2), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 200)]
    tags += [(277, 3, 1), (278, 3, 2), (279, 4, len(data)), (339, 3, sample)]
    header = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(tags))
    for tag, kind, value in tags:
        header += struct.pack(f"{order}HHI", tag, kind, 1) + struct.pack(
            f"{order}{'I' if kind == 4 else 'HH'}", *((value,) if kind == 4 else (value, 0))
        )
    return (header + bytes(4)).ljust(200, b"\0") + data


def palette(transparency: int | bytes) -> bytes:
    picture = Pillow.new("P", (4, 4), 1)
    picture.putpalette([255, 0, 0, 0, 255, 0])
    picture.paste(0, (0, 0, 4, 2))
    return png(picture, transparency=transparency)


def gif() -> bytes:
    file = io.BytesIO()
    frames = [Pillow.new("P", (4, 4), i) for i in range(2)]
    for frame in frames:
        frame.putpalette([255, 0, 0, 0, 255, 0])
    frames[0].paste(1, (0, 2, 4, 4))
    frames[0].save(file, "gif", save_all=True, append_images=frames[1:], transparency=1, disposal=2)
    return file.getvalue()


def halves(mode: str, top: Any, bottom: Any) -> Pillow.Image:
    picture = Pillow.new(mode, (4, 4), bottom)
    picture.paste(top, (0, 0, 4, 2))
    return picture


MODES: list[tuple[str, Callable[[], bytes], tuple, tuple]] = [
    ("RGBA", lambda: png(halves("RGBA", (*RED, 255), (*GREEN, 0))), RED, WHITE),
    ("half", lambda: png(halves("RGBA", (*RED, 255), (0, 0, 0, 51))), RED, (204, 204, 204)),
    ("LA", lambda: png(halves("LA", (9, 255), (9, 0))), (9, 9, 9), WHITE),
    ("L", lambda: png(halves("L", 9, 200)), (9, 9, 9), (200, 200, 200)),
    ("L, one value transparent", lambda: png(halves("L", 9, 200), transparency=200), (9, 9, 9), WHITE),
    ("RGB, one colour transparent", lambda: png(halves("RGB", RED, GREEN), transparency=GREEN), RED, WHITE),
    ("1", lambda: png(halves("1", 0, 1)), (0, 0, 0), WHITE),
    ("1, transparent", lambda: png(halves("1", 0, 1), transparency=0), WHITE, WHITE),
    ("palette", lambda: palette(255), RED, GREEN),
    ("palette, one colour transparent", lambda: palette(1), RED, WHITE),
    ("palette with alpha", lambda: palette(bytes([255, 0])), RED, WHITE),
    ("first frame of a GIF", gif, RED, WHITE),
    ("16 bits, one value transparent", lambda: png(halves("I;16", 257, 300), transparency=300), (1, 1, 1), WHITE),
]


@pytest.mark.parametrize(("make", "top", "bottom"), [case[1:] for case in MODES], ids=[case[0] for case in MODES])
def test_any_kind_of_pixels_becomes_rgb_on_white(make: Callable[[], bytes], top: tuple, bottom: tuple) -> None:
    assert corners(read_picture(make(), 4)) == [top, top, bottom, bottom]


def test_cmyk_is_read(tmp_path: Path) -> None:
    Pillow.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "x.jpg")
    assert (read_picture(str(tmp_path / "x.jpg"), 8)[:, 4, 4] - torch.tensor(RED)).abs().max() < 4


def huge(width: int, height: int) -> bytes:
    """The header of a PNG."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + b"\0\0\0\0IDAT"


def text_bomb() -> bytes:
    chunk = b"zTXt" + b"a\0\0" + zlib.compress(bytes(2**26))
    start = png(Pillow.new("RGB", (8, 8)))
    return start[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + start[33:]


def saved(kind: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Pillow.new(mode, (8, 8)).save(file, kind)
    return file.getvalue()


UNREADABLE: list[tuple[str, Callable[[], bytes], str]] = [
    ("empty", bytes, "no PNG, JPEG"),
    ("text", lambda: b"not a picture", "no PNG, JPEG"),
    ("eps", lambda: saved("eps"), "no PNG, JPEG"),
    ("pdf", lambda: b"%PDF-1.4 " + bytes(99), "no PNG, JPEG"),
    ("ppm", lambda: saved("ppm"), "no PNG, JPEG"),
    ("ico", lambda: saved("ico"), "no PNG, JPEG"),
    ("svg", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no PNG, JPEG"),
    ("bomb", lambda: huge(30_000, 30_000), "more than 89478485 pixels"),
    ("bomb with a warning", lambda: huge(10_000, 10_000), "more than 89478485 pixels"),
    ("text bomb", text_bomb, "."),
    ("32-bit floats", lambda: saved("tiff", "F"), "pixels of the kind F"),
    ("32-bit whole numbers", lambda: saved("tiff", "I"), "pixels of the kind I"),
    ("16 bits with a sign", lambda: tiff(16, bytes(8), sample=2), "pixels of the kind I"),
]


@pytest.mark.parametrize(("make", "reason"), [case[1:] for case in UNREADABLE], ids=[case[0] for case in UNREADABLE])
def test_what_is_no_picture_is_left_out(folder: Path, make: Callable[[], bytes], reason: str) -> None:
    (folder / "notes.jpg").write_bytes(make())
    with pytest.warns(UserWarning, match=rf"1 of 7 can't be read as pictures: notes\.jpg \({reason}.*\); left out"):
        assert len(loaded(folder, val_count=0).train_set) == 6
    with pytest.raises(InputError, match=r"^data.path: 1 of 7 .*notes\.jpg .*; use data.strict false") as caught:
        loaded(folder, strict=True)
    check_line(caught.value)


PLACES: list[tuple[Callable[[Path], Any], str]] = [
    (os.mkfifo, "no regular file"),
    (lambda path: path.symlink_to("/dev/zero"), "no regular file"),
    (lambda path: path.symlink_to("nowhere"), "there is no such file"),
    (lambda path: path.symlink_to(path.name), "there is no such file"),
]


@pytest.mark.parametrize(("make", "reason"), PLACES, ids=["fifo", "device", "dangling link", "circle"])
def test_what_is_no_regular_file_is_left_out(folder: Path, make: Callable[[Path], Any], reason: str) -> None:
    make(folder / "notes.png")
    with pytest.warns(UserWarning, match=rf"notes\.png \({reason}\); left out"):
        assert len(loaded(folder, val_count=0).train_set) == 6


def test_only_files_that_are_called_pictures_are_looked_at(folder: Path) -> None:
    for name in ("notes.txt", "x.eps", "x.pdf", "x.svg", "x"):
        (folder / name).write_text("not a picture")
    (folder / "album.png").mkdir()
    (folder / "album.png/7.JPEG").write_bytes(saved("jpeg"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(loaded(folder, val_count=0).train_set) == 7


def test_many_bad_files_make_a_short_line(folder: Path) -> None:
    for i in range(9):
        (folder / f"{i}{'x' * 200}.png").touch()
    with pytest.warns(UserWarning, match=r"9 of 15 can't .*0xxx.*…xxx.*; …; left out") as caught:
        loaded(folder)
    assert len(str(caught[0].message)) < 400


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_picture_is_one_line(folder: Path, num_workers: int) -> None:
    Pillow.effect_noise((256, 256), 90).save(folder / "0.jpg")
    content = (folder / "0.jpg").read_bytes()
    (folder / "0.jpg").write_bytes(content[: len(content) // 2])
    data = loaded(folder, val_count=0, num_workers=num_workers)
    for loader in (data.val_dataloader(), data.train_dataloader()):
        with pytest.raises(
            InputError, match=r"^data: got a damaged picture, 0\.jpg \(.*truncated.*\); remove"
        ) as caught:
            list(loader)
        check_line(caught.value)


@settings(max_examples=150, deadline=None, database=None)
@given(st.sampled_from(["png", "jpeg", "webp", "gif", "tiff", "bmp"]), st.integers(0, 2**32), st.integers(0, 6))
def test_mutated_files_are_pictures_or_unreadable(kind: str, seed: int, count: int) -> None:
    mutated = mutate(SAMPLES[kind], seed, count)
    with suppress(UnreadablePicture), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pillow, "MAX_IMAGE_PIXELS", 10**5)  # 89 million take seconds
        check_picture(mutated)
        assert read_picture(mutated, 8).shape == (3, 8, 8)


SAMPLES = {kind: saved(kind) for kind in ("png", "jpeg", "webp", "gif", "tiff", "bmp")}


def test_a_thin_picture_takes_little_memory() -> None:
    assert read_picture(png(Pillow.new("RGB", (1, 60_000), RED)), 64).shape == (3, 64, 64)


def test_parquet_with_captions(folder: Path, tmp_path: Path) -> None:
    files = sorted(str(file) for file in folder.glob("*.*"))
    rows = Dataset.from_dict({"picture": files, "words": [f"number {i}" for i in range(len(files))]})
    rows.cast_column("picture", Image()).to_parquet(str(tmp_path / "rows.parquet"))
    data = loaded(tmp_path / "rows.parquet", image_column="picture", caption_column="words", val_count=0)
    item = data.val_set[1]
    assert item["caption"] == "number 1"
    assert item["image"].shape == (3, 32, 32)
    assert sorted(word for batch in data.train_dataloader() for word in batch["caption"]) == [
        f"number {i}" for i in range(4)
    ]


def test_a_picture_without_a_caption_is_left_out(tmp_path: Path) -> None:
    file = table(tmp_path / "x.parquet", 5, caption=["a man", None, " ", "a girl", "a boy"])
    with pytest.warns(UserWarning, match=r"data.path: 2 of 5 have no caption: row 1; row 2; left out"):
        data = loaded(file, caption_column="caption", val_count=1)
    assert numbers(data.train_set) == [0, 3]
    with pytest.raises(InputError, match=r"2 of 5 have no caption: row 1; row 2; use data.strict false"):
        loaded(file, caption_column="caption", strict=True)
    table(file, 2, caption=[None, None])
    with pytest.warns(UserWarning, match="2 of 2"), pytest.raises(InputError, match=r"without a picture to use"):
        loaded(file, caption_column="caption")


def test_rows_without_a_picture_are_left_out(tmp_path: Path) -> None:
    good = {"bytes": png(Pillow.new("RGB", (8, 8))), "path": None}
    images = [good, None, {"bytes": b"x", "path": "x" * 99}, {"bytes": None, "path": "/nowhere.png"}, good]
    parquet.write_table(pyarrow.table({"image": images}), tmp_path / "x.parquet")
    with pytest.warns(UserWarning, match=r"3 of 5 .*row 1 \(empty\); row 2, xxx.*; row 3, /nowhere.png \(there is no"):
        assert len(loaded(tmp_path / "x.parquet", val_count=0).train_set) == 2


LABELS = {
    "gender": {"woman": "not male", "man": "male"},
    "hair": {"black": "black_hair", "red": None, "grey": "gray_hair"},
}


@pytest.mark.parametrize(("yes", "no"), [(True, False), (1, 0), (1, -1), (0.5, 0.0)])
def test_labels_come_with_the_pictures(tmp_path: Path, yes: Any, no: Any) -> None:
    columns = {
        "male": [yes, no, None, no],
        "black_hair": [yes, no, no, yes],
        "gray_hair": [no, yes, no, yes],
    }
    data = loaded(table(tmp_path / "x.parquet", 4, **columns), labels=LABELS, val_count=0)
    assert torch.stack([data.train_set[i]["labels"] for i in range(4)]).tolist() == [[1, 0], [0, 2], [-1, -1], [0, -1]]
    batch = next(iter(data.train_dataloader()))
    assert batch["labels"].shape == (2, 2)
    assert batch["labels"].dtype == torch.int64


def test_labels_stay_with_their_rows(tmp_path: Path) -> None:
    file = table(tmp_path / "x.parquet", 6, male=[i % 3 == 0 for i in range(6)])
    data = loaded(file, labels={"gender": {"woman": "not male", "man": "male"}}, first=1, val_count=1)
    for pictures in (data.train_set, data.val_set):
        labels = [pictures[i]["labels"].item() for i in range(len(pictures))]
        assert labels == [int(number % 3 == 0) for number in numbers(pictures)]
    for batch in data.train_dataloader():
        shown = ((batch["image"][:, 0, 0, 0] + 1) * 127.5).round().int()
        assert batch["labels"][:, 0].tolist() == [int(number % 3 == 0) for number in shown.tolist()]


def test_cached_pictures_are_the_same(folder: Path) -> None:
    kept = loaded(folder, cache=True, val_count=0)
    first = kept.val_set[2]["image"]
    assert torch.equal(kept.val_set[2]["image"], first)
    assert torch.equal(loaded(folder, val_count=0).val_set[2]["image"], first)


BAD_ARGUMENTS: list[tuple[dict, str]] = [
    ({"size": 0}, "data.size: got 0, expected a whole number from 1 to 16384"),
    ({"size": 10**9}, "data.size: got 1000000000"),
    ({"batch_size": 0}, "data.batch_size: got 0"),
    ({"batch_size": -4}, "data.batch_size: got -4"),
    ({"batch_size": 2.5}, "data.batch_size: got 2.5"),
    ({"num_workers": -1}, "data.num_workers: got -1, expected a whole number from 0 to"),
    ({"num_workers": 10**6}, "data.num_workers: got 1000000"),
    ({"val_count": -1}, "data.val_count: got -1"),
    ({"first": -1}, "data.first: got -1"),
    ({"count": 0}, "data.count: got 0, expected a whole number from 1"),
    ({"labels": {}}, "data.labels: got {}, expected two values or more for each attribute"),
    ({"labels": {"gender": {"man": "male"}}}, "data.labels: got {'gender': {'man': 'male'}}, expected two values"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS, ids=[message for _, message in BAD_ARGUMENTS])
def test_bad_arguments_are_refused_at_once(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}") as caught:
        CelebAHQDataModule("nowhere", **arguments)
    check_line(caught.value)


BAD_DATA: list[tuple[dict, str]] = [
    ({"val_count": 6}, "data.val_count: got 6, expected less than the 6 pictures there are"),
    ({"first": 6}, "data.first: got 6, expected less than the 6 rows there are"),
    ({"first": 4, "count": 3}, "data.count: got 3, expected 2 or less, the rows that there are from 4 on"),
    ({"batch_size": 7}, "data.batch_size: got 7, expected 6 or less, since there are 6 pictures to train on"),
    ({"batch_size": 4, "val_count": 3}, "data.batch_size: got 4, expected 3 or less"),
    ({"image_column": "face"}, "data.image_column: got 'face', expected a column of the data: image, caption, male"),
    ({"image_column": "male"}, "data.image_column: got 'male', a column of 'bool', expected pictures"),
    ({"caption_column": "text"}, "data.caption_column: got 'text', expected a column of the data"),
    ({"caption_column": "male"}, "data.caption_column: got 'male', a column of 'bool', expected texts"),
    ({"caption_column": "words"}, r"data.caption_column: got 'words', a column of .*, expected texts"),
    ({"labels": {"sex": {"woman": "female", "man": "male"}}}, "data.labels: got 'female', expected a column"),
    ({"labels": {"sex": {"woman": "not caption", "man": "male"}}}, "data.labels: got 'caption', a column of 'string'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_DATA, ids=[message for _, message in BAD_DATA])
def test_arguments_that_the_data_does_not_allow_are_refused(tmp_path: Path, arguments: dict, message: str) -> None:
    columns = {"caption": ["a man"] * 6, "male": [True] * 6, "words": [["a", "man"]] * 6}
    with pytest.raises(InputError, match=f"^{message}") as caught:
        loaded(table(tmp_path / "x.parquet", 6, **columns), **arguments)
    check_line(caught.value)


def test_a_folder_has_pictures_alone(folder: Path) -> None:
    assert len(loaded(folder, image_column="face", val_count=0).train_set) == 6  # the column has no name of its own
    for arguments in ({"caption_column": "caption"}, {"labels": {"sex": {"woman": "not image", "man": "image"}}}):
        with pytest.raises(
            InputError, match=r"^data\.(caption_column|labels): got .*, since a folder has pictures alone"
        ):
            loaded(folder, **arguments)


def test_a_damaged_table_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    file = table(tmp_path / "x.parquet", 60, caption=[f"a man {i}" * 20 for i in range(60)])
    content, rng = bytearray(file.read_bytes()), random.Random(1)
    for place in range(400, len(content) - 3000, 7):
        content[place] = rng.randrange(256)
    file.write_bytes(content)
    with pytest.raises(
        InputError, match=r"^data.path: got .*x.parquet', a damaged parquet file \(.*\); expected"
    ) as caught:
        loaded(file, caption_column="caption")
    check_line(caught.value)
    assert "Failed" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["a[1].parquet", "a*.PARQUET", "a b.parquet", "Mädchen.parquet", "a#1%20?.parquet"])
def test_a_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    assert numbers(loaded(table(tmp_path / name, 3), val_count=0).train_set) == [0, 1, 2]


def test_a_place_that_has_no_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.zip").touch()
    (tmp_path / "empty.parquet").touch()
    (tmp_path / "torn.parquet").write_bytes(b"PAR1" + bytes(99) + b"PAR1")
    os.mkfifo(tmp_path / "fifo.parquet")
    parquet.write_table(pyarrow.table({"image": pyarrow.array([], pyarrow.binary())}), tmp_path / "none.parquet")
    expected = "expected a folder of pictures, a parquet file or the name of a data set on the hub"
    cases = [
        (None, f"got none, {expected}"),
        ("", f"got none, {expected}"),
        (tmp_path / "empty", f"got .*empty', which holds no pictures; {expected}"),
        (tmp_path / "file.zip", f"got .*file.zip', {expected}"),
        (tmp_path / "empty.parquet", r"got .*empty.parquet', a damaged parquet file \(.*\); expected"),
        (tmp_path / "torn.parquet", r"got .*torn.parquet', a damaged parquet file \(.*\); expected"),
        (tmp_path / "fifo.parquet", "there is no file '.*fifo.parquet'"),
        (tmp_path / "no.parquet", "there is no file '.*no.parquet'"),
        (tmp_path / "x" / ("y" * 300), f"got '.*', {expected}"),
        (tmp_path / ("y" * 300 + ".parquet"), "there is no file '.*…y*.parquet'"),
        ("z" * 300, f"got 'zzz.*…z*', {expected}"),
        ("a\nb", r"got 'a\\nb', expected"),
        ("nobody/nothing", rf"got 'nobody/nothing', {expected}; the hub gives no such data set \(.*\)"),
    ]
    for path, message in cases:
        with pytest.raises(InputError, match=f"^data.path: {message}") as caught:
            CelebAHQDataModule(None if path is None else str(path)).setup("fit")
        check_line(caught.value)
    with pytest.raises(InputError, match=r"^data.first: got 0, expected less than the 0 rows|damaged parquet"):
        loaded(tmp_path / "none.parquet")


def test_fit_ends_before_it_starts_where_there_is_nothing_to_train_on(folder: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", max_steps=1, logger=TensorBoardLogger(tmp_path / "run"))
    with pytest.raises(InputError, match=r"^data\.batch_size: got 9, expected 6 or less"):
        trainer.fit(tiny_module(), CelebAHQDataModule(str(folder), size=16, batch_size=9))
    assert trainer.global_step == 0
    assert not (tmp_path / "run").exists()
