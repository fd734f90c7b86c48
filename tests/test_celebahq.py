import random
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as Pillow

from clipward.datamodules.celebahq import CelebAHQDataModule
from clipward.errors import InputError


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
    data = CelebAHQDataModule(str(path), size=32, batch_size=2, **kwargs)
    data.setup("fit")
    return data


def test_a_folder_of_pictures(folder: Path) -> None:
    data = loaded(folder)
    assert len(data.train_set) == len(data.val_set) == 6
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 32, 32)
    assert batch["image"].abs().max() <= 1


def test_validation_pictures_are_kept_apart(folder: Path) -> None:
    data = loaded(folder, val_count=2)
    assert (len(data.train_set), len(data.val_set)) == (4, 2)


def test_pictures_are_antialiased_and_cropped_at_the_centre(tmp_path: Path) -> None:
    stripes = Pillow.new("L", (256, 128))
    stripes.putdata([255 * (x % 2) if 64 <= x < 192 else 0 for y in range(128) for x in range(256)])
    stripes.save(tmp_path / "stripes.png")
    data = CelebAHQDataModule(str(tmp_path), size=32, batch_size=1)
    data.setup("fit")
    image = data.val_set[0]["image"]
    assert image[:, :, 2:-2].abs().max() < 0.15  # finest stripes become grey, and the black sides are cut off


def test_a_file_that_is_no_picture_is_named_and_left_out(folder: Path) -> None:
    (folder / "notes.jpg").write_text("not a picture")
    with pytest.warns(UserWarning, match=r"1 of 7 files are no pictures: .*notes\.jpg; left out"):
        assert len(loaded(folder).train_set) == 6
    with pytest.raises(InputError, match=r"notes\.jpg; strict: false"):
        loaded(folder, strict=True)


def test_a_damaged_picture_is_named(folder: Path) -> None:
    Pillow.effect_noise((256, 256), 90).save(folder / "0.jpg")
    whole = (folder / "0.jpg").read_bytes()
    (folder / "0.jpg").write_bytes(whole[: len(whole) // 2])
    pictures = loaded(folder).val_set
    with pytest.raises(InputError, match=r"0\.jpg is damaged"):
        list(pictures)


def test_parquet_with_captions(folder: Path, tmp_path: Path) -> None:
    files = sorted(str(file) for file in folder.glob("*.*"))
    rows = Dataset.from_dict({"picture": files, "words": [f"number {i}" for i in range(len(files))]})
    rows.cast_column("picture", Image()).to_parquet(str(tmp_path / "rows.parquet"))
    data = loaded(tmp_path / "rows.parquet", image_column="picture", caption_column="words")
    item = data.val_set[1]
    assert item["caption"] == "number 1"
    assert item["image"].shape == (3, 32, 32)


def test_cached_pictures_are_the_same(folder: Path) -> None:
    kept = loaded(folder, cache=True)
    first = kept.val_set[2]["image"]
    assert torch.equal(kept.val_set[2]["image"], first)
    assert torch.equal(loaded(folder).val_set[2]["image"], first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_column": "face"}, None),
        ({"caption_column": "caption"}, "no column 'caption'"),
        ({"val_count": 6}, "val_count: 6 given; .* has 6 pictures"),
    ],
)
def test_bad_arguments_are_refused(folder: Path, change: dict, message: str | None) -> None:
    if message is None:
        assert len(loaded(folder, **change).train_set) == 6  # a folder has no columns of its own
    else:
        with pytest.raises(InputError, match=message):
            loaded(folder, **change)


def test_a_place_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no pictures"):
        loaded(tmp_path / "empty")
    with pytest.raises(InputError, match="there is no file"):
        loaded(tmp_path / "no.parquet")
    with pytest.raises(
        InputError, match="nobody/nothing is no folder or parquet file, and the hub gives no such data set"
    ):
        loaded("nobody/nothing")
